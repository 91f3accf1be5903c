"""What is in the files of a data set: sha256 of their contents, each file read once.

Size and date do not tell: two releases of a data set may agree in both.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from salkernels._shared.files import file_digest, write_atomically

from .datasets import Scan
from .nifti import DataError
from .saying import counted

MEMORY = ".digests.json"  # in the cache folder
# A file may change twice within a tick of the file system's clock, so that a state so young does
# not tell its content (as in Git's index).
YOUNG = 2 * 10**9  # ns

State = list[int]


class ScanDigest(NamedTuple):
    """sha256 of a scan's files; None for a file that is not there or that may not be read."""

    image: str | None
    label: str | None


def scan_digests(
    scans: Sequence[Scan], memory: Path | None = None, *, shown: bool = False
) -> list[ScanDigest]:
    """The contents of each scan's files.

    memory: folder that keeps what was found. A file of the same place, size, dates and inode is
    not read again: its change time, unlike its date, is not set by copying or by hand.
    shown: say how far it is.

    Raises:
        DataError: a file that is there fails to be read.
    """
    known = _remembered(memory)
    found: dict[str, tuple[State, str]] = {}
    digests: dict[Path, str | None] = {}

    def digest(path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in digests:
            digests[path] = _digest(path, known, found)
        return digests[path]

    made = [
        ScanDigest(digest(scan.image), digest(scan.label))
        for scan in counted(scans, "reading", "scan", shown=shown)
    ]
    if memory is not None and any(known.get(name) != entry for name, entry in found.items()):
        _remember(memory, {**known, **found})
    return made


def _digest(
    path: Path, known: dict[str, tuple[State, str]], found: dict[str, tuple[State, str]]
) -> str | None:
    name = os.path.abspath(path)
    try:
        state = _state(path)
        if state is None:
            return None  # the build reports it, with all other bad files
        if name in known and known[name][0] == state:
            found[name] = known[name]
            return known[name][1]
        digest = file_digest(path)
        old = time.time_ns() - max(state[1:3]) > YOUNG
        if old and _state(path) == state:
            found[name] = state, digest
        return digest
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read now: {error.strerror}; try again") from error


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _remembered(folder: Path | None) -> dict[str, tuple[State, str]]:
    """What was found before; nothing where that cannot be read, which costs time alone."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads((folder / MEMORY).read_text(encoding="utf-8")) if folder else {}
        return {
            name: (state, digest)
            for name, (state, digest) in content.items()
            if len(digest) == 64 and len(state) == 5
        }
    return {}


def _remember(folder: Path, found: dict[str, tuple[State, str]]) -> None:
    with suppress(OSError, UnicodeError):  # a full disk, a name that is no text
        write_atomically(folder / MEMORY, json.dumps(found))
