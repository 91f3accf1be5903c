"""Random inputs of the operator, drawn by hypothesis: shapes, memory layouts, values and masks.

An input is described by small numbers and built from them, so that hypothesis can shrink it and
print it; tensors come from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

Values = Literal["normal", "one-hot", "palette", "integers"]
Form = Literal["pairwise", "set", "groups", "sets"]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.half}


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory.

    order: axes from the slowest to the fastest. step: every n-th element of an axis is used.
    before, after: elements of the storage around it, NaN. expanded: axes of stride 0.
    """

    order: tuple[int, ...]
    step: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    expanded: tuple[int, ...] = ()

    def place(self, values: Tensor) -> Tensor:
        """A view with these values (on expanded axes: the first one everywhere)."""
        shape = values.shape
        for axis in self.expanded:
            values = values.narrow(axis, 0, min(1, shape[axis]))
        sizes = [
            b + n * s + a
            for b, n, s, a in zip(self.before, values.shape, self.step, self.after, strict=True)
        ]
        inverse = [self.order.index(axis) for axis in range(len(shape))]
        # Poison around the view: a kernel that reads there gives NaN, not nearly the right answer.
        base = values.new_full([sizes[axis] for axis in self.order], torch.nan).permute(inverse)
        slices = tuple(
            slice(b, b + n * s, s)
            for b, n, s in zip(self.before, values.shape, self.step, strict=True)
        )
        return base[slices].copy_(values).expand(shape)


@dataclass(frozen=True)
class Input:
    """One call of a form: `wla_loss`, `wla_set_loss`, or the operator with separate keys or not.

    groups, samples, keys, channels, height, width: G, N, M, C, H, W of the operator.
    spread: pixels are scaled by powers of two between -spread and spread.
    dead: some pixels are zero. bad: how many elements are NaN or infinite.
    slack: room in the list for more pairs than there are.
    valid: share of the pixels that take part; the others hold NaN. 1: no mask is given.
    """

    form: Form
    groups: int
    samples: int
    keys: int
    channels: int
    height: int
    width: int
    window: tuple[int, int]
    dtype: str
    values: Values
    spread: int
    dead: bool
    bad: int
    eps: float
    mask: Literal["all", "random", "sparse", "rows", "none"]
    weighted: bool
    reduction: Literal["mean", "none"]
    slack: int
    valid: float
    threads: int
    query_layout: Layout
    key_layout: Layout
    seed: int

    @property
    def one_set(self) -> bool:
        """Whether the queries are the keys too."""
        return self.form in ("set", "sets")

    @property
    def exact(self) -> bool:
        """Whether all arithmetic is exact, and with it every tie.

        A channel that is expanded makes vectors of it whose norm is no whole number.
        """
        layouts = (self.query_layout, self.key_layout)
        return self.values == "one-hot" and not any(2 in layout.expanded for layout in layouts)

    def features(self, device: str = "cpu") -> tuple[Tensor, Tensor | None]:
        """Query (G, N, C, H, W) and key (G, M, C, H, W), or None: leaves that need a gradient."""
        generator = torch.Generator().manual_seed(self.seed)

        valid = self.valid_pixels()

        def make(first: int, count: int, layout: Layout) -> Tensor:
            shape = (self.groups, count, self.channels, self.height, self.width)
            values = self._fill(shape, generator)
            if valid is not None and not layout.expanded:
                values = values.masked_fill(~valid[:, first : first + count, None], torch.nan)
            return layout.place(values.to(DTYPES[self.dtype]).to(device)).requires_grad_()

        query = make(0, self.samples, self.query_layout)
        return query, None if self.one_set else make(self.samples, self.keys, self.key_layout)

    def valid_pixels(self) -> Tensor | None:
        """(G, N or N + M, H, W) bool, or None."""
        if self.valid == 1:
            return None
        generator = torch.Generator().manual_seed(self.seed + 3)
        samples = self.samples + (0 if self.one_set else self.keys)
        shape = (self.groups, samples, self.height, self.width)
        return torch.rand(shape, generator=generator) < self.valid

    def _fill(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        plane = (shape[0], shape[1], 1, *shape[3:])

        def integers(low: int, high: int, size: tuple[int, ...]) -> Tensor:
            return torch.randint(low, high, size, generator=generator)

        if self.values == "one-hot":
            hot = integers(0, self.channels, plane)
            values = torch.zeros(shape, dtype=torch.float64).scatter_(2, hot, 1.0)
            values *= 1 - 2 * integers(0, 2, plane)
        elif self.values == "palette":  # few different vectors: matches hang on rounding
            palette = torch.randn(3, shape[2], generator=generator, dtype=torch.float64)
            values = palette[integers(0, 3, plane).squeeze(2)].movedim(-1, 2)
        elif self.values == "integers":
            values = integers(-2, 3, shape).double()
        else:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.spread:
            values = values * 2.0 ** integers(-self.spread, self.spread + 1, plane)
        if self.dead:
            values = values * (integers(0, 3, plane) > 0)
        flat = values.contiguous().view(-1)
        for _ in range(self.bad if flat.numel() else 0):
            number = (torch.nan, torch.inf, -torch.inf)[int(integers(0, 3, (1,)))]
            flat[int(integers(0, flat.numel(), (1,)))] = number
        return flat.view(shape)

    def pairs(self) -> Tensor:
        """(G, N, M) float64 weights, 0 where there is no pair."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.groups, self.samples, self.samples if self.one_set else self.keys)
        if self.form == "pairwise":
            return torch.ones(shape, dtype=torch.float64)
        share = {"all": 1.0, "random": 0.5, "sparse": 0.15, "rows": 1.0, "none": 0.0}[self.mask]
        chosen = torch.rand(shape, generator=generator) < share
        if self.mask == "rows":
            chosen &= torch.rand(shape[:2], generator=generator)[..., None] < 0.5
        weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25
        return chosen * (weights if self.weighted else torch.ones_like(weights))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Of (G, N, C, H, W)."""
    kind = draw(st.sampled_from(("contiguous", "channels_last", "free", "expanded")))
    order = (0, 1, 3, 4, 2) if kind == "channels_last" else (0, 1, 2, 3, 4)
    if kind in ("contiguous", "channels_last"):
        return Layout(order, (1,) * 5, (0,) * 5, (0,) * 5)

    def five(low: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, 2), min_size=5, max_size=5)))

    expanded: tuple[int, ...] = ()
    if kind == "expanded":
        expanded = tuple(sorted(draw(st.sets(st.integers(0, 4), min_size=1, max_size=2))))
    order = tuple(draw(st.permutations(order)))
    return Layout(order, five(1), five(0), five(0), expanded)


CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 64, 65, 130)


@st.composite
def inputs(draw: st.DrawFn, *, small: bool = False, dtypes: tuple[str, ...]) -> Input:
    """`small`: what an interpreter can run in a second."""
    form: Form = draw(st.sampled_from(("pairwise", "set", "groups", "sets")))
    few = st.integers(0, 2 if small else 7)
    groups, samples, keys = draw(few), draw(few), draw(few)
    if form == "pairwise":
        samples = keys = 1
    elif form == "set":
        groups = 1
    if form in ("groups", "sets"):
        groups = min(groups, 3)
    channels = draw(st.sampled_from(CHANNELS[: 6 if small else None]))
    side = st.integers(1, 5 if small else 14)
    height, width = draw(side), draw(side)
    if not small and draw(st.integers(0, 30)) == 0:
        height, width = draw(st.integers(1, 3)), draw(st.integers(60, 300))
    window = (draw(st.integers(1, height)), draw(st.integers(1, width)))
    dtype = draw(st.sampled_from(dtypes))
    return Input(
        form=form,
        groups=groups,
        samples=samples,
        keys=keys,
        channels=channels,
        height=height,
        width=width,
        window=window,
        dtype=dtype,
        values=draw(st.sampled_from(("normal", "normal", "one-hot", "palette", "integers"))),
        spread=draw(st.sampled_from((0, 0, 3, 3 if dtype == "fp16" else 20))),
        dead=draw(st.sampled_from((False, False, True))),
        bad=draw(st.sampled_from((0,) * 8 + (1, 3))),
        eps=draw(st.sampled_from((1e-12, 1e-12, 1e-3, 1.5))),
        mask=draw(st.sampled_from(("all", "random", "sparse", "rows", "none"))),
        weighted=draw(st.booleans()),
        reduction=draw(st.sampled_from(("mean", "none"))),
        slack=draw(st.sampled_from((0, 0, 1, 5))),
        valid=draw(st.sampled_from((1.0, 1.0, 1.0, 0.8, 0.3))),
        threads=draw(st.sampled_from((1, 1, 1, 2, 3))),
        query_layout=draw(layouts()),
        key_layout=draw(layouts()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
