"""The plain-torch definition as a backend: runs on every device that torch has."""

from __future__ import annotations

from torch import Tensor

from ..reference import match, match_backward
from ..reference_contrast import window_lse, window_lse_backward

__all__ = [
    "match",
    "match_backward",
    "status",
    "why_not",
    "window_lse",
    "window_lse_backward",
]


def status() -> str | None:
    return None


def why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    return None
