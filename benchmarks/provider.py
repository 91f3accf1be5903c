"""What a provider of the loss is, and the layouts that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from .cases import Case, Problem

Run = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Provider:
    """A way to compute the loss.

    Args:
        name: as in tables and on the command line.
        run: the loss of a problem, a scalar.
        package: the module that has to be installed, "" for none.
        has_backward: whether it has a gradient at all.
        builds: it compiles for the shape on the first call, which must not be measured.
        eager_windows: it needs windows that divide the map.
        reason: why it cannot run on this machine whatever the input, if so.
    """

    name: str
    run: Run
    package: str = ""
    has_backward: bool = True
    builds: bool = False
    eager_windows: bool = True
    reason: str | None = None

    def refuses(self, case: Case) -> str | None:
        """Why it cannot run this case, as far as that is known without trying."""
        if self.reason is not None:
            return self.reason
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.eager_windows and (case.height % case.window or case.width % case.window):
            return f"needs windows that divide the map, got {case.window}"
        return None


def widen(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32, in which every provider accumulates by contract."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_windows(x: Tensor, window: int) -> Tensor:
    """(N, C, H, W) -> (N, T, L, C), a contiguous copy."""
    count, channels, height, width = x.shape
    split = x.reshape(count, channels, height // window, window, width // window, window)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, window * window, channels)
