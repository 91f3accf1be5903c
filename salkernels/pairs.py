"""Which samples form a pair: positives of the local alignment loss and of the positional one."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    check_integers,
    check_per_sample,
    check_threshold,
    values_visible,
)


def slice_pairs(volume: Tensor, index: Tensor, num_slices: Tensor, t: float) -> Tensor:
    r"""Ordered pairs of samples on which the local alignment loss acts (paper, Eq. 1).

    .. math:: P_{ij} = [i \ne j] \cdot [v_i = v_j] \cdot [\,|z_i - z_j| < t \cdot V_i\,]

    Two augmented views of one slice are a pair: only the sample itself is left out.

    Args:
        volume: (S,) integers, the scan each sample comes from. Use one number per *scan*,
            not per subject, when a subject has several.
        index: (S,) integers, the slice's index in its scan, counted from 0.
        num_slices: (S,) integers, the number of slices V of that scan.
        t: threshold as a fraction of the scan, in [0, 1] (0.35 for ACDC in the experiments).

    Returns:
        (S, S) bool, symmetric, False on the diagonal.

    Raises:
        ValueError: shapes or devices differ, `t` outside [0, 1], or an index outside its scan.
        TypeError: a tensor is not of an integer dtype.
    """
    check_threshold(t)
    volume, index, num_slices = check_per_sample(volume=volume, index=index, num_slices=num_slices)
    for name, column in (("volume", volume), ("index", index), ("num_slices", num_slices)):
        check_integers(name, column)
    if values_visible(index) and not bool(((index >= 0) & (index < num_slices)).all()):
        raise ValueError(
            "each index must be in [0, num_slices), "
            f"got index {index.tolist()} with num_slices {num_slices.tolist()}"
        )
    index = index.long()  # differences of unsigned integers would wrap around
    near = (index[:, None] - index[None, :]).abs() < t * num_slices.double()[:, None]
    return near & (volume[:, None] == volume[None, :]) & _others(volume)


def positional_positives(position: Tensor, t: float) -> Tensor:
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
    check_threshold(t)
    (position,) = check_per_sample(position=position)
    if not position.dtype.is_floating_point:
        raise TypeError(
            f"position must be floating point (index / num_slices), got {position.dtype}"
        )
    near = (position[:, None] - position[None, :]).abs() < t
    return near & _others(position)


def _others(samples: Tensor) -> Tensor:
    """(S, S) bool, False on the diagonal: a sample is never its own partner."""
    return ~torch.eye(len(samples), dtype=torch.bool, device=samples.device)
