"""Checkpoints from which a run goes on exactly, and the signals that ask for one."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .files import write_atomically

LAST = Path("checkpoints", "last.pt")
PREVIOUS = Path("checkpoints", "previous.pt")
STOPPING = (signal.SIGINT, signal.SIGTERM)


class RunError(RuntimeError):
    """A run that cannot start or go on, with what to do about it."""


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Writes the state as the last checkpoint and keeps the one before it."""
    last, previous = out / LAST, out / PREVIOUS
    try:
        if last.exists():
            previous.unlink(missing_ok=True)
            try:
                previous.hardlink_to(last)
            except OSError:  # exFAT and some network file systems have no hard links
                shutil.copyfile(last, previous)
        write_atomically(last, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"the checkpoint could not be written to {last}: {error}; the one before it is intact. "
            f"Make room and pass --resume"
        ) from error


def has_checkpoint(out: Path) -> bool:
    """Whether there is a state to go on from; a run may have been killed before the first."""
    return (out / LAST).is_file() or (out / PREVIOUS).is_file()


def load_checkpoint(out: Path) -> dict[str, Any]:
    """The last checkpoint of a run, or the one before it if the last cannot be read.

    Only tensors and plain containers are read (`weights_only`): nothing in the file is executed.
    """
    failures = []
    for name in (LAST, PREVIOUS):
        if not (out / name).is_file():
            continue
        try:
            state: dict[str, Any] = torch.load(out / name, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a damaged file
            failures.append(f"{out / name} cannot be read ({type(error).__name__}: {error})")
            continue
        return state
    if failures:
        raise RunError("; ".join(failures) + "; start again with another --out")
    raise RunError(f"nothing to resume: {out / LAST} does not exist; leave --resume out")


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if any."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM only ask: the loop saves and ends by itself.

    A second signal of the same kind acts at once, as usual.
    """
    request = StopRequest()

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        signal.signal(number, before[request.signal])

    try:
        before = {kind: signal.signal(kind, ask) for kind in STOPPING}
    except ValueError:  # not in the main thread: signals are someone else's
        yield request
        return
    try:
        yield request
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
