"""What the counts run: both passes of a backend on an emulator, and the counters that they fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from salkernels.reference import Outputs

EPS = 1e-12


class Passes(NamedTuple):
    """Forward and backward of a backend; `stats` gains one entry for each kernel launched.

    `forward(features, pairs, window)` returns the outputs of the operator;
    `backward(grad_sim, features, pairs, window, outputs)` the gradient of the features.
    """

    stats: list[Any]
    forward: Callable[[Tensor, Tensor, tuple[int, int]], Outputs]
    backward: Callable[[Tensor, Tensor, Tensor, tuple[int, int], Outputs], Tensor]
