"""What torch's own part of a call costs, however little one's own code does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PAIRS = 112


class Losses(torch.autograd.Function):
    """A number for each pair: the mean is a node of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty((PAIRS,))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.needs_input_grad[0] and ZEROS


class Mean(torch.autograd.Function):
    """One number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.needs_input_grad[0] and ZEROS


ZEROS = torch.zeros(16, 8, 4, 4)


def floors() -> Iterator[tuple[str, Callable[[], object]]]:
    leaf, losses = torch.zeros_like(ZEROS).requires_grad_(), torch.zeros(PAIRS)

    def both(of: type[torch.autograd.Function]) -> object:
        loss = of.apply(leaf)
        return torch.autograd.grad(loss if loss.dim() == 0 else loss.mean(), leaf)

    yield "floor: four allocations", lambda: [leaf.new_empty((PAIRS, 4, 4)) for _ in range(4)]
    yield "floor: mean", lambda: losses.mean()
    yield "floor: function forward", lambda: Mean.apply(leaf)
    yield "floor: function both", lambda: both(Mean)
    yield "floor: function and mean, both", lambda: both(Losses)
    yield "floor: sum of torch's own, both", lambda: torch.autograd.grad(leaf.sum(), leaf)
