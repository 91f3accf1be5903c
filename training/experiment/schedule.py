"""Runs the cells of an experiment in processes of their own, several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

import salkernels
import salkernels.training
from salkernels._shared.files import write_atomically

from ..checkpoint import stop_on_signal
from ..data.saying import Rhythm, say
from ..errors import RunError, Stopped
from ..locks import in_use, sole_use
from ..runlog import to_plain
from ..startup import without_current_folder
from .cells import Cell

CHILD = Path(__file__).with_name("child.py")  # a program of its own, not a module of this one
LAST_LINES = 15  # of a failed run's log, in the error message


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, finished: Callable[[Cell], None]
) -> None:
    """Runs what is not done yet, `jobs` cells at a time, and calls `finished` after each.

    A run that fails stops the experiment once the others in progress have ended.

    Raises:
        Stopped: after a signal that asks for it; runs in progress have saved their state.
        RunError: a run failed; the message ends as its log does. Or `out` is in use.
    """
    waiting = [cell for cell in cells if not cell.done()]
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failed: Cell | None = None
    done = len(cells) - len(waiting)
    bar = tqdm(total=len(cells), initial=done, desc="runs", disable=None, unit="run")

    def ended(cell: Cell) -> None:
        nonlocal done
        done += 1
        bar.update()
        if bar.disable:
            say(f"{cell.name}: done, {done} of {len(cells)}")
        finished(cell)

    with _only_one(out), bar, stop_on_signal() as stop:
        queue, rhythm = _Queue(waiting), Rhythm()
        while running or (waiting and not failed and not stop.signal):
            while len(running) < jobs and not failed and not stop.signal:
                cell = queue.next()
                if cell is None:
                    break
                if cell.done():  # by a run that an earlier experiment had left behind
                    ended(cell)
                    continue
                running[cell] = _start(cell, out)
                if bar.disable:
                    say(f"{cell.name}: started, {done} of {len(cells)} runs done")
                bar.set_postfix_str("; ".join(c.name for c in running))
            if waiting and not running and not queue.possible():
                raise RunError(f"{waiting[0].needs} is missing, which no planned run makes")
            time.sleep(0.2)
            if running and rhythm.due():
                _tell(bar, {cell.name: _last_line(cell, out) for cell in running})
            if stop.signal:
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                status = running.pop(cell).returncode
                if status and not stop.signal:
                    failed = failed or cell
                elif not status:
                    ended(cell)
            if stop.signal:
                _wait(running)
                break
    if stop.signal:
        raise Stopped(f"stopped by {stop.signal.name}", 128 + stop.signal.value)
    if failed:
        log = _log(failed, out)
        end = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise RunError(f"the run {failed.name} failed; its log {log} ends:\n{end}")


def _tell(bar: tqdm[Any], doing: dict[str, str]) -> None:
    """How far the runs in progress are, beside the bar or as lines of a log."""
    if bar.disable:
        for name, line in doing.items():
            say(f"{name}: {line}")
    else:
        bar.set_postfix_str("; ".join(f"{name}: {line[:40]}" for name, line in doing.items()))


def _last_line(cell: Cell, out: Path) -> str:
    """What a run said last; it speaks every few seconds."""
    log = _log(cell, out)
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 1000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix(f"{cell.config.out.name}: ") if said else "starting"


class _Queue:
    """The cells that wait, in order; those whose folder another process uses wait for that."""

    def __init__(self, waiting: list[Cell]) -> None:
        self.waiting = waiting
        self.said: set[Cell] = set()

    def next(self) -> Cell | None:
        """Takes the first cell that can start."""
        for cell in self.waiting:
            if cell.ready() and not self._busy(cell):
                self.waiting.remove(cell)
                return cell
        return None

    def possible(self) -> bool:
        """Whether a cell can start, now or when its folder is free."""
        return any(cell.ready() for cell in self.waiting)

    def _busy(self, cell: Cell) -> bool:
        other = in_use(cell.config.out)
        if other and cell not in self.said:
            self.said.add(cell)
            tqdm.write(f"{cell.config.out}: waiting for {other} to end", file=sys.stderr)
        return bool(other)


def _start(cell: Cell, out: Path) -> subprocess.Popen[bytes]:
    """A process of its own for the run: memory and random states are its own, too.

    Its session is its own as well: Ctrl-C reaches this process alone, which passes it on once. A
    second signal would end a run before it has saved its state. It ends when this process does,
    which holds the other end of its standard input.
    """
    log = _log(cell, out)
    settings = log.with_suffix(".yaml")
    write_atomically(settings, yaml.safe_dump(to_plain(cell.config), sort_keys=False))
    threads = cell.config.threads
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    places = {
        "path": without_current_folder(sys.path),
        "packages": {p.__name__: str(p.__file__) for p in (salkernels, salkernels.training)},
    }
    command = [sys.executable, "-I", str(CHILD), json.dumps(places), cell.command]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--config", str(settings)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait(running: dict[Cell, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.wait()


def _log(cell: Cell, out: Path) -> Path:
    return out / "logs" / f"{cell.config.out.relative_to(out).as_posix().replace('/', '_')}.log"


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two experiments in one folder would start the same runs twice."""
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_use(out))
        except RunError as error:
            raise RunError(f"another experiment is running: {error}") from error
        yield
