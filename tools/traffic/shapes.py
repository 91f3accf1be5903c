"""The shapes whose instructions are counted, and how counts on small maps give those of 44 x 44.

Windows share no work, so a kernel's count is a constant (the launch, tables of pairs), plus one
cost for each whole window and, where the window does not divide the map, one for each window that
the lower or right edge cuts off. With n_y and n_x whole windows to a side and the same remainder,

    count(n_y, n_x) = constant + edge (n_y + n_x) + whole n_y n_x.

A kernel that goes over the pixels of a pair, a block's threads at a time, rounds up and follows
this less well, but such kernels are a percent of a pass; tests compare with direct counts.

As many small maps as there are unknowns determine it; `Shape.maps` lists them, each with its weight
in the sum that is the count of the whole map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks.cases import sample_pairs
from salkernels import slice_pairs

SIDE = 44  # pixels of the paper's map
FEW_WINDOWS = 4  # a map of so few windows is counted on one of them
SMALL = 4  # windows to a side of the smallest map, where windows are small


class Map(NamedTuple):
    """A small map, and its weight in the count of the whole one."""

    height: int
    width: int
    weight: float
    room: int = 0  # entries of the list of pairs that are left over


@dataclass(frozen=True)
class Shape:
    """Features of (groups, samples, channels, side, side), channels-last, in the set form."""

    name: str
    samples: int = 32
    window: int = 2
    dtype: str = "float32"
    groups: int = 1
    channels: int = 384
    side: int = SIDE

    def maps(self) -> tuple[Map, ...]:
        """The maps that are counted; see the top of this file."""
        whole, rest = divmod(self.side, self.window)
        if rest == 0 and whole * whole <= FEW_WINDOWS:
            # How a large window is cut goes by pairs x windows: the list is as long as it takes to
            # be cut as the whole map is. What is left over costs a percent, and is counted too.
            windows = whole * whole
            room = (windows - 1) * len(self.pairs())
            return (Map(self.window, self.window, float(windows), room),)
        if rest == 0:
            n = min(SMALL, whole // 2)
            sizes = [(n, n), (n, 2 * n)]
        else:
            sizes = [(1, 1), (1, 2), (2, 2)]
        unknowns = [_unknowns(y, x, rest > 0) for y, x in sizes]
        weights = numpy.linalg.solve(
            numpy.array(unknowns, dtype=float).T,
            numpy.array(_unknowns(whole, whole, rest > 0), dtype=float),
        )
        return tuple(
            Map(y * self.window + rest, x * self.window + rest, float(weight))
            for (y, x), weight in zip(sizes, weights, strict=True)
        )

    def features(self, height: int, width: int) -> Tensor:
        """Random features on a map of this size, (groups, samples, channels, height, width)."""
        shape = (self.groups, self.samples, height, width, self.channels)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(getattr(torch, self.dtype)).movedim(-1, 2)

    def pairs(self, room: int = 0) -> Tensor:
        """The pairs, as flat indices into (groups, samples, samples), then -1: room.

        One group holds two scans; of several groups, each holds one scan, as a training batch does.
        """
        mask = sample_pairs(self.samples) if self.groups == 1 else one_scan(self.samples)
        pairs = mask.expand(self.groups, -1, -1).flatten().nonzero().squeeze(1)
        return torch.cat((pairs, pairs.new_full((room,), -1)))

    def bytes_moved(self, phase: str) -> int:
        """Least traffic of a pass: features read, and in the backward the gradient written."""
        elements = self.groups * self.samples * self.channels * self.side**2
        size: int = getattr(torch, self.dtype).itemsize
        return {"forward": 1, "backward": 2}[phase] * elements * size


def _unknowns(y: int, x: int, ragged: bool) -> tuple[int, ...]:
    return (1, y + x, y * x) if ragged else (1, y * x)


def one_scan(samples: int) -> Tensor:
    """(S, S) bool: two views of S/2 slices of one scan, pairs as in `sample_pairs`."""
    slices = samples // 2
    drawn = torch.tensor([s for s in range(slices + 1) if s != slices // 2])
    scan = torch.zeros(samples, dtype=torch.int64)
    lengths = torch.full((samples,), slices + 1)
    return slice_pairs(scan, drawn.repeat(2), lengths, 0.35)


SHAPES = (
    Shape("paper-fp32"),
    Shape("paper-bf16", dtype="bfloat16"),
    Shape("acdc-bf16", groups=2, dtype="bfloat16"),
    Shape("window3-fp32", window=3),
    Shape("window6-fp32", window=6),
    Shape("window22-bf16", window=22, dtype="bfloat16"),
)
