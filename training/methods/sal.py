"""SAL (Li, Ouyang and Wan, ISBI 2024): global positional loss and window-based local alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from salkernels import SALLoss, positional_positives, slice_pairs, wla_set_loss

from ..models import Embedding, EmbeddingKind, Encoder, Projection, UNetConfig
from .base import Method, Outcome, Views

COSINE_LIMIT = 0.9  # mean cosine of arbitrary pixels above which features count as collapsed
# A fall of LA on pairs of different scans to this share of the untrained network's is suspicious.
# With a trainable E on ACDC it falls to 0.01; without E, where nothing collapses, single batches of
# a phantom fall to 0.5.
FALL = 0.25


@dataclass
class SALConfig:
    """Settings of SAL; Greek letters as in the paper.

    Args:
        window_size: ω, side of a window in pixels of the feature map.
        scale: s, the encoder's level whose map LA acts on; 4 is at 1/8 of the input resolution.
        lambda_: λ, weight of LA; 0 leaves the positional loss alone, which is PCL.
        t: threshold of both losses as a fraction of the scan.
        temperature: τ of the positional loss.
        embedding: E before LA: "linear" (the paper), "orthogonal" (fixed), or "none".
        embedding_dim: channels after E; 0 keeps those of the encoder's map.
        projection_dim: length of the global feature vector.
    """

    window_size: int = 2
    scale: int = 4
    lambda_: float = 1.0
    t: float = 0.35
    temperature: float = 0.1
    embedding: EmbeddingKind = "linear"
    embedding_dim: int = 0
    projection_dim: int = 128

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"sal.scale counts from 1, got {self.scale}")
        if self.embedding_dim < 0 or self.projection_dim < 1:
            raise ValueError(
                "sal.embedding_dim must be >= 0 and sal.projection_dim >= 1, got "
                f"{self.embedding_dim} and {self.projection_dim}"
            )
        # The public losses check ω, λ, t and τ: let them do so before anything is loaded.
        self.loss()

    def loss(self) -> SALLoss:
        return SALLoss(
            self.window_size, lambda_=self.lambda_, t=self.t, temperature=self.temperature
        )


class SAL(Method):
    """Encoder, embedding E for LA at scale s, projection for GP at the deepest scale."""

    def __init__(self, model: UNetConfig, config: SALConfig) -> None:
        super().__init__()
        if config.scale > model.depth:
            raise ValueError(
                f"sal.scale is {config.scale}, but the encoder has {model.depth} levels; "
                f"use a scale of 1 to {model.depth}"
            )
        self.config = config
        self.encoder = Encoder(model)
        channels = model.channels[config.scale - 1]
        self.embedding = Embedding(config.embedding, channels, config.embedding_dim or channels)
        self.projection = Projection(model.channels[-1], config.projection_dim)
        self.loss = config.loss()

    def forward(self, views: Views) -> Outcome:
        maps = self.encoder(views.images)
        features = maps[self.config.scale - 1]
        embedded = self.embedding(features)
        terms = self.loss(
            embedded, self.projection(maps[-1]), views.volume, views.slice_index, views.num_slices
        )
        return Outcome(
            terms.loss,
            {"loss": terms.loss, "gp": terms.gp, "la": terms.la},
            {"encoder": features.detach(), "embedding": embedded.detach()},
        )

    @torch.no_grad()
    def monitor(self, views: Views, outcome: Outcome) -> dict[str, float]:
        """LA on true pairs and, as a control, on pairs of different scans; how alike pixels are."""
        volume, index, depth = views.volume, views.slice_index, views.num_slices
        pairs = slice_pairs(volume, index, depth, self.config.t)
        near = positional_positives(index.double() / depth, self.config.t)
        control = near & (volume[:, None] != volume[None, :])
        embedded, window = outcome.maps["embedding"], self.config.window_size
        return {
            "la_pairs": wla_set_loss(embedded, pairs, window).item(),
            "la_control": wla_set_loss(embedded, control, window).item(),
            "cosine_embedding": mean_cosine(embedded).item(),
            "cosine_encoder": mean_cosine(outcome.maps["encoder"]).item(),
        }

    def warnings(self, history: list[dict[str, float]]) -> dict[str, str]:
        if not history or self.config.lambda_ == 0:
            return {}
        first, last = history[0], history[-1]
        advice = "try a smaller sal.lambda_"
        if self.config.embedding == "linear":
            advice = "try sal.embedding=orthogonal or none, or a smaller sal.lambda_"
        found = {}
        for what in ("embedding", "encoder"):
            if last[f"cosine_{what}"] > COSINE_LIMIT:
                found[f"collapsed {what}"] = (
                    f"the {what}'s pixels have collapsed to one direction (mean cosine "
                    f"{last[f'cosine_{what}']:.2f} > {COSINE_LIMIT}): a low LA no longer means "
                    f"alignment; {advice}"
                )
        if all(last[key] < FALL * first[key] for key in ("la_control", "la_pairs")):
            found["control falls"] = (
                f"LA on slices of different scans fell from {first['la_control']:.3f} to "
                f"{last['la_control']:.3f} along with LA on true pairs ({first['la_pairs']:.3f} "
                f"to {last['la_pairs']:.3f}): features grow alike everywhere; {advice}"
            )
        return found


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine over all pairs of different pixels of (S, C, H, W), without forming the pairs."""
    unit = F.normalize(features.float(), dim=1)
    total = unit.sum(dim=(0, 2, 3))
    count = unit.shape[0] * unit.shape[2] * unit.shape[3]
    return (total.square().sum() - unit.square().sum()) / (count * (count - 1))
