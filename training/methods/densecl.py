"""DenseCL (Wang et al., CVPR 2021): pixels attract their match in the other view of the slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salkernels import align, match_pixels

from ..distributed import gather
from ..models import UNetConfig
from ..transfer import to_device
from .base import Corpus, Outcome, Views, full_precision
from .contrast import ContrastConfig, alike
from .simclr import SimCLR


@dataclass
class DenseCLConfig(ContrastConfig):
    """Settings of DenseCL.

    Args:
        weight: λ in Eq. 3 of Wang et al., the weight of the dense loss; the global one has 1 − λ.
        scale: the encoder's level whose pixels are contrasted, from 1; 0, as in the paper, is the
            deepest.
    """

    temperature: float = 0.2
    weight: float = 0.5
    scale: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ValueError(f"densecl.weight must be in [0, 1], got {self.weight}")
        if self.scale < 0:
            raise ValueError(f"densecl.scale must be >= 0, got {self.scale}")


class DenseCL(SimCLR):
    """The loss of SimCLR on slices, and an InfoNCE on pixels (Eq. 2 of Wang et al.).

    A pixel's positive is the pixel of the other view that is most similar by the encoder's own
    features (Sec. 3.4 of the paper): this package's match, with one window that covers the map.
    Changed: no momentum encoder and no queue, as in SimCLR here. Keys are those of the batch, and
    get a gradient; negatives are the pooled dense vectors of all other slices in it.
    """

    label: ClassVar[str] = "DenseCL"
    Settings: ClassVar[type[Any]] = DenseCLConfig
    curves: ClassVar[tuple[str, dict[str, str]]] = (
        "InfoNCE",
        {"loss": "total", "global": "slices", "dense": "pixels"},
    )
    settings: DenseCLConfig

    def __init__(self, model: UNetConfig, settings: DenseCLConfig, corpus: Corpus | None) -> None:
        super().__init__(model, settings, corpus)
        self.scale = settings.scale or model.depth
        if self.scale > model.depth:
            raise ValueError(
                f"densecl.scale is {settings.scale}, but the encoder has {model.depth} levels; use "
                f"a scale of 1 to {model.depth}, or 0 for the deepest"
            )
        channels = model.channels[self.scale - 1]
        last = nn.Conv2d(channels, settings.projection_dim, 1)
        self.dense: nn.Module = last
        if settings.projection == "mlp":
            self.dense = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ReLU(), last)

    def forward(self, views: Views) -> Outcome:
        weight, scale = self.settings.weight, self.settings.loss_scale
        maps = self.encoder(views.images)
        features = maps[self.scale - 1]
        sample = gather(views.sample)
        embeddings = gather(self.projection(maps[-1]))
        # As the slices, pixels of all processes are contrasted: the same number on each of them.
        pixels, match = gather(self.dense(features)), gather(matches(features.detach()))

        def losses(embeddings: Tensor, pixels: Tensor) -> dict[str, Tensor]:
            whole = self.contrast(embeddings, sample, sample)
            dense = dense_loss(pixels, match, sample, self.settings.temperature)
            both = scale * ((1 - weight) * whole + weight * dense)
            return {"loss": both, "global": whole, "dense": dense}

        terms = losses(embeddings, pixels)
        chance = losses(alike(embeddings), alike(pixels))
        return Outcome(
            terms["loss"], terms, {"encoder": features.detach()}, chance, deepest=maps[-1].detach()
        )


def other_view(x: Tensor) -> Tensor:
    """Of samples (2n, ...) in the order of `Views` the other view of each: (2n, ...)."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


@torch.no_grad()
def matches(features: Tensor) -> Tensor:
    """Which pixel of the other view is most similar to each pixel of features (2n, C, H, W).

    (2n, H · W) int64, row by row.
    """
    window = features.shape[2:]
    found = align(features, other_view(features), (window[0], window[1]))
    row, column = match_pixels(found.argmax, (window[0], window[1]))
    return (row * window[1] + column).flatten(1)


def dense_loss(pixels: Tensor, match: Tensor, sample: Tensor, temperature: float) -> Tensor:
    r"""Mean over all pixels of −log e^{r·t/τ} / (e^{r·t/τ} + Σ_k e^{r·k/τ}) (Eq. 2).

    r is a pixel's vector and t that of its match in the other view, both of unit norm; k are the
    means of the vectors of each view of another slice, of unit norm.

    pixels: (2n, D, H, W). match: (2n, H · W), from `matches`. sample: (2n,), on the CPU.
    """
    with full_precision(pixels.device):
        wide = pixels.float()
        queries = F.normalize(wide, dim=1).flatten(2)
        keys = F.normalize(wide.mean(dim=(2, 3)), dim=1)
        place = match[:, None].expand_as(queries)
        positives = (queries * other_view(queries).gather(2, place)).sum(dim=1) / temperature
        scores = torch.einsum("sdp,kd->spk", queries, keys) / temperature
    same = to_device(sample[:, None] == sample[None, :], pixels.device)
    negatives = scores.masked_fill(same[:, None], -torch.inf).logsumexp(dim=2)
    # −log of the fraction is softplus(negatives − positive), exact also without negatives.
    return F.softplus(negatives - positives).mean()
