"""The plain-torch definition as a backend: runs on every device that torch has."""

from __future__ import annotations

from torch import Tensor

from ..reference import pair_losses_backward, pair_losses_forward

__all__ = ["can_run", "pair_losses_backward", "pair_losses_forward", "status"]


def status() -> str | None:
    return None


def can_run(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    return None
