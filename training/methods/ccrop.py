"""ContrastiveCrop (Peng et al., CVPR 2022): SimCLR on crops around what the network looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distributed import broadcast, is_main
from ..models import UNetConfig
from .base import Corpus
from .contrast import ContrastConfig
from .simclr import SimCLR

BATCH = 64  # slices per forward pass when the boxes are found
TRIES = 32  # draws for each number, of which at least half are accepted


@dataclass
class CCropConfig(ContrastConfig):
    """Settings of ContrastiveCrop.

    Args:
        threshold: k, the share of the largest activation above which a pixel is in the box.
        alpha: α of the Beta distribution of the crop's centre in the box; below 1 it is U-shaped,
            so that centres keep away from the middle and two crops differ. At most 1, uniform.
        updates: how often, evenly over training, the boxes are found anew; before the first time
            a box is the whole slice.
    """

    threshold: float = 0.1
    alpha: float = 0.6
    updates: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"ccrop.threshold must be in [0, 1), got {self.threshold}")
        if (
            not 0 < self.alpha <= 1
        ):  # above 1 the rejection in symmetric_beta would take ever longer
            raise ValueError(f"ccrop.alpha must be in (0, 1], got {self.alpha}")
        if self.updates < 0:
            raise ValueError(f"ccrop.updates must be >= 0, got {self.updates}")


class CCrop(SimCLR):
    """Semantic-aware localisation and centre-suppressed sampling: Secs. 3.2 and 3.3 of Peng et al.

    Changed: only the centre of a crop comes from the box; its size and rotation are those of all
    methods here. A crop is a large part of a slice (96 of 128 pixels on the desk), so the box is
    first cut to the centres for which the crop lies on the slice, as in the published code, or to
    the largest shift of the augmentation where that is more.
    """

    label: ClassVar[str] = "CCrop"
    Settings: ClassVar[type[Any]] = CCropConfig
    settings: CCropConfig
    boxes: Tensor

    def __init__(self, model: UNetConfig, settings: CCropConfig, corpus: Corpus) -> None:
        super().__init__(model, settings, corpus)
        whole = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # left, top, right, bottom; 1: half the slice
        self.register_buffer("boxes", whole.repeat(corpus.num_samples, 1))

    def before_step(self, step: int, steps: int, corpus: Corpus) -> None:
        rounds = self.settings.updates + 1
        due = {steps * k // rounds for k in range(1, rounds)}
        if step > 0 and step in due:
            # Batch statistics, and so heat maps, may differ between processes; boxes must not.
            if is_main():
                self.localise(corpus)
            broadcast(self.boxes)

    @torch.no_grad()
    def localise(self, corpus: Corpus) -> None:
        """Finds the box of every slice from the encoder's present heat map."""
        training = self.training
        self.eval()
        for samples in corpus.samples.split(BATCH):
            images = fit_stride(corpus.canvases(samples), self.encoder.config.stride)
            heat = self.encoder(images.to(self.boxes.device))[-1].sum(dim=1)
            self.boxes[samples.to(self.boxes.device)] = heat_boxes(heat, self.settings.threshold)
        self.train(training)

    def centres(self, sample: Tensor, room: float, generator: torch.Generator) -> Tensor:
        boxes = self.boxes[sample].clamp(-room, room)
        low, high = boxes[:, :2], boxes[:, 2:]
        return low + (high - low) * symmetric_beta(low, self.settings.alpha, generator)


def fit_stride(images: Tensor, stride: int) -> Tensor:
    """Images (B, 1, H, W) whose sides are multiples of `stride`: resized where they are not."""
    sides = [max(1, round(side / stride)) * stride for side in images.shape[2:]]
    if list(images.shape[2:]) == sides:
        return images
    return torch.nn.functional.interpolate(images, sides, mode="bilinear", align_corners=False)


def heat_boxes(heat: Tensor, threshold: float) -> Tensor:
    """The smallest box around activations above `threshold`: (B, h, w) -> (B, 4).

    Eq. 2 of Peng et al.

    Heat is scaled to [0, 1] in each map. Boxes are left, top, right, bottom, and span [-1, 1] where
    they cover the whole map; a map without contrast gives the whole map.
    """
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-12
    hot = ((heat - low) > threshold * (high - low)) | flat
    edges = []
    for axis in (1, 2):  # columns first: x before y
        line = hot.any(dim=axis)
        side = line.shape[1]
        places = torch.arange(side, device=heat.device)
        first = places.where(line, side).amin(dim=1)
        last = places.where(line, -1).amax(dim=1) + 1
        edges.append((2 * first / side - 1, 2 * last / side - 1))
    (left, right), (top, bottom) = edges
    return torch.stack((left, top, right, bottom), dim=1)


def symmetric_beta(like: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Beta(α, α) of the shape of `like`, by Jöhnk's rejection (torch's own takes no generator).

    With u, v uniform, u^(1/α) / (u^(1/α) + v^(1/α)) is Beta(α, α) given that the sum is at most 1,
    which it is in at least half of the draws for α ≤ 1. All draws are made at once, as many as
    leave none open but once in 2^TRIES: whether more are needed cannot be asked without waiting
    for the device. What is left open becomes 1/2.
    """
    shape = (2, TRIES, *like.shape)
    u, v = torch.rand(shape, device=like.device, generator=generator).pow(1 / alpha)
    total = u + v
    accepted = (total <= 1) & (total > 0)
    ratios = torch.where(accepted, u / total, 0.5)
    chosen = accepted.byte().argmax(dim=0, keepdim=True)  # the first one
    return ratios.gather(0, chosen).squeeze(0).to(like.dtype)
