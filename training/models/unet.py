"""A 2D U-Net in the shape of the positional contrastive learning line of work.

Five levels by default; two convolution-norm-LeakyReLU blocks per level; max pooling down,
transposed convolutions up. Ronneberger et al., MICCAI 2015; Zeng et al., MICCAI 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

SLOPE = 0.01  # of LeakyReLU, and so of the initialisation


@dataclass
class UNetConfig:
    """Size of the U-Net.

    Args:
        in_channels: channels of a slice (1 for MR and CT).
        width: channels of the first level; each level down doubles them.
        depth: number of levels, the bottleneck included.
        norm: "batch" as in the PCL line, or "instance" for very small batches.
        bottleneck: "norm", the deepest level is like the others; or "plain", convolutions and ReLU
            without a norm, as in the public code of PCL.
    """

    in_channels: int = 1
    width: int = 16
    depth: int = 5
    norm: Literal["batch", "instance"] = "batch"
    bottleneck: Literal["norm", "plain"] = "norm"

    def __post_init__(self) -> None:
        for name in ("in_channels", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.depth < 2:
            raise ValueError(f"model.depth must be at least 2 levels, got {self.depth}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from the input resolution down."""
        return tuple(self.width * 2**level for level in range(self.depth))

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the deepest level: inputs must be a multiple of it."""
        return int(2 ** (self.depth - 1))


class Encoder(nn.Module):
    """The contracting path: (B, in_channels, H, W) -> one map per scale.

    Scale s (counted from 1) has `width · 2^(s−1)` channels and 1 / 2^(s−1) of the resolution: scale
    4, which the paper uses for the alignment loss, is at 1/8.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        ins = (config.in_channels, *config.channels[:-1])
        norms: list[str] = [config.norm] * (config.depth - 1)
        norms.append(config.norm if config.bottleneck == "norm" else "plain")
        self.levels = nn.ModuleList(
            _double_conv(*level) for level in zip(ins, config.channels, norms, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of scales 1 to depth."""
        stride = self.config.stride
        if x.shape[-2] % stride or x.shape[-1] % stride:
            raise ValueError(
                f"a U-Net of {self.config.depth} levels needs height and width that are multiples "
                f"of {stride}, got {tuple(x.shape[-2:])}; pad or crop the slices"
            )
        maps: list[Tensor] = []
        for level in self.levels:
            x = level(self.pool(maps[-1]) if maps else x)
            maps.append(x)
        return maps


class Decoder(nn.Module):
    """The expanding path: the encoder's maps -> (B, classes, H, W) logits."""

    def __init__(self, config: UNetConfig, classes: int) -> None:
        super().__init__()
        channels = config.channels
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels[level + 1], channels[level], 2, stride=2)
            for level in reversed(range(config.depth - 1))
        )
        self.levels = nn.ModuleList(
            _double_conv(2 * channels[level], channels[level], config.norm)
            for level in reversed(range(config.depth - 1))
        )
        self.head = nn.Conv2d(channels[0], classes, 1)
        self.apply(_initialise)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for up, level, skip in zip(self.up, self.levels, reversed(maps[:-1]), strict=True):
            x = level(torch.cat((up(x), skip), dim=1))
        return self.head(x)


class UNet(nn.Module):
    """Encoder and decoder: (B, in_channels, H, W) -> (B, classes, H, W) logits."""

    def __init__(self, config: UNetConfig, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a segmentation needs at least 2 classes, got {classes}")
        self.config = config
        self.classes = classes
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def _double_conv(ins: int, outs: int, norm: str) -> nn.Sequential:
    layer = nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d
    blocks: list[nn.Module] = []
    if norm == "plain":
        for i in (ins, outs):
            blocks += [nn.Conv2d(i, outs, 3, padding=1), nn.ReLU(inplace=True)]
        return nn.Sequential(*blocks)
    for i in (ins, outs):
        # No bias: the norm that follows would subtract it again.
        blocks += [nn.Conv2d(i, outs, 3, padding=1, bias=False), layer(outs, affine=True)]
        blocks += [nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*blocks)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
