"""Runs the steps one after the other; what becomes of one of them stops no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from .plan import RESERVE, Step
from .record import LEFT_OVER, LOST, lines

ROOT = Path(__file__).resolve().parents[2]
LOG, STEPS = "log.txt", "steps.json"
LEAST = 5  # seconds that a step is started with
GRACE = 5  # seconds between asking a step to end and ending it
HANDOVER = 4  # seconds before its limit in which a step is to end by itself
ATTEMPTS = 3  # at a step that loses its device
PATIENCE = 20  # seconds that a step which times waits for the one in the background
MEANINGS = {0: "done", LEFT_OVER: "left over", LOST: "the CUDA context was lost"}


@dataclass(frozen=True)
class Ending:
    """What became of a step: "done", "left over" (some of it is), "no time", "out of time", or how
    it failed."""

    name: str
    status: str
    seconds: float
    limit: float


class Conductor:
    """Steps with limits inside a limit for all.

    Args:
        folder: for results.
        device: "cuda" or "cpu".
        seconds: for everything.
        cases: parts of the keys of the shapes that are wanted; all if there are none.
    """

    def __init__(
        self, folder: Path, device: str, seconds: float, cases: Sequence[str] = ()
    ) -> None:
        self.folder, self.device, self.seconds, self.cases = folder, device, seconds, cases
        self.names: list[str] = []  # of the steps of this run
        self.begin = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.endings = read_endings(folder)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def run(
        self, steps: Sequence[Step], again: bool = False, beside: Step | None = None
    ) -> dict[str, Ending]:
        """All steps; with `again` those that are not done yet.

        Args:
            beside: runs in the background, as long as there is another one.
        """
        if again:
            steps = [step for step in steps if not self._is_done(step)]
        self.names = [step.name for step in steps]
        background = Background(self, beside) if beside is not None and steps else None
        try:
            for number, step in enumerate(steps):
                if step.times and background is not None:
                    background.wait(min(PATIENCE, self.left / 4))
                if step.compiles and background is not None:
                    self.endings[background.step.name] = background.end()
                    background = None
                kept = sum(later.least for later in steps[number + 1 :])
                self.endings[step.name] = self._run(step, kept)
                self._write()
        finally:
            if background is not None:
                self.endings[background.step.name] = background.end()
                self._write()
        return self.endings

    def _is_done(self, step: Step) -> bool:
        ending = self.endings.get(step.name)
        return ending is not None and ending.status == "done"

    def command(self, step: Step, limit: float) -> list[str]:
        words = [sys.executable, "-m", "tools.gpu", "step", step.name, "--device", self.device]
        words += ["--out", str(self.folder), "--seconds", f"{limit - HANDOVER:.1f}"]
        words += ["--cases", *self.cases] if self.cases else []
        return [*words, "--beside", *self.names]

    def _run(self, step: Step, kept: float) -> Ending:
        """A step, which leaves `kept` seconds to those after it, but takes its least."""
        rest = self.left - RESERVE
        limit = min(step.limit_on(self.device), max(rest - kept, min(step.least, rest)))
        if limit < LEAST:
            self.say(f"{step.name}: no time is left for it")
            return Ending(step.name, "no time", 0.0, 0.0)
        self.say(f"{step.name}: {step.what}; at most {limit:.0f} s")
        start = time.monotonic()
        status = MEANINGS[LOST]
        # What cost the device is not tried again: the step goes on behind it.
        for _ in range(ATTEMPTS):
            rest = limit - (time.monotonic() - start)
            if status != MEANINGS[LOST] or rest < LEAST:
                break
            with (self.folder / LOG).open("ab") as log:
                status = self._status(self.command(step, rest), rest, log)
        seconds = time.monotonic() - start
        self.say(f"{step.name}: {status} after {seconds:.0f} s")
        return Ending(step.name, status, round(seconds, 1), round(limit, 1))

    def _status(self, command: list[str], limit: float, log: IO[bytes]) -> str:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            return "out of time"
        except BaseException:  # an interrupt: its processes are not to outlive us
            end(process)
            raise
        return meaning(code)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.begin:4.0f} s] {text}\n"
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(line)
        sys.stdout.write(line)
        sys.stdout.flush()

    def _write(self) -> None:
        # Not write_atomically: this process has no torch, whose import costs seconds of the GPU.
        draft = self.folder / f"{STEPS}.new"
        draft.write_text(json.dumps([asdict(e) for e in self.endings.values()], indent=1) + "\n")
        draft.replace(self.folder / STEPS)


class Background:
    """A step beside the others, whose processes are ended with it."""

    def __init__(self, conductor: Conductor, step: Step) -> None:
        self.conductor, self.step = conductor, step
        self.limit = min(step.limit_on(conductor.device), conductor.left)
        self.begin = time.monotonic()
        self.rows = self._rows()
        with (conductor.folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                conductor.command(step, self.limit),
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Until it has ended, or has written a row, or so long."""
        start = time.monotonic()
        while self.process.poll() is None and self._rows() == self.rows:
            if time.monotonic() - start > seconds:
                break
            time.sleep(0.1)
        if time.monotonic() - start > 1:
            self.conductor.say(f"waited {time.monotonic() - start:.0f} s for {self.step.name}")

    def _rows(self) -> int:
        return sum(row["step"] == self.step.name for row in lines(self.conductor.folder))

    def end(self) -> Ending:
        code = self.process.poll()
        end(self.process)
        seconds = time.monotonic() - self.begin
        status = "left over" if code is None else meaning(code)
        return Ending(self.step.name, status, round(seconds, 1), round(self.limit, 1))


def meaning(code: int) -> str:
    """Of an exit status."""
    if code < 0:
        return f"failed: killed by {signal.Signals(-code).name}"
    return MEANINGS.get(code, f"failed: exit status {code}")


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, which are in its session: first asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_endings(folder: Path) -> dict[str, Ending]:
    path = folder / STEPS
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    return {row["name"]: Ending(**row) for row in rows}
