"""Who trains and who tests: folds and labelled subsets of subjects, the same for every method.

Orders come from sha256, not from a random generator, so that they hold for every NumPy version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError, listed, raise_problems
from .text import read_text

if TYPE_CHECKING:
    from .cache import VolumeCache

MAX_SPLITS = 2**24  # bytes


@dataclass(frozen=True)
class Fold:
    """Subjects of one fold, sorted; a subject is in one of the two, or in none."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def folds_of(
    cache: VolumeCache, num_folds: int, seed: int, splits: Path | None = None
) -> list[Fold]:
    """The folds of a data set: those of a file, else drawn over its labelled subjects.

    Subjects without labels cannot be scored, so they are in no drawn fold; data without any label
    are cut as they are.

    Raises:
        DataError: too few subjects, or a file that does not fit the data.
    """
    if splits is not None:
        return read_splits(splits, {v.name: v.subject for v in cache.volumes})
    return kfold(cache.labelled_subjects or cache.subjects, num_folds, seed)


def pick(folds: list[Fold], number: int, option: str) -> Fold:
    """One of the folds; DataError that names the option where there are fewer."""
    if number >= len(folds):
        raise DataError(f"{option} is {number}, but there are {len(folds)} folds, from 0")
    return folds[number]


def read_splits(path: Path, scans: Mapping[str, str]) -> list[Fold]:
    """Folds from a JSON file: a list of {"train": [...], "val": [...]}, as nnU-Net writes it.

    "test" may stand for "val". A name is a subject's, or a scan's, which stands for its subject.

    scans: the data's scans, name -> subject.

    Raises:
        DataError: no such file, another form, or names that the data do not have.
    """
    path = path.expanduser()
    try:
        content = json.loads(read_text(path, MAX_SPLITS))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise DataError(f'{path}: expected a list of folds, {{"train": [...], "val": [...]}}')
    return [_fold(path, number, value, scans) for number, value in enumerate(content)]


def _fold(path: Path, number: int, value: Any, scans: Mapping[str, str]) -> Fold:
    where = f"{path}: fold {number}"
    parts = (
        {"train": value.get("train"), "val": value.get("val", value.get("test"))}
        if (isinstance(value, dict))
        else {}
    )
    found: dict[str, set[str]] = {}
    subjects = set(scans.values())
    for part, names in parts.items():
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise DataError(f"{where}: {part}: expected a list of subjects, got {names!r:.60}")
        unknown = sorted({n for n in names if n not in subjects and n not in scans})
        if unknown:
            raise DataError(
                f"{where}: {part}: not in the data: {listed([ascii(n) for n in unknown])}; "
                f"expected subjects such as {listed(sorted(subjects), 3)}"
            )
        found[part] = {n if n in subjects else scans[n] for n in names}
    if not found:
        raise DataError(f'{where}: expected {{"train": [...], "val": [...]}}, got {value!r:.60}')
    both = sorted(found["train"] & found["val"])
    raise_problems(f"{where}: subjects in train and in val, which may not be:", both)
    return Fold(tuple(sorted(found["train"])), tuple(sorted(found["val"])))


def kfold(subjects: Iterable[str], k: int = 5, seed: int = 0) -> list[Fold]:
    """Cut the subjects into k test sets whose sizes differ by at most one.

    subjects: in any order; repeated names (several scans of a subject) count once.

    Raises:
        DataError: k below 2 or above the number of subjects; fewer than two subjects.
    """
    order = _shuffled(subjects, f"kfold/{seed}")
    if len(order) < 2:
        got = listed(order) or "none"
        raise DataError(
            f"folds need at least two subjects with labels, got {got}; add label maps, or give "
            f"--data the folder of all subjects"
        )
    if not 2 <= k <= len(order):
        raise DataError(
            f"{k} folds: expected 2 to {len(order)}, the number of subjects with labels; "
            f"pass --num_folds"
        )
    return [
        Fold(
            train=tuple(sorted(s for i, s in enumerate(order) if i % k != fold)),
            test=tuple(sorted(order[fold::k])),
        )
        for fold in range(k)
    ]


def labelled_subset(train: Iterable[str], m: int, fold: int, seed: int = 0) -> tuple[str, ...]:
    """Draw the m training subjects of a fold whose labels may be used, sorted.

    The draws are nested: those of m = 2 are among those of m = 6 (same train, fold and seed).

    Raises:
        DataError: m below 1 or above the number of subjects.
    """
    order = _shuffled(train, f"labelled/{seed}/{fold}")
    if not 1 <= m <= len(order):
        raise DataError(
            f"{m} labelled subjects: expected 1 to {len(order)}, all that the fold trains on; pass "
            f"another --labelled"
        )
    return tuple(sorted(order[:m]))


def _shuffled(subjects: Iterable[str], salt: str) -> list[str]:
    """Each subject once, in an order that depends on the salt and not on the order given."""

    def rank(subject: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{salt}/{subject}".encode()).digest(), subject

    return sorted(set(subjects), key=rank)
