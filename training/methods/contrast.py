"""What the contrastive methods share: encoder, pooled and projected features, InfoNCE."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from salkernels import gp_loss

from ..distributed import gather
from ..models import Encoder, Projection, UNetConfig
from ..transfer import to_device
from .base import Corpus, Method, Outcome, Views

# One head for all contrastive methods, or a comparison would be one of heads: the MLP of SimCLR,
# which the public code of PCL gives its SimCLR, GCL and PCL. "linear" is the text of the SAL paper
# (Sec. 2.3).
Head = Literal["linear", "mlp"]


@dataclass
class ContrastConfig:
    """Settings of a contrastive method.

    Args:
        temperature: τ, which divides cosines before the exponential.
        projection: head after average pooling: "linear", or "mlp" with one hidden layer.
        projection_dim: length of the projected vector.
        loss_scale: factor on the loss. The public code of PCL has τ / 0.07, 1.43 at τ = 0.1: under
            SGD a factor on the learning rate of everything but weight decay.
    """

    temperature: float = 0.1
    projection: Head = "mlp"
    projection_dim: int = 128
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        check_head(self.projection)
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be >= 1, got {self.projection_dim}")
        if not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale must be a finite number > 0, got {self.loss_scale}")


class Contrastive(Method):
    """Pulls together the embeddings of samples that a method calls positives.

    Under several processes the samples of all of them are contrasted.
    """

    def __init__(self, model: UNetConfig, settings: ContrastConfig, corpus: Corpus | None) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(model)
        self.projection = Projection(
            model.channels[-1], settings.projection_dim, hidden=settings.projection == "mlp"
        )

    def forward(self, views: Views) -> Outcome:
        maps = self.encoder(views.images)
        embeddings = gather(self.projection(maps[-1]))
        samples = gather(views.sample), gather(views.position)  # on the CPU, as the positives
        scale = self.settings.loss_scale
        loss = scale * self.contrast(embeddings, *samples)
        chance = scale * self.contrast(alike(embeddings), *samples)
        return Outcome(loss, {"loss": loss}, {"encoder": maps[-1].detach()}, {"loss": chance})

    def contrast(self, embeddings: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """The loss of embeddings (S, D) of the samples of all processes.

        sample, position: (S,), on the CPU.
        """
        positives = to_device(self.positives(sample, position), embeddings.device)
        return gp_loss(embeddings, positives, self.settings.temperature)

    @abstractmethod
    def positives(self, sample: Tensor, position: Tensor) -> Tensor:
        """(S, S) bool: which samples attract each other; the diagonal is ignored."""


def check_head(projection: str) -> None:
    """Raises a ValueError where there is no such head."""
    if projection not in get_args(Head):
        raise ValueError(f"projection must be one of {', '.join(get_args(Head))}, got {projection}")


def alike(embeddings: Tensor) -> Tensor:
    """As many embeddings (S, 1), all the same: what a loss makes of them is its chance level."""
    return torch.ones_like(embeddings[:, :1], requires_grad=False)
