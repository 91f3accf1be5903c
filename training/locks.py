"""One process at a time in a folder."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from salkernels._shared.files import remove_temporaries

from .errors import RunError

LOCK = ".lock"
PATIENCE = 3.0  # seconds: for a predecessor that was told to end and is just doing so
_held: set[Path] = set()  # by this process, against which its own locks do not guard


@contextmanager
def sole_use(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Holds the folder for the time of the block; temporaries that a kill left in it are removed.

    The lock goes with the process, however that ends. It is not inherited: loaders that outlive a
    killed run for a moment do not hold its folder. File systems without locks give no protection.

    Raises:
        RunError: another process holds it, who is named.
    """
    place = folder.resolve()
    if place in _held:
        raise RunError(f"{folder} is in use by this process already")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; give a folder that is new or of such a run")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + patience
        while not _taken(file):
            if time.monotonic() >= deadline:
                raise RunError(
                    f"{folder} is in use by {_owner(file)}; wait for that to end, or choose "
                    f"another --out"
                )
            time.sleep(0.1)
        _held.add(place)
        try:
            with suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
            for inside in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                remove_temporaries(inside, all_of_them=True)
            yield
        finally:
            _held.discard(place)


def in_use(folder: Path) -> str:
    """Which other process holds the folder; "" where none does."""
    try:
        with (folder / LOCK).open("r+") as file:
            return "" if _taken(file) else _owner(file)
    except OSError:  # no such folder yet
        return ""


def _taken(file: IO[str]) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # lockf and not flock: forked children do not inherit these, and NFS knows them.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _owner(file: IO[str]) -> str:
    with suppress(OSError, UnicodeDecodeError):
        file.seek(0)
        return file.read(200).strip() or "another process"
    return "another process"
