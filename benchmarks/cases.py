"""What is measured: shapes, dtypes and layouts, and the inputs that belong to them.

Letters: S samples, C channels, H and W the map, w the window's side, P ordered pairs of samples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from salkernels import slice_pairs

THRESHOLD = 0.35  # t of the paper's experiments on ACDC
# Without it the gradient of the mean loss at "paper", of some 1e-8, is below what fp16 can hold.
FP16_SCALE = 2.0**15
ORDERS = ("views", "scans")
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}


class Problem(NamedTuple):
    """The input of one call; indices are made beforehand so that no provider pays for them."""

    features: Tensor  # (S, C, H, W), requires grad
    pairs: Tensor  # (S, S) bool, on the CPU
    query: Tensor  # (P,) int64, on the device
    key: Tensor  # (P,) int64, on the device
    window: int

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient by the features; in fp16 times `FP16_SCALE`, as a GradScaler scales it."""
        scale = FP16_SCALE if self.features.dtype == torch.float16 else 1.0
        return torch.autograd.grad(loss, self.features, loss.new_full(loss.shape, scale))[0]


@dataclass(frozen=True)
class Case:
    """One shape of the set form of the loss: S samples, two subjects, two views per slice.

    Args:
        samples: S.
        channels: C.
        height: H.
        width: W.
        window: ω.
        dtype: of the features, a name in torch.
        layout: of the features, "channels_last" or "nchw".
        order: of the samples; "views" has the first views of both subjects before the second ones,
            as a batch is drawn, "scans" has one subject after the other, which is two groups of the
            operator.
        threshold: t.
    """

    samples: int = 32
    channels: int = 384
    height: int = 44
    width: int = 44
    window: int = 2
    dtype: str = "float32"
    layout: str = "channels_last"
    order: str = "views"
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        if self.samples % 4:
            raise ValueError(f"two subjects with two views each: 4 divides S, got {self.samples}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {self.layout!r}")
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    @property
    def key(self) -> str:
        """Names the case in tables and on the command line; `parse` reads it back."""
        size = f"S{self.samples}-C{self.channels}-{self.height}x{self.width}-w{self.window}"
        order = "" if self.order == "views" else f"-{self.order}"
        threshold = "" if self.threshold == THRESHOLD else f"-t{self.threshold:g}"
        return f"{size}-{self.dtype}-{self.layout}{order}{threshold}"

    @classmethod
    def parse(cls, key: str) -> Case:
        match = re.fullmatch(
            r"S(\d+)-C(\d+)-(\d+)x(\d+)-w(\d+)-([a-z0-9]+)-([a-z_]+)(?:-([a-z]+))?(?:-t([0-9.]+))?",
            key,
        )
        if match is None:
            raise ValueError(
                f"expected a case such as S32-C384-44x44-w2-float32-channels_last, got {key!r}"
            )
        *numbers, dtype, layout, order, threshold = match.groups()
        samples, channels, height, width, window = map(int, numbers)
        shape = (samples, channels, height, width, window)
        return cls(*shape, dtype, layout, order or "views", float(threshold or THRESHOLD))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def pairs(self) -> Tensor:
        return sample_pairs(self.samples, self.order, self.threshold)

    @property
    def num_pairs(self) -> int:
        return int(self.pairs.count_nonzero())

    @property
    def feature_bytes(self) -> int:
        elements = self.samples * self.channels * self.height * self.width
        return elements * self.torch_dtype.itemsize

    def bytes_moved(self, what: str) -> int:
        """Least traffic: the forward reads the features, the backward reads them and writes once.

        The two together are three passes: nothing of this size stays in a cache in between.
        """
        return {"forward": 1, "backward": 2, "both": 3}[what] * self.feature_bytes

    def flops(self, what: str) -> int:
        """Operations of the definition, in which no product is left out.

        Forward: P·H·W rows against w² keys and the norms. Backward: both roles of every match and
        the projection. A pair (j, i) costs as much as (i, j) here: a kernel that takes both from
        one product does less than this, and may beat the roofline of the forward.
        """
        pixels = self.height * self.width
        keys = min(self.window, self.height) * min(self.window, self.width)
        matches = self.num_pairs * pixels * self.channels
        rows = self.samples * pixels * self.channels
        forward = 2 * matches * keys + 2 * rows
        backward = 2 * 2 * matches + 4 * rows
        return {"forward": forward, "backward": backward, "both": forward + backward}[what]

    def problem(self, device: str | torch.device) -> Problem:
        """The same features on every call: drawn on the CPU from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.samples, self.channels, self.height, self.width)
        features = torch.randn(shape, generator=generator).to(device, self.torch_dtype)
        features = features.contiguous(memory_format=LAYOUTS[self.layout]).requires_grad_()
        pairs = self.pairs
        query, key = (index.to(device) for index in pairs.nonzero(as_tuple=True))
        return Problem(features, pairs, query, key, self.window)


def sample_pairs(samples: int, order: str = "views", threshold: float = THRESHOLD) -> Tensor:
    """(S, S) bool: two subjects, S/4 slices each, two views of each slice.

    A volume has one slice more than are drawn, and the one in the middle is left out. With S = 32
    and t = 0.35 that makes 8 of 9 slices, 15 unordered pairs of slices within 3.15 of each other,
    and so 2 · (8 · 2 + 15 · 2 · 4) = 272 ordered pairs of samples.
    """
    slices = samples // 4
    drawn = torch.tensor([s for s in range(slices + 1) if s != slices // 2])
    index = drawn.repeat(4)
    volume = torch.tensor([0, 1]).repeat_interleave(slices).repeat(2)
    if order == "scans":
        volume = volume.sort().values
    return slice_pairs(volume, index, torch.full((samples,), slices + 1), threshold)


PAPER = Case()
DESK = Case(channels=128, height=24, width=24)
ACDC = Case(samples=64, dtype="bfloat16")
CHD = Case(64, 256, 64, 64, dtype="bfloat16", threshold=0.1)

SUITES: dict[str, list[Case]] = {
    "paper": [PAPER, replace(PAPER, layout="nchw")],
    "desk": [replace(DESK, window=w) for w in (2, 3, 4, 6)],
    "sweep-samples": [replace(DESK, samples=s) for s in (8, 16, 32, 64)],
    "sweep-channels": [replace(DESK, channels=c) for c in (32, 64, 128, 256, 512)],
    "sweep-size": [replace(DESK, height=s, width=s) for s in (12, 24, 48, 96)],
    "sweep-window": [replace(DESK, window=w) for w in (1, 2, 3, 4, 6, 8, 12, 24)],
    "dtypes": [replace(PAPER, dtype=name) for name in ("bfloat16", "float16", "float64")],
    "vanilla": [replace(PAPER, window=44)],
    # A step of the presets `acdc` and `chd`: 32 slices of two scans, two views of each.
    "training": [
        *(replace(ACDC, order=order) for order in ORDERS),
        *(replace(CHD, order=order) for order in ORDERS),
    ],
}
# What `--quick` runs instead: seconds, to see that all works; the times mean nothing.
QUICK = Case(samples=8, channels=16, height=8, width=8)
SWEEPS = [suite for suite in SUITES if suite.startswith("sweep-")]
