"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

# .NAME.HOST-PID.RANDOM.tmp: who wrote it tells whether it is still being written.
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^/]+)-(?P<process>\d+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_HOST = re.sub(r"[^A-Za-z0-9_]", "_", platform.node())[:40] or "host"


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Writes to a temporary name in the same folder, flushes it to disk, then renames it.

    `content` is text, bytes, or a function that writes to the open file. On any failure (a full
    disk, a kill) the file that was there before stays as it was. What a killed process left beside
    it is removed. The file's mode is what the umask says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent)
    temporary = temporary_name(path)
    # Not mkstemp: its files are their owner's alone, whatever the umask allows.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # "no space left" alone does not tell where
        raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no reader takes for a finished file."""
    # File systems take 255 bytes; the name is only for whoever lists the folder.
    name = os.fsencode(path.name)[:120].decode(errors="ignore")
    return path.with_name(f".{name}.{_HOST}-{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def remove_temporaries(folder: Path, *, all_of_them: bool = False) -> None:
    """Removes what killed processes of this machine left in a folder.

    all_of_them: also those of other machines, for whoever holds the folder's lock.
    """
    for path in _temporaries(folder):
        if all_of_them or not _alive(path):
            with suppress(OSError):
                path.unlink()


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return stream_digest(file)


def stream_digest(file: IO[bytes], size: int | None = None) -> str:
    """sha256 of the next `size` bytes of an open file; of all that are left without `size`."""
    digest = hashlib.sha256()
    left = size
    while block := file.read(2**20 if left is None else min(2**20, left)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def _temporaries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name))


def _alive(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or match["host"] != _HOST or os.name == "nt":
        return True  # who knows
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # someone else's process, or no such number
        return True
    return True
