"""Checkpoints from which a run goes on exactly, and the signals that ask for one."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from salkernels._shared.files import stream_digest, temporary_name, write_atomically

from .errors import RunError

LAST = Path("checkpoints", "last.pt")
PREVIOUS = Path("checkpoints", "previous.pt")
# Ctrl-C, batch systems, a terminal that closes, Slurm's warning before its time limit, a limit of
# CPU time. Not every system has all of them.
STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
    if hasattr(signal, name)
)
SEAL = b"\nsha256 of the bytes before: "  # and the digest in hexadecimal: the end of a checkpoint
SEALED = len(SEAL) + 2 * hashlib.sha256().digest_size


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    """Writes the state as the last checkpoint and keeps the one before it.

    A last checkpoint that is damaged does not take the place of the one before.
    """
    last, previous = out / LAST, out / PREVIOUS
    try:
        if last.exists() and not _damage(last):
            _copy(last, previous)
        write_atomically(last, lambda file: _write_sealed(state, file))
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
        if damage := _damage(out / name):
            failures.append(f"{out / name} cannot be read: {damage}")
            continue
        try:
            state: dict[str, Any] = torch.load(out / name, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds
            reason = " ".join(str(error).split())[:200]
            failures.append(f"{out / name} cannot be read ({type(error).__name__}: {reason})")
            continue
        if failures:
            print(f"warning: {failures[0]}; going on from {out / name}", file=sys.stderr)
        return state
    if failures:
        raise RunError("; ".join(failures) + "; start again with another --out")
    raise RunError(f"nothing to resume: {out / LAST} does not exist; leave --resume out")


def _write_sealed(state: dict[str, Any], file: IO[bytes]) -> None:
    """torch.save and a checksum behind it, which torch.load passes over."""
    hashing = _Hashing(file)
    torch.save(state, hashing)  # type: ignore[arg-type]
    file.write(SEAL + hashing.digest.hexdigest().encode())


class _Hashing:
    """An open file that takes the sha256 of what is written; torch writes from start to end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def _damage(path: Path) -> str:
    """What is wrong with the bytes of a checkpoint; "" if they are as they were written.

    torch.load alone takes most flipped bits for other weights.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - SEALED
            file.seek(max(size, 0))
            seal = file.read()
            if not seal.startswith(SEAL):
                return "it has no checksum at its end: it is cut short, or of another version"
            file.seek(0)
            if stream_digest(file, size).encode() != seal[len(SEAL) :]:
                return "its checksum does not fit its content"
    except OSError as error:
        return str(error)
    return ""


def _copy(last: Path, previous: Path) -> None:
    """`previous` becomes `last`; at every moment it is one whole checkpoint or the other."""
    temporary = temporary_name(previous)
    try:
        try:
            temporary.hardlink_to(last)
        except OSError:  # exFAT and some network file systems have no hard links
            shutil.copyfile(last, temporary)
        os.replace(temporary, previous)
    finally:
        # Two names of one file are not renamed to each other: replace leaves both.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if any."""

    signal: signal.Signals | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block the signals of STOPPING only ask: the loop saves and ends by itself.

    A second signal of the same kind acts at once, as usual. A hang-up that was to be ignored
    (`nohup`) still is.
    """
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        signal.signal(number, before[request.signal])

    def ignored(kind: signal.Signals) -> bool:
        return kind == getattr(signal, "SIGHUP", None) and signal.getsignal(kind) == signal.SIG_IGN

    try:
        for kind in STOPPING:
            if not ignored(kind):
                before[kind] = signal.getsignal(kind)
                signal.signal(kind, ask)
    except ValueError:  # not in the main thread: signals are someone else's
        yield request
        return
    try:
        yield request
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
