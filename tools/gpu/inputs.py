"""Features of all forms that kernels treat differently."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12


class Form(NamedTuple):
    """A call of the operator. Features lie "channels_last", "nchw", or as every second channel of
    twice as many ("half"); `offset` elements of their storage come before the first."""

    groups: int
    queries: int
    keys: int  # 0: the queries themselves
    channels: int
    height: int
    width: int
    window: tuple[int, int]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    offset: int = 0
    pairs: float | None = 0.4  # share of all; None: every pair, without a list
    valid: float | None = None  # share of pixels that take part

    @property
    def key(self) -> str:
        shape = "x".join(map(str, self[:6]))
        parts = [shape, "w" + "x".join(map(str, self.window)), str(self.dtype)[6:], self.layout]
        parts += [f"offset{self.offset}"] if self.offset else []
        parts += ["all-pairs"] if self.pairs is None else []
        parts += [f"valid{self.valid:g}"] if self.valid is not None else []
        return "-".join(parts)


class Call(NamedTuple):
    """The operator's arguments, in order."""

    query: Tensor  # (G, N, C, H, W)
    key: Tensor | None  # (G, M, C, H, W)
    pairs: Tensor | None  # (P,) int64
    valid: Tensor | None  # (G, V, H, W) bool
    window: tuple[int, int]
    eps: float = EPS

    def widened(self) -> Call:
        key = None if self.key is None else self.key.double()
        return self._replace(query=self.query.double(), key=key)


def maps(form: Form, samples: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    groups, channels, height, width = form.groups, form.channels, form.height, form.width

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(form.dtype)

    if form.layout == "half":
        return drawn(groups, samples, height, width, 2 * channels)[..., ::2].movedim(-1, 2)
    flat = drawn(groups * samples * channels * height * width + form.offset)[form.offset :]
    if form.layout == "nchw":
        return flat.view(groups, samples, channels, height, width)
    return flat.view(groups, samples, height, width, channels).movedim(-1, 2)


def call(form: Form, device: str) -> Call:
    """The same numbers on every call."""
    query = maps(form, form.queries, device, 0)
    key = maps(form, form.keys, device, 1) if form.keys else None
    generator = torch.Generator(device).manual_seed(2)
    pairs = valid = None
    if form.pairs is not None:
        table = (form.groups, form.queries, form.keys or form.queries)
        drawn = torch.rand(table, generator=generator, device=device) < form.pairs
        pairs = drawn.flatten().nonzero().squeeze(1)
    if form.valid is not None:
        shape = (form.groups, form.queries + form.keys, form.height, form.width)
        valid = torch.rand(shape, generator=generator, device=device) < form.valid
    return Call(query, key, pairs, valid, form.window)


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SMOKE = [
    Form(1, 6, 0, 32, 8, 8, (2, 2)),
    Form(1, 6, 0, 32, 8, 8, (2, 2), BF16),
    Form(1, 32, 0, 384, 8, 8, (2, 2)),
    Form(1, 32, 0, 384, 8, 8, (2, 2), BF16),
    Form(2, 32, 0, 384, 4, 4, (2, 2), BF16),
    Form(1, 64, 0, 384, 4, 4, (2, 2), BF16),
    Form(1, 9, 0, 40, 4, 8, (4, 4)),
    Form(1, 32, 0, 64, 6, 6, (3, 3)),
    Form(1, 32, 0, 64, 12, 12, (6, 6), BF16),
    Form(1, 3, 0, 50, 24, 13, (12, 12)),
    Form(40, 1, 1, 24, 4, 6, (2, 2), F16, pairs=None),
    Form(2, 3, 5, 24, 6, 10, (5, 5), layout="nchw"),
    Form(1, 6, 0, 33, 7, 7, (2, 2), offset=1),
    Form(1, 6, 0, 64, 8, 8, (2, 2), BF16, offset=3),
    Form(1, 6, 0, 32, 8, 8, (2, 2), layout="half"),
    Form(1, 4, 0, 16, 17, 19, (17, 16), BF16),
    Form(1, 6, 0, 32, 8, 8, (2, 2), valid=0.6),
    Form(2, 3, 5, 24, 6, 10, (5, 5), BF16, valid=0.6),
    Form(1, 6, 0, 32, 8, 8, (2, 2), F64),
    Form(1, 130, 0, 16, 2, 2, (1, 1)),
]
# For sanitizers, under which everything is slow: each way to tile, small.
SMALL = [
    Form(1, 9, 0, 40, 4, 8, (4, 4), pairs=0.5),
    Form(1, 32, 0, 384, 2, 4, (2, 2), pairs=0.5),
    Form(2, 3, 5, 24, 6, 10, (5, 5), pairs=0.5, valid=0.6),
    Form(2, 2, 7, 68, 9, 9, (8, 8), pairs=0.5),
    Form(40, 1, 1, 21, 2, 6, (2, 2), pairs=None),
    Form(1, 3, 0, 50, 12, 13, (12, 12), pairs=0.5),
    Form(1, 4, 0, 520, 2, 6, (2, 2), pairs=0.5),
    Form(2, 2, 3, 16, 17, 19, (17, 16), pairs=0.5),
]
