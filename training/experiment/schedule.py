"""Runs the cells of an experiment in processes of their own, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint import stop_on_signal
from ..data.saying import Rhythm, say
from ..errors import RunError, Stopped
from ..locks import in_use, sole_use
from .cells import Cell
from .command import command_of, environment_of, log_of
from .launcher import Launcher, Running, tell

LAST_LINES = 15  # of a failed run's log, in the error message
POLL = 0.2  # seconds
MOST_TOLD = 4  # runs in progress whose last line is shown
REFUSED = 2  # exit status of a run that would be refused again: settings, data


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    jobs: int,
    finished: Callable[[Cell], None],
    launcher: Launcher | None = None,
    retries: int = 0,
) -> None:
    """Runs what is not done yet, `jobs` cells at a time, and calls `finished` after each.

    launcher: who starts them; by default they are processes of this one.
    retries: how often a run that failed or was lost is started again, where that can help.
    A run that fails for good stops the experiment once the others in progress have ended.

    Raises:
        Stopped: after a signal that asks for it; runs in progress have saved their state.
        RunError: a run failed; the message ends as its log does. Or `out` is in use.
    """
    waiting = [cell for cell in cells if not cell.done()]
    running: dict[Cell, Running] = {}
    again = _Again(retries)
    failed: Cell | None = None
    done = len(cells) - len(waiting)
    bar = tqdm(total=len(cells), initial=done, desc="runs", disable=None, unit="run")
    teller = _Teller(bar)

    def ended(cell: Cell) -> None:
        nonlocal done
        done += 1
        bar.update()
        teller.tell({cell.name: f"done, {done} of {len(cells)}"})
        finished(cell)

    with _only_one(out), bar, stop_on_signal() as stop:
        queue = _Queue(waiting)
        while running or (waiting and not failed and not stop.signal):
            while len(running) < jobs and not failed and not stop.signal:
                cell = queue.next()
                if cell is None:
                    break
                if cell.done():  # by a run that an earlier experiment had left behind
                    ended(cell)
                    continue
                running[cell] = launcher.start(cell, out) if launcher else _start(cell, out)
                teller.tell({cell.name: f"started, {done} of {len(cells)} runs done"})
            if waiting and not running and not queue.possible():
                raise RunError(f"{waiting[0].needs} is missing, which no planned run makes")
            time.sleep(launcher.interval if launcher else POLL)
            teller.now_and_then(running, out)
            if stop.signal:
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                status = running.pop(cell).returncode
                if status and not stop.signal and not failed and again(cell, status):
                    queue.waiting.insert(0, cell)
                elif status and not stop.signal:
                    failed = failed or cell
                elif not status:
                    ended(cell)
            if stop.signal:
                _wait(running)
                break
    if stop.signal:
        left = f"; {len(running)} jobs go on" if launcher and launcher.leaves_jobs else ""
        raise Stopped(f"stopped by {stop.signal.name}{left}", 128 + stop.signal.value)
    if failed:
        raise RunError(_failure(failed, out))


def _failure(cell: Cell, out: Path) -> str:
    log = log_of(cell, out)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    return f"the run {cell.name} failed; its log {log} ends:\n{end}"


class _Teller:
    """Tells how far the runs are, beside the bar or as lines of a log; none of these twice."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar, self.rhythm = bar, Rhythm()
        self.told: dict[str, str] = {}  # by run: the line that was written last

    def tell(self, doing: dict[str, str]) -> None:
        if not self.bar.disable:
            parts = (f"{name}: {line[:40]}" for name, line in doing.items())
            self.bar.set_postfix_str("; ".join(parts))
            return
        for name, line in doing.items():
            if self.told.get(name) != line:
                say(f"{name}: {line}")
        self.told.update(doing)

    def now_and_then(self, running: Iterable[Cell], out: Path) -> None:
        """What the runs in progress said last, every few seconds."""
        if self.rhythm.due():
            self.tell({cell.name: _last_line(cell, out) for cell in [*running][:MOST_TOLD]})


def _last_line(cell: Cell, out: Path) -> str:
    """What a run said last; it speaks every few seconds."""
    log = log_of(cell, out)
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
    command = command_of(cell, out)  # makes the folder of the log
    with log_of(cell, out).open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment_of(cell)},
            start_new_session=True,
        )


class _Again:
    """Which runs that ended badly are started again: they go on from their checkpoints."""

    def __init__(self, retries: int) -> None:
        self.retries, self.count = retries, dict[Cell, int]()

    def __call__(self, cell: Cell, status: int) -> bool:
        count = self.count[cell] = self.count.get(cell, 0) + 1
        if status == REFUSED or count > self.retries:
            return False
        how = f"exit status {status}" if status > 0 else "lost or killed"
        tell(f"{cell.name}: {how}; started again, {count} of {self.retries}")
        return True


def _wait(running: dict[Cell, Running]) -> None:
    for process in running.values():
        process.wait()


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two experiments in one folder would start the same runs twice."""
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_use(out))
        except RunError as error:
            raise RunError(f"another experiment is running: {error}") from error
        yield
