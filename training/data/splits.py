"""Who trains and who tests: folds and labelled subsets of subjects, the same for every method.

Orders come from sha256, not from a random generator, so that they hold for every NumPy version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from .nifti import DataError


@dataclass(frozen=True)
class Fold:
    """Subjects of one fold, sorted; every subject is in exactly one of the two."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def kfold(subjects: Iterable[str], k: int = 5, seed: int = 0) -> list[Fold]:
    """Cut the subjects into k test sets whose sizes differ by at most one.

    subjects: in any order; repeated names (several scans of a subject) count once.

    Raises:
        DataError: k below 2 or above the number of subjects.
    """
    order = _shuffled(subjects, f"kfold/{seed}")
    if len(order) < 2:
        raise DataError(
            f"cross-validation needs at least 2 subjects, got {', '.join(order) or 'none'}; is "
            f"--data the folder of all subjects?"
        )
    if not 2 <= k <= len(order):
        raise DataError(f"{k} folds: expected 2 to {len(order)}, the number of subjects")
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
        raise DataError(f"{m} labelled subjects: expected 1 to {len(order)}, all of the training")
    return tuple(sorted(order[:m]))


def _shuffled(subjects: Iterable[str], salt: str) -> list[str]:
    """Each subject once, in an order that depends on the salt and not on the order given."""

    def rank(subject: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{salt}/{subject}".encode()).digest(), subject

    return sorted(set(subjects), key=rank)
