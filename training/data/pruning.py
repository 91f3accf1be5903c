"""Which caches there are, and the removal of those that nobody uses any more."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import CACHE_VERSION, INDEX, locked, read_index
from .nifti import DataError

DAY = 24 * 3600.0
_KEY = 16  # characters of a cache's name


@dataclass(frozen=True)
class CacheFolder:
    """One cache, or what is left of one.

    content: what is in it, in words. idle: days since it was opened last. size: bytes.
    usable: whether this version can open it.
    """

    path: Path
    content: str
    idle: float
    size: int
    usable: bool

    def line(self) -> str:
        return (
            f"{self.path.name}  {self.size / 2**20:10,.1f} MB  last used {self.idle:5.1f} days ago"
            f"  {self.content}"
        )


def caches(folder: Path) -> list[CacheFolder]:
    """The caches of a folder, and what killed builds left there, the longest unused first.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    try:
        found = [made for path in folder.iterdir() if (made := _described(path)) is not None]
    except OSError as error:
        raise DataError(f"{folder}: no folder of caches: {error.strerror}") from error
    return sorted(found, key=lambda cache: (-cache.idle, cache.path.name))


def prune(folder: Path, idle: float) -> Iterator[CacheFolder]:
    """Removes, and gives, what no version of now can open and what was not used for `idle` days.

    A cache that is being built, or whose folder cannot be locked, stays.
    """
    for cache in caches(folder):
        if cache.usable and cache.idle < idle:
            continue
        name = cache.path.name.strip(".")[:_KEY]
        with locked(folder / f".{name}.lock", wait=False) as alone:
            if alone:
                shutil.rmtree(cache.path, ignore_errors=True)
                if not cache.path.exists():
                    yield cache


def _described(path: Path) -> CacheFolder | None:
    """A cache by its index; None for other folders, which are not ours to remove."""
    name = path.name
    temporary = name.startswith(".") and name.endswith(".tmp")
    key = name.strip(".")[:_KEY]
    ours = len(key) == _KEY and all(letter in "0123456789abcdef" for letter in key)
    if not path.is_dir() or not ours or not (temporary or name == key):
        return None
    files = [file.stat() for file in path.iterdir() if file.is_file()]
    size = sum(file.st_size for file in files)
    used = path.stat().st_mtime
    content, usable = "left by a build that was killed", False
    if not temporary:
        try:
            index = read_index(path)
            used = (path / INDEX).stat().st_mtime
            scans = len(index["volumes"])
            content = f"{index['dataset']}, {scans} scans, {index['settings']['size']} pixels"
            usable = index["version"] == CACHE_VERSION
            content += "" if usable else f", of version {index['version']}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            content = "damaged, or of an earlier version"
    return CacheFolder(path, content, max(0.0, time.time() - used) / DAY, size, usable)


def report(folder: Path, idle: float, remove: bool) -> None:
    """Prints what there is, or what is removed."""
    found = list(prune(folder, idle)) if remove else caches(folder)
    for cache in found:
        print(f"{'removed ' * remove}{cache.line()}")
    total = sum(cache.size for cache in found) / 2**20
    what = "removed" if remove else "in all"
    print(f"{len(found)} cache{'s' * (len(found) != 1)}, {total:,.1f} MB {what}", file=sys.stderr)
