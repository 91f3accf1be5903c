"""What torch's own part of a call costs, however little one's own code does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

P, SIDE = 112, 4


class Trivial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty((P,))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return GRAD


class Scalar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return SCALAR.view(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return GRAD


GRAD = torch.zeros(16, 8, 4, 4)
SCALAR = torch.zeros(())


def floors() -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.zeros(16, 8, 4, 4)
    leaf = torch.zeros(16, 8, 4, 4, requires_grad=True)
    losses = torch.zeros(P)

    yield "floor 4 empty", lambda: [x.new_empty((P, 4, 4)) for _ in range(4)]
    yield "floor mean", lambda: losses.mean()
    yield "floor Function+mean", lambda: torch.autograd.grad(Trivial.apply(leaf).mean(), leaf)
    yield "floor Function scalar", lambda: torch.autograd.grad(Scalar.apply(leaf), leaf)
    yield "floor Function forward", lambda: Scalar.apply(leaf)
    yield "floor torch op", lambda: torch.autograd.grad(leaf.sum(), leaf)
