"""Runs the cells of an experiment in processes of their own, several at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from tqdm import tqdm

from ..checkpoint import RunError, stop_on_signal
from ..engine import Stopped
from ..files import write_atomically
from ..runlog import to_plain
from .cells import Cell

LAST_LINES = 15  # of a failed run's log, in the error message


def run_cells(
    cells: Sequence[Cell], out: Path, jobs: int, finished: Callable[[Cell], None]
) -> None:
    """Runs what is not done yet, `jobs` cells at a time, and calls `finished` after each.

    A run that fails stops the experiment once the others in progress have ended.

    Raises:
        Stopped: after SIGINT or SIGTERM; runs in progress have saved their state.
        RunError: a run failed; the message ends as its log does. Or `out` is in use.
    """
    waiting = [cell for cell in cells if not cell.done()]
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failed: Cell | None = None
    done = len(cells) - len(waiting)
    bar = tqdm(total=len(cells), initial=done, desc="runs", disable=None, unit="run")
    with _only_one(out), bar, stop_on_signal() as stop:
        while running or (waiting and not failed and not stop.signal):
            while len(running) < jobs and not failed and not stop.signal:
                cell = next((cell for cell in waiting if cell.ready()), None)
                if cell is None:
                    break
                waiting.remove(cell)
                running[cell] = _start(cell, out)
                bar.set_postfix_str("; ".join(c.name for c in running))
            if not running:
                assert waiting  # each waits for a run that was not planned
                raise RunError(f"{waiting[0].needs} is missing, which no planned run makes")
            time.sleep(0.2)
            if stop.signal:
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
            for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                status = running.pop(cell).returncode
                if status and not stop.signal:
                    failed = failed or cell
                elif not status:
                    done += 1
                    bar.update()
                    if bar.disable:
                        print(f"{cell.name}: done, {done} of {len(cells)}", file=sys.stderr)
                    finished(cell)
            if stop.signal:
                _wait(running)
                break
    if stop.signal:
        raise Stopped(f"stopped by {stop.signal.name}", 128 + stop.signal.value)
    if failed:
        log = _log(failed, out)
        end = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        raise RunError(f"the run {failed.name} failed; its log {log} ends:\n{end}")


def _start(cell: Cell, out: Path) -> subprocess.Popen[bytes]:
    """A process of its own for the run: memory and random states are its own, too.

    Its session is its own as well: Ctrl-C reaches this process alone, which passes it on once. A
    second signal would end a run before it has saved its state.
    """
    log = _log(cell, out)
    settings = log.with_suffix(".yaml")
    write_atomically(settings, yaml.safe_dump(to_plain(cell.config), sort_keys=False))
    threads = cell.config.threads
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [sys.executable, "-m", "salkernels.training.run", cell.command]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--config", str(settings)],
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
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another experiment is running in {out}; wait for it to end") from error
        yield
