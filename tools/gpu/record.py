"""Where results go: lines of JSON, one per measurement, written as soon as there is one."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # of this process, but for the start of Python
RESULTS = "results.jsonl"
LEFT_OVER = 75  # exit status: some is measured, and the rest has to wait for another run
LOST = 70  # the CUDA context is lost: nothing more can run in this process
LONGEST_REASON = 300
Row = dict[str, Any]


class OutOfTime(Exception):
    """What is left of the time is not enough for the next measurement."""


class Expired(BaseException):
    """The time is over in the middle of a measurement: no failure of what is measured, and nothing
    that code which catches an `Exception` is to take for one."""


def rounded(value: Any) -> Any:
    """Floats at five significant digits, also inside lists and dictionaries."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def read(folder: Path) -> list[Row]:
    """The rows of a folder, of each step and name the latest; a line that was cut off is left out.

    One that failed does not replace one that did not.
    """
    return latest(lines(folder), by_commit=False)


def latest(rows: Iterable[Row], by_commit: bool) -> list[Row]:
    """Of each step and name, and of each commit where that is wanted, the latest."""
    found: dict[tuple[str | None, ...], Row] = {}
    for row in rows:
        key = row["step"], row["name"], row.get("commit") if by_commit else None
        if "failed" not in row or "failed" in found.get(key, row):
            found[key] = row
    return list(found.values())


def lines(folder: Path) -> list[Row]:
    """All rows of a folder as they were written."""
    path = folder / RESULTS
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row and "name" in row:
            found.append(row)
    return found


@functools.cache
def commit() -> str | None:
    """Of this checkout; None where there is no git."""
    from salkernels._shared import revision

    return revision.commit()


@dataclass
class Context:
    """What a step needs: device, folder, time.

    Args:
        step: its name.
        device: "cuda" or "cpu"; on a CPU everything is a rehearsal on tiny shapes.
        folder: for results.
        seconds: that it may take.
        cases: parts of the keys of the shapes that are wanted; all if there are none.
        steps: of the run, this one's and the others'.
    """

    step: str
    device: str
    folder: Path
    seconds: float
    begin: float = field(default_factory=time.monotonic)
    cases: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.commit = commit()
        earlier = [row for row in read(self.folder) if row["step"] == self.step]
        self.tried = {row["name"] for row in earlier}
        # Of other code, it is to be measured again.
        self.finished = {
            row["name"]
            for row in earlier
            if ("failed" not in row or row.get("lost")) and row.get("commit") == self.commit
        }

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    @property
    def backends(self) -> list[str]:
        """Those that are looked at: of the GPU, or, in a rehearsal, those of the CPU."""
        if self.on_gpu:
            return ["cuda", "triton"]
        import salkernels

        found = [s.name for s in salkernels.backends() if s.available]
        return [name for name in ("cpu", "reference") if name in found]

    def need(self, seconds: float, before: str = "") -> None:
        """Raises OutOfTime unless so much is left."""
        if self.left < seconds:
            raise OutOfTime(before)

    def emit(self, name: str, **row: Any) -> None:
        known = {"step": self.step, "name": name}
        known |= {"commit": self.commit} if self.commit else {}
        line = json.dumps(rounded(known | row))
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def measuring(self, name: str, **what: Any) -> Iterator[Row]:
        """Writes a row with what the body puts into it, or with the reason why there is none.

        What is in `finished` has been measured in an earlier run, or has cost that run its device.
        """
        row: Row = dict(what)
        start = time.monotonic()
        try:
            yield row
        except OutOfTime:
            raise
        except Exception as error:  # whatever it is, it is the result
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            lost = {"lost": True} if self.on_gpu and _context_is_lost() else {}
            self.emit(name, **what, failed=text[:LONGEST_REASON], **lost)
            traceback.print_exc()
            if lost:
                print("the CUDA context is lost: this process ends", file=sys.stderr, flush=True)
                os._exit(LOST)  # without what would wait for the device
        else:
            self.finished.add(name)
            self.emit(name, **row, seconds=time.monotonic() - start)

    def synchronise(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()


def _context_is_lost() -> bool:
    """Whether nothing runs any more, as after an illegal access; a failed capture is none of it."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False
