"""Exact losses over samples that do not fit into memory at once (GradCache, Gao et al. 2021).

A contrastive loss over k batches is no mean of k losses. So a step first runs all k batches without
a graph and keeps what they hand to `distributed.gather`, then runs each again with a graph, where
`gather` completes it with the kept rows of the others. Each backward pass leaves the gradient by
way of its own rows, and their sum is the gradient of the loss over all. The price is a second
forward pass without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_active: Replay | None = None


def active() -> Replay | None:
    """The replay of the step in progress, if there is one."""
    return _active


class Replay:
    """What the k batches of a step handed to `gather`, call by call.

    rank: of this process. spread: gives the tensor of every process, in order of rank.
    """

    def __init__(self, rank: int, spread: Callable[[Tensor], list[Tensor]]) -> None:
        self.rank, self.spread = rank, spread
        self.kept: list[list[Tensor]] = []  # [place][call] -> (B, ...)
        self.everyone: dict[int, list[Tensor]] = {}  # call -> rows of batch rank · k + place
        self.place: int | None = None  # of the batch that is live; None while recording
        self.call = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within the block a batch runs without a graph, and its rows are kept."""
        self.kept.append([])
        with torch.no_grad(), self._active(None):
            yield

    @contextmanager
    def live(self, place: int) -> Iterator[None]:
        """Within the block the batch at this place runs again, beside the rows of the others."""
        with self._active(place):
            yield

    @contextmanager
    def _active(self, place: int | None) -> Iterator[None]:
        global _active
        self.place, self.call, _active = place, 0, self
        try:
            yield
        finally:
            _active = None

    def gather(self, local: Tensor) -> Tensor:
        """See `distributed.gather`."""
        if self.place is None:
            self.kept[-1].append(local.detach())
            return local
        rows = list(self._rows(self.call))
        self.call += 1
        rows[self.rank * len(self.kept) + self.place] = scale_gradient(local, len(rows))
        return torch.cat(rows)

    def _rows(self, call: int) -> list[Tensor]:
        if call not in self.everyone:
            own = torch.stack([rows[call] for rows in self.kept])
            self.everyone[call] = [row for rows in self.spread(own) for row in rows]
        return self.everyone[call]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: int) -> Tensor:
    """x, with its gradient times `factor`."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled
