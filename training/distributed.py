"""One process, or one of many that `torchrun` started."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(local: Tensor) -> Tensor:
    """The rows of all processes: (B, ...) -> (world · B, ...), with gradient to each one's own."""
    return local


def share(count: Tensor) -> Tensor:
    """Factor that turns a mean over this process's `count` terms into its part of the mean over
    the terms of all processes, where gradients are averaged over processes."""
    return torch.ones((), device=count.device)
