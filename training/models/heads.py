"""Heads that pre-training puts on the encoder and fine-tuning throws away."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

EmbeddingKind = Literal["linear", "normalised", "orthogonal", "none"]


class Embedding(nn.Module):
    """E of the paper (Sec. 2.1): (B, C, H, W) -> (B, dim, H, W), linear per pixel.

    `linear` is the paper's trainable layer. Nothing in Eq. 1 pushes features apart, so it can map
    every pixel to one direction and bring the loss to 0 without the encoder learning anything;
    `orthogonal` (a fixed random rotation or projection) and `none` (the encoder's own features)
    leave that way closed. `normalised` is `linear` with kernels of unit norm: they cannot shrink,
    but can still all become alike.
    """

    def __init__(self, kind: EmbeddingKind, channels: int, dim: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "none":
            self.layer: nn.Module = nn.Identity()
            return
        self.layer = nn.Conv2d(channels, dim, 1, bias=False)
        if kind == "normalised":
            weight_norm(self.layer)
            for name, magnitude in self.layer.named_parameters():
                if name.endswith("original0"):
                    magnitude.requires_grad_(False).fill_(1.0)
        if kind == "orthogonal":
            nn.init.orthogonal_(self.layer.weight)
            self.layer.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


class Projection(nn.Module):
    """Global average pooling and a linear layer (Sec. 2.3): (B, C, H, W) -> (B, dim).

    hidden: put a hidden layer of C units and a ReLU before it, as SimCLR does.
    """

    def __init__(self, channels: int, dim: int, *, hidden: bool = False) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(channels, dim)
        if hidden:
            self.layer = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), self.layer)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features.mean(dim=(2, 3)))
