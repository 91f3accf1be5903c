"""Patterns of file names: "{subject}/{scan}.nii.gz" says what the parts of a path are."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from .datasets import left_out
from .errors import DataError
from .text import is_file

_FIELD = re.compile(r"\{(\w*)\}")
_LAST_PART = re.compile(r"(.+)[_-][^_-]+")


def matching(root: Path, pattern: str) -> dict[tuple[tuple[str, str], ...], str]:
    """Files below `root` by what stands for the fields of the pattern; hidden ones are left out.

    pattern: a relative path that does not leave `root`.

    Raises:
        DataError: unknown fields, or two files for one scan.
    """
    names = _FIELD.findall(pattern)
    if "subject" not in names or set(names) - {"subject", "scan", "group"}:
        raise DataError(f"expected fields {{subject}}, {{scan}} or {{group}} in {pattern!r}")
    seen: set[str] = set()

    def field(match: re.Match[str]) -> str:
        name = match[1]
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>[^/]+?)"

    expression = re.compile(
        _replaced(pattern, field, lambda text: re.escape(text).replace(r"\*", "[^/]*"))
    )
    wildcards = _replaced(pattern, lambda _: "*", lambda t: glob.escape(t).replace("[*]", "*"))
    wildcards = re.sub(r"\*+", "*", wildcards)  # two in a row would look into folders below
    files: dict[tuple[tuple[str, str], ...], str] = {}
    for path in sorted(root.glob(wildcards)):
        text = path.relative_to(root).as_posix()
        match = expression.fullmatch(text)
        if match is None or not is_file(path) or _unwanted(text, pattern):
            continue
        key = tuple(sorted(match.groupdict().items()))
        if key in files:
            raise DataError(f"{root}: {files[key]} and {text} are one scan by {pattern!r}")
        files[key] = text
    return files


def _replaced(
    pattern: str, field: Callable[[re.Match[str]], str], literal: Callable[[str], str]
) -> str:
    parts, last = [], 0
    for match in _FIELD.finditer(pattern):
        parts += [literal(pattern[last : match.start()]), field(match)]
        last = match.end()
    return "".join([*parts, literal(pattern[last:])])


def _unwanted(path: str, pattern: str) -> bool:
    """Whether a path has a hidden part that the pattern does not name itself."""
    parts = zip(PurePosixPath(path).parts, PurePosixPath(pattern).parts, strict=True)
    return any(left_out(part) and part[0] != wanted[0] for part, wanted in parts)


def one_person(subjects: Iterable[str]) -> tuple[str, str] | None:
    """Two subjects that look like two scans of one person, or None.

    "patient001_frame01" and "patient001_frame12" do where there is a patient002_frame01 too: the
    names fall into several groups when their last part is taken away, and the parts come again.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(set(subjects)):
        if match := _LAST_PART.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
    several = [names for names in groups.values() if len(names) > 1]
    if len(groups) < 2 or not several:
        return None
    return several[0][0], several[0][1]
