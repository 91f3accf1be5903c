"""PIRL (Misra and van der Maaten, CVPR 2020): a slice and its jigsaw have the same features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distributed import gather
from ..models import Encoder, Projection, UNetConfig
from ..transfer import to_device
from .base import Corpus, Method, Outcome, Run, Views, first, full_precision, second

GRID = 3  # the jigsaw has 3 x 3 pieces


@dataclass
class PIRLConfig:
    """Settings of PIRL.

    Args:
        temperature: τ, which divides cosines before the exponential.
        weight: λ in Eq. 5 of Misra and van der Maaten, the weight of the jigsaw's loss; that of
            the slice itself is 1 − λ.
        momentum: of the memory bank: the share of the old entry in the new one.
        negatives: entries of the bank contrasted with each slice, at most all others.
        projection_dim: length of the projected vector.
    """

    temperature: float = 0.07
    weight: float = 0.5
    momentum: float = 0.5
    negatives: int = 1024
    projection_dim: int = 128

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"pirl.temperature must be > 0, got {self.temperature}")
        for name in ("weight", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"pirl.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.negatives < 1 or self.projection_dim < 1:
            raise ValueError(
                f"pirl.negatives and pirl.projection_dim must be >= 1, got {self.negatives} and "
                f"{self.projection_dim}"
            )


class PIRL(Method):
    """Two heads, f for slices and g for jigsaws, and a bank with the running f of every slice.

    Changed: 1,024 negatives where the paper has 32,000 of a million images; the first view is the
    slice and the second is cut into the jigsaw; pieces are as large as the encoder's stride allows.
    """

    label: ClassVar[str] = "PIRL"
    Settings: ClassVar[type[Any]] = PIRLConfig
    curves: ClassVar[tuple[str, dict[str, str]]] = (
        "noise-contrastive losses",
        {"loss": "total", "jigsaw": "jigsaw", "slice": "slice itself"},
    )
    pictured: ClassVar[str] = "one view whole and one in pieces"
    bank: Tensor
    seen: Tensor

    def __init__(self, model: UNetConfig, settings: PIRLConfig, corpus: Corpus) -> None:
        super().__init__()
        self.settings = settings
        self.stride = model.stride
        self.encoder = Encoder(model)
        channels, dim = model.channels[-1], settings.projection_dim
        self.slice_head = Projection(channels, dim)
        self.piece_head: nn.Module = Projection(channels, dim)
        self.jigsaw_head = nn.Linear(GRID**2 * dim, dim)
        bank = F.normalize(torch.randn(corpus.num_samples, dim), dim=1)
        self.register_buffer("bank", bank)
        self.register_buffer("seen", corpus.samples, persistent=False)

    @classmethod
    def check(cls, settings: Any, run: Run) -> None:
        piece_side(run.crop, run.model.stride)

    def forward(self, views: Views) -> Outcome:
        # Copies: every other image of a batch is no layout that convolutions like.
        whole, cut = (
            view(views.images).contiguous(memory_format=torch.channels_last)
            for view in (first, second)
        )
        own_sample = first(views.sample).contiguous()
        sample = to_device(own_sample, whole.device)
        maps = self.encoder(whole)
        f = F.normalize(self.slice_head(maps[-1]).float(), dim=1)
        g = F.normalize(self.jigsaw(cut, views.generator).float(), dim=1)

        own, negatives = self.bank[sample], self.bank[self.draw(sample, views.generator)]
        temperature, weight = self.settings.temperature, self.settings.weight
        jigsaw = nce(own, g, negatives, temperature).mean()
        identity = nce(own, f, negatives, temperature).mean()
        loss = weight * jigsaw + (1 - weight) * identity
        self.remember(gather(own_sample), gather(f.detach()))
        terms = {"loss": loss, "jigsaw": jigsaw, "slice": identity}
        # As if the bank held the same vector everywhere.
        same = self.bank[:1].expand(len(f), -1)
        level = nce(same, same, self.bank[:1].expand(negatives.shape), temperature).mean()
        chance = dict.fromkeys(terms, level)
        return Outcome(loss, terms, {"encoder": maps[-1].detach()}, chance)

    def jigsaw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Projected features (n, D) of shuffled pieces of images (n, 1, H, W)."""
        parts = self.shuffled(images, generator).flatten(0, 1)
        parts = parts.contiguous(memory_format=torch.channels_last)
        features = self.piece_head(self.encoder(parts)[-1])
        return self.jigsaw_head(features.view(len(images), -1))

    def shuffled(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The pieces of images (n, 1, H, W), in an order of each image's own: (n, 9, 1, N, N)."""
        count, places = len(images), GRID**2
        parts = pieces(images, self.stride)
        order = torch.rand(count, places, device=images.device, generator=generator).argsort(dim=1)
        rows = torch.arange(count, device=images.device)[:, None]
        return parts[rows, order]

    def pictures(self, views: Views) -> list[Tensor]:
        whole, cut = first(views.images), second(views.images)
        parts = F.pad(self.shuffled(cut, views.generator), (1, 1, 1, 1), value=float(cut.min()))
        n, _, channels, side, _ = parts.shape
        grid = parts.view(n, GRID, GRID, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        shown = grid.reshape(n, channels, GRID * side, GRID * side)
        return [picture for pair in zip(whole, shown, strict=True) for picture in pair]

    def draw(self, sample: Tensor, generator: torch.Generator) -> Tensor:
        """(n, N) entries of the bank that are not the sample's own, each with equal chance.

        Slices that pre-training does not see have entries too, but random ones.
        """
        total = len(self.seen)
        shape = (len(sample), min(self.settings.negatives, total - 1))
        steps = torch.randint(1, total, shape, device=sample.device, generator=generator)
        place = torch.searchsorted(self.seen, sample)
        return self.seen[(place[:, None] + steps) % total]

    @torch.no_grad()
    def remember(self, sample: Tensor, features: Tensor) -> None:
        """Moves the bank's entries towards the features (a running average, Sec. 3.2 of the paper).

        sample: (n,), on the CPU. features: (n, D).

        A slice that a batch holds several times moves towards the mean of its features: written
        one by one, which of them stays would be chance.
        """
        keep = self.settings.momentum
        distinct = sample.unique()
        holds = to_device((distinct[:, None] == sample[None, :]).float(), features.device)
        entries = to_device(distinct, features.device)
        with full_precision(features.device):
            means = holds @ features / holds.sum(dim=1, keepdim=True)
        mixed = keep * self.bank[entries] + (1 - keep) * means
        self.bank[entries] = F.normalize(mixed, dim=1)


def pieces(images: Tensor, stride: int) -> Tensor:
    """The 3 x 3 pieces (B, 9, C, N, N) of images (B, C, H, W), row by row; N is a multiple of
    `stride`, and each piece is in the centre of its third."""
    height, width = images.shape[2:]
    side = piece_side(min(height, width), stride)
    cut = []
    for row in range(GRID):
        for column in range(GRID):
            top = (2 * row + 1) * height // (2 * GRID) - side // 2
            left = (2 * column + 1) * width // (2 * GRID) - side // 2
            cut.append(images[:, :, top : top + side, left : left + side])
    return torch.stack(cut, dim=1)


def piece_side(side: int, stride: int) -> int:
    """Side of a piece of an image of this side, for an encoder of this stride."""
    if side < GRID * stride:
        raise ValueError(
            f"a jigsaw of {GRID} x {GRID} pieces needs images of at least {GRID * stride} pixels "
            f"for an encoder of stride {stride}, got {side}; raise crop or lower model.depth"
        )
    return side // GRID // stride * stride


def nce(own: Tensor, features: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    r"""Eq. 4 of the paper: −log h(own) − Σ_j log(1 − h(negative_j)), per row.

    h is the softmax of cosines / τ over the own entry and the negatives. Everything has unit norm.
    own: (B, D). features: (B, D). negatives: (B, N, D). Returns (B,).
    """
    candidates = torch.cat((own[:, None], negatives), dim=1)
    with full_precision(features.device):
        scores = torch.einsum("bnd,bd->bn", candidates, features)
    log_h = (scores / temperature).log_softmax(dim=1)
    # log(1 − h) as log1p(−exp(log h)); a negative that takes all of h would give −inf.
    others = torch.log1p(-log_h[:, 1:].exp().clamp_max(1 - 1e-6)).sum(dim=1)
    return -(log_h[:, 0] + others)
