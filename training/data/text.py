"""Text from outside: small files read in bounded time and memory, names that can be shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import DataError

MAX_TEXT = 2**20  # bytes; Info.cfg has some hundred
MAX_NAME = 100  # characters: names become columns of tables and parts of file names


def is_file(path: Path) -> bool:
    """Whether there is a regular file; also where its name is none that the system can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # a loop of links, a name that is too long, NUL in it
        return False


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The UTF-8 text of a small regular file, with or without a byte order mark.

    A device, a pipe or a link to one may have no end, or never begin: they are not opened.

    Raises:
        DataError: no regular file, more than `limit` bytes, or not UTF-8.
        OSError: it is not there or cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: expected a file of text, got a folder, pipe or device")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path}: expected a text of at most {limit} bytes, got more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text: {error.reason}") from error


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped; lines stay lines.

    File names may hold any of them: a terminal would obey the first, and print the second never.
    """
    return "\n".join(
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in text.split("\n")
    )


def name_problem(text: str) -> str | None:
    """Why a text cannot name a subject, a scan or a class; None where it can."""
    if not text or text != text.strip():
        return f"expected a name without blanks around it, got {text!a}"
    if len(text) > MAX_NAME:
        return f"expected at most {MAX_NAME} characters, got {len(text)}: {text[:20]!a}..."
    if not text.isprintable():  # control characters, lone surrogates, changes of direction
        return f"expected characters that can be printed, got {text!a}"
    if "/" in text or "\\" in text:
        return f"expected no slash, got {text!r}"
    return None


def unmarked(text: str) -> str:
    """The text for a picture: matplotlib takes what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")
