"""Which samples form a pair: positives of the local alignment loss and of the positional one.

A distance of exactly t is not near. Distances are compared in integers, with t as the fraction that
was meant (0.35 is 7/20): in floating point 3/10 − 2/10 is less than 0.1.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from .checks import (
    Column,
    check_integers,
    check_per_sample,
    check_threshold,
    values_visible,
)

# The largest denominator of t as a fraction: 0.123456 is exact, 1/3 is found, and products with two
# numbers of slices up to a million fit into 64 bits.
LARGEST_DENOMINATOR = 1_000_000


def slice_pairs(volume: Column, index: Column, num_slices: Column, t: float) -> Tensor:
    r"""Ordered pairs of samples on which the local alignment loss acts (paper, Eq. 1).

    .. math:: P_{ij} = [i \ne j] \cdot [v_i = v_j] \cdot [\,|z_i - z_j| < t \cdot V_i\,]

    Two augmented views of one slice are a pair: only the sample itself is left out.

    Args:
        volume: (S,) integers, the scan each sample comes from: a tensor or a list, as the next
            two. Use one number per *scan*, not per subject, when a subject has several.
        index: (S,) integers, the slice's index in its scan, counted from 0.
        num_slices: (S,) integers, the number of slices V of that scan; one number if all have it.
        t: threshold as a fraction of the scan, in [0, 1] (0.35 for ACDC in the experiments).

    Returns:
        (S, S) bool, symmetric, False on the diagonal.

    Raises:
        ValueError: shapes or devices differ, `t` outside [0, 1], or an index outside its scan.
        TypeError: a tensor is not of an integer dtype.
    """
    t = check_threshold(t)
    volume, index, num_slices = check_columns(volume=volume, index=index, num_slices=num_slices)
    near = _less((index[:, None] - index[None, :]).abs(), t, num_slices[:, None])
    return near & (volume[:, None] == volume[None, :]) & _others(volume)


def positional_positives(position: Column, t: float) -> Tensor:
    r"""Positives of the global positional loss: close relative positions, in any scan (Sec. 2.3).

    .. math:: P_{ij} = [i \ne j] \cdot [\,|p_i - p_j| < t\,]

    Args:
        position: (S,) floating point, slice index divided by the number of slices of its scan.
        t: threshold in [0, 1].

    Returns:
        (S, S) bool, symmetric, False on the diagonal.

    Raises:
        ValueError: `position` is not one-dimensional, or `t` is outside [0, 1].
        TypeError: `position` is not floating point.
    """
    t = check_threshold(t)
    (position,) = check_per_sample(position=position)
    if not position.dtype.is_floating_point:
        raise TypeError(
            f"position must be floating point (index / num_slices), got {position.dtype}"
        )
    # What rounding leaves of a distance of exactly t: half an eps from either position, both less
    # than 1. In fp32 any other distance of slices that are counted in hundreds is further from t.
    rounding = torch.finfo(position.dtype).eps / 2
    wide = position.to(torch.promote_types(position.dtype, torch.float32))
    near = (wide[:, None] - wide[None, :]).abs() < t - min(1.1 * rounding, t / 2)
    return near & _others(position)


def near_positions(index: Column, num_slices: Column, t: float) -> Tensor:
    """`positional_positives` of the slices index / num_slices (S,), computed in integers."""
    index, num_slices = check_columns(index=index, num_slices=num_slices)
    crossed = index[:, None] * num_slices[None, :]  # i · W, over V · W
    near = _less((crossed - crossed.T).abs(), t, num_slices[:, None] * num_slices[None, :])
    return near & _others(index)


def check_columns(**columns: object) -> tuple[Tensor, ...]:
    """Integer columns of the samples, as int64; each index lies in its scan."""
    checked = check_per_sample(**columns)
    for name, column in zip(columns, checked, strict=True):
        check_integers(name, column)
    # As int64: differences of unsigned integers would wrap around.
    wide = tuple(column.long() for column in checked)
    index, num_slices = (wide[list(columns).index(name)] for name in ("index", "num_slices"))
    if values_visible(index) and not bool(((index >= 0) & (index < num_slices)).all()):
        raise ValueError(
            "each index must be in [0, num_slices), "
            f"got index {index.tolist()} with num_slices {num_slices.tolist()}"
        )
    return wide


def _less(part: Tensor, t: float, whole: Tensor) -> Tensor:
    """Whether part / whole < t, for integers and t as it would be written."""
    if torch.compiler.is_compiling():
        # There t may be a symbol. The rounding of t · whole is far below the margin, and any other
        # distance from t above it, while whole and the denominator of t are below a million.
        return part < (t - 1e-13) * whole.double()
    fraction = Fraction(str(t)).limit_denominator(LARGEST_DENOMINATOR)
    return part * fraction.denominator < fraction.numerator * whole


def _others(samples: Tensor) -> Tensor:
    """(S, S) bool, False on the diagonal: a sample is never its own partner."""
    return ~torch.eye(len(samples), dtype=torch.bool, device=samples.device)
