"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Writes to a temporary name in the same folder, flushes it to disk, then renames it.

    `content` is text, bytes, or a function that writes to the open file. On any failure (a full
    disk, a kill) the file that was there before stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a random name tells writers apart, and leaves room where names may have 255 bytes.
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")
    try:
        with name.open("xb") as file:  # with the rights that the user's umask leaves
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
