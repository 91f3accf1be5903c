"""What every pre-training method offers to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ..models import Encoder


class Views(NamedTuple):
    """The 2n augmented samples of a step: both views of n slices, on the training device."""

    images: Tensor  # (2n, 1, H, W)
    volume: Tensor  # (2n,) int64
    slice_index: Tensor  # (2n,) int64
    num_slices: Tensor  # (2n,) int64


@dataclass
class Outcome:
    """Result of one step: the loss to minimise, its named terms, and maps kept for monitoring."""

    loss: Tensor
    terms: dict[str, Tensor]
    maps: dict[str, Tensor] = field(default_factory=dict)  # detached


class Method(nn.Module, ABC):
    """A pre-training method: an encoder, whatever heads it needs, and a loss."""

    encoder: Encoder

    @abstractmethod
    def forward(self, views: Views) -> Outcome:
        """The loss of one batch."""

    def monitor(self, views: Views, outcome: Outcome) -> dict[str, float]:
        """Extra figures, computed now and then, that tell whether the method still learns."""
        return {}

    def warnings(self, history: list[dict[str, float]]) -> dict[str, str]:
        """What the monitored figures so far give reason to warn about: kind -> sentence."""
        return {}
