"""What can be said of a few runs: mean, spread, paired differences, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
MOST_FLIPPED = 24  # differences: 2^23 sign patterns take a second


class Summary(NamedTuple):
    """Mean and standard deviation (n − 1) over units: seeds, or the folds of a single seed."""

    mean: float
    std: float
    folds: int  # scores, one for each fold of each seed
    seeds: int = 1


class Difference(NamedTuple):
    """Mean over units of Dice less the baseline's, with Student's interval and an exact p."""

    mean: float
    low: float
    high: float
    folds: int  # scores, one for each fold of each seed
    p: float  # of `sign_flip`
    seeds: int = 1


def summarised(units: Sequence[float]) -> Summary:
    """Of a score for each unit; one unit has no deviation."""
    std = float(np.std(units, ddof=1)) if len(units) > 1 else math.nan
    return Summary(float(np.mean(units)), std, len(units))


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean, Student's interval and p of paired differences of units that are taken as independent.

    Student's interval takes them as normally distributed, the p as symmetrically.
    """
    from scipy import stats  # when it is used: it takes a second

    values = np.asarray(differences, dtype=float)
    count, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    return Difference(mean, mean - reach, mean + reach, count, sign_flip(values.tolist()))


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p of a mean that is 0: the share of all sign patterns that bring it as far.

    Without an effect, of two arms either could have been the other, so that every difference could
    as well have had the other sign. With n differences p is at least 2^(1 − n): of five folds 1/16,
    of six seeds 1/32. NaN for more differences than can be tried.
    """
    if not 1 <= len(differences) <= MOST_FLIPPED:
        return math.nan
    # The first keeps its sign: a pattern and its mirror image are equally far.
    sums = np.array([differences[0]], dtype=float)
    for value in differences[1:]:
        sums = np.concatenate((sums + value, sums - value))
    rounding = 1e-12 * max(1e-300, float(np.abs(differences).sum()))
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - rounding))
