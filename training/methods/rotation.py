"""Rotation (Gidaris et al., ICLR 2018): tell by how many quarter turns a slice was turned."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import Encoder, Projection, UNetConfig
from .base import Corpus, Method, Outcome, Views, side_by_side

TURNS = 4


class Rotation(Method):
    """Cross-entropy over the four turns (Eqs. 2 and 3 of Gidaris et al.).

    Changed: each of the 2n views is turned once, by a turn drawn so that all four are equally
    frequent, where RotNet shows all four turns of each image; so a step costs what it costs the
    other methods. The views carry the augmentation of all methods (up to 30° of rotation).
    """

    label: ClassVar[str] = "Rotation"
    curves: ClassVar[tuple[str, dict[str, str]]] = ("cross-entropy of the turns", {"loss": ""})
    pictured: ClassVar[str] = "two views each, as they were turned"

    def __init__(self, model: UNetConfig, settings: None, corpus: Corpus | None) -> None:
        super().__init__()
        self.encoder = Encoder(model)
        self.classifier: nn.Module = Projection(model.channels[-1], TURNS)

    def forward(self, views: Views) -> Outcome:
        turns = self.draw(views)
        maps = self.encoder(turn(views.images, turns))
        logits = self.classifier(maps[-1])
        loss = F.cross_entropy(logits.float(), turns)
        right = (logits.argmax(dim=1) == turns).float().mean()
        chance = loss.new_full((), math.log(TURNS))
        terms, kept = {"loss": loss, "accuracy": right}, {"encoder": maps[-1].detach()}
        return Outcome(loss, terms, kept, {"loss": chance})

    def draw(self, views: Views) -> Tensor:
        """Turns of the 2n views, (2n,) int64 from 0 to 3, each as often as the others."""
        count, device = len(views.images), views.images.device
        drawn = torch.randperm(count, device=device, generator=views.generator) % TURNS
        return side_by_side(drawn)

    def pictures(self, views: Views) -> list[Tensor]:
        return [*turn(views.images, self.draw(views))]


def turn(images: Tensor, turns: Tensor) -> Tensor:
    """Each square image (B, C, N, N) by its number (B,) of counter-clockwise quarter turns."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(TURNS)])
    picked = turned[turns, torch.arange(len(images), device=images.device)]
    return picked.contiguous(memory_format=torch.channels_last)
