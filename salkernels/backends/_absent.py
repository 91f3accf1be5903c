"""A backend that cannot run on any input: it keeps its place in the order and says why."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


class Absent:
    """Stands for a backend that is not here, with the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def status(self) -> str | None:
        return self._reason

    def can_run(self, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
        return self._reason

    def pair_losses_forward(self, *_: object) -> NoReturn:
        raise RuntimeError(self._reason)

    def pair_losses_backward(self, *_: object) -> NoReturn:
        raise RuntimeError(self._reason)
