"""Augmentation of a batch of slices on its device: one resampling, then changes of intensity.

Geometry comes in two ways. `shared`: all views of one scan get the same strong transform and each
a very small one of its own, so that a window still shows the same anatomy in all of them, which the
alignment loss needs. `independent`: each view gets a strong transform of its own. In pilots on ACDC
independent transforms doubled the alignment loss of an untrained network: the windows no longer
correspond, unless the feature maps are brought back first (`undo`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .transfer import to_device

Geometry = Literal["shared", "independent"]


@dataclass
class AugmentConfig:
    """Strength of augmentation; 0 switches a part off.

    Args:
        geometry: "shared" by the slices of one scan, "independent" for every view, or "auto": what
            the pre-training method is defined on, and independent in fine-tuning.
        rotation: largest rotation in degrees.
        scale: largest zoom, as a factor: 1.25 means from 1/1.25 to 1.25.
        zoom: law of that factor: "log", evenly over its logarithm, or "linear", evenly from
            2 − scale to scale, the factor being that of the field which a view shows.
        shift: largest shift, as a fraction of the network's field of view.
        elastic: standard deviation of a smooth displacement, as a fraction of the field.
        elastic_nodes: points along each side at which displacements are drawn; between them they
            are interpolated, so more points bend more sharply.
        probability: share of the transforms that take place at all; a view without one is shown
            as it is, but for its mirror image and the intensities.
        flip: probability of a mirror image along each axis.
        jitter: strength of each view's own transform under "shared", relative to the strong one.
        brightness: standard deviation of an offset, in standard deviations of the volume.
        contrast: largest factor of contrast.
        gamma: largest exponent, applied between the slice's extremes.
        bias: standard deviation of a smooth multiplicative field (MR coil sensitivity).
        noise: largest standard deviation of Gaussian noise.
    """

    geometry: Literal["auto", "shared", "independent"] = "auto"
    rotation: float = 30.0
    scale: float = 1.25
    zoom: Literal["log", "linear"] = "log"
    shift: float = 0.1
    elastic: float = 0.0
    elastic_nodes: int = 5
    probability: float = 1.0
    flip: float = 0.0
    jitter: float = 0.05
    brightness: float = 0.2
    contrast: float = 1.4
    gamma: float = 1.5
    bias: float = 0.15
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rotation", "shift", "elastic", "jitter", "brightness", "bias", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("scale", "contrast", "gamma"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(
                    f"augment.{name} is a largest factor and must be >= 1, got {value}"
                )
        for name in ("flip", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"augment.{name} is a probability in [0, 1], got {value}")
        if self.zoom == "linear" and self.scale >= 2:
            raise ValueError(
                f"augment.zoom=linear goes from 2 − augment.scale up, so scale must be below 2, "
                f"got {self.scale}"
            )
        if self.elastic_nodes < 2:
            raise ValueError(f"augment.elastic_nodes must be at least 2, got {self.elastic_nodes}")


class Augmented(NamedTuple):
    """Views, their labels, and the way back."""

    views: Tensor  # (B, 1, size, size)
    labels: Tensor | None  # (B, size, size), under the same geometry
    frame: Tensor  # (B, 2, 3): where a point of the scan's frame lies in the view, for `undo`


def augment(
    images: Tensor,  # (B, 1, H, W), z-scored
    size: int,
    config: AugmentConfig,
    generator: torch.Generator,
    *,
    group: Tensor | None = None,  # (B,) int64: slices of one scan share a number
    labels: Tensor | None = None,  # (B, H, W) integers
    centres: Tensor | None = None,  # (B, 2): where views are centred, instead of a random shift
) -> Augmented:
    """Random views of images.

    Everything random is drawn from `generator`, which lives on the device of the images. Strong
    transforms are shared by the members of a group; without groups each view has its own.
    """
    theta, bend = placement(images, size, config, generator, group, centres)
    grid = sampling_grid(theta, bend, size)
    # The border's value goes on outside: background, where zero would be the mean of the volume.
    views = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    if labels is not None:
        sampled = F.grid_sample(
            labels[:, None].float(), grid, "nearest", "border", align_corners=False
        )
        labels = sampled[:, 0].to(labels.dtype)
    frame = _inverse(theta, size / images.shape[-1])
    return Augmented(change_intensity(views, config, generator), labels, frame)


def undo(maps: Tensor, frame: Tensor) -> Tensor:
    """Feature maps (B, C, h, w) of views, resampled to where the slices lie without augmentation.

    The maps of all views of a scan then correspond pixel by pixel. What a view did not show
    (`shown`) is 0. Elastic displacements (`AugmentConfig.elastic`) are not undone.
    """
    with torch.autocast(maps.device.type, enabled=False):
        grid = F.affine_grid(frame.float(), list(maps.shape), align_corners=False)
        back = F.grid_sample(maps.float(), grid, "bilinear", "zeros", align_corners=False)
    return back.to(maps.dtype, memory_format=torch.channels_last)  # as the losses like it best


def shown(frame: Tensor, height: int, width: int) -> Tensor:
    """Which pixels of a map that `undo` gives each view shows: (B, height, width) bool."""
    size = [len(frame), 1, height, width]
    grid = F.affine_grid(frame.float(), size, align_corners=False)
    return (grid.abs() <= 1).all(dim=-1)


def _inverse(theta: Tensor, field: float) -> Tensor:
    """From the frame of the network's field on the canvas to that of the view."""
    (a, b), (c, d) = theta[:, :, :2].permute(1, 2, 0)
    # In closed form: torch.linalg.inv waits for the device to see whether there is an inverse.
    turn = torch.stack((d, -b, -c, a), dim=1).view(-1, 2, 2) / (a * d - b * c)[:, None, None]
    return torch.cat((field * turn, -turn @ theta[:, :, 2:]), dim=2)


def sampling_grid(theta: Tensor, bend: Tensor | None, size: int) -> Tensor:
    """Where each output pixel looks in its image: (B, size, size, 2) in [-1, 1], x before y."""
    grid = F.affine_grid(theta, [len(theta), 1, size, size], align_corners=False)
    if bend is None:
        return grid
    smooth = F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=True)
    return grid + smooth.permute(0, 2, 3, 1)


def placement(
    images: Tensor,
    size: int,
    config: AugmentConfig,
    generator: torch.Generator,
    group: Tensor | None = None,
    centres: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Random places of views on their images, in coordinates of [-1, 1], x before y.

    Returns:
        (B, 2, 3), the affine map from a view to its image, and (B, 2, nodes, nodes), a coarse field
        of displacements on top, or None without elastic ones.
    """
    batch = len(images)
    if group is None:
        strong, own = torch.arange(batch, device=images.device), 0.0
        draws = batch
    else:
        strong, own = to_device(group, images.device), config.jitter
        draws = int(group.max()) + 1
    parameters, takes_place = _draw(draws, config, images, generator), None
    if config.probability < 1:
        drawn = _uniform(draws, 1, like=images, generator=generator)
        takes_place = (drawn < config.probability).to(parameters.dtype)
        parameters = parameters * takes_place
    parameters = parameters[strong]
    if own:
        parameters = parameters + own * _draw(batch, config, images, generator)
    angle, log_scale, shift = parameters[:, 0], parameters[:, 1], parameters[:, 2:4]
    mirror = torch.ones(draws, 2, device=images.device)
    if config.flip:
        turned = _uniform(draws, 2, like=images, generator=generator) < config.flip
        mirror = torch.where(turned, -1.0, mirror)
    field = size / images.shape[-1]  # the network sees this part of the canvas
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=1).view(-1, 2, 2)
    linear = field * log_scale.exp()[:, None, None] * turn * mirror[strong][:, None, :]
    centre = field * shift if centres is None else centres
    theta = torch.cat((linear, centre[:, :, None]), dim=2)
    if not config.elastic:
        return theta, None
    nodes = config.elastic_nodes
    coarse = torch.randn(draws, 2, nodes, nodes, device=images.device, generator=generator)
    if takes_place is not None:
        coarse = coarse * takes_place[:, :, None, None]
    # 2 · field: the grid spans [-1, 1] over the whole canvas
    return theta, 2 * field * config.elastic * coarse[strong]


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The middle (..., size, size) of (..., H, W): the network's field without augmentation."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def change_intensity(views: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Gamma, contrast, brightness, bias field and noise, drawn for each view by itself."""
    batch = len(views)

    def factor(largest: float) -> Tensor:
        draw = _uniform(batch, 1, like=views, generator=generator)[:, :, None, None]
        return ((2 * draw - 1) * math.log(largest)).exp()

    if config.gamma > 1:
        low, high = views.amin((1, 2, 3), True), views.amax((1, 2, 3), True)
        span = (high - low).clamp_min(1e-6)
        views = ((views - low) / span).clamp(0, 1) ** factor(config.gamma) * span + low
    if config.contrast > 1:
        views = views * factor(config.contrast)
    if config.brightness:
        offset = torch.randn(batch, 1, 1, 1, device=views.device, generator=generator)
        views = views + config.brightness * offset
    if config.bias:
        coarse = torch.randn(batch, 1, 3, 3, device=views.device, generator=generator)
        field = F.interpolate(coarse, size=views.shape[-2:], mode="bicubic", align_corners=True)
        floor = views.amin((1, 2, 3), True)  # the field scales signal, which air has none of
        views = (views - floor) * (config.bias * field).exp() + floor
    if config.noise:
        level = config.noise * _uniform(batch, 1, like=views, generator=generator)[:, :, None, None]
        grain = torch.empty_like(views).normal_(generator=generator)
        views = views + level * grain
    return views


def _draw(count: int, config: AugmentConfig, like: Tensor, generator: torch.Generator) -> Tensor:
    """(count, 4): angle in radians, log of the zoom, shift in x and y (1 = half the field)."""
    drawn = 2 * _uniform(count, 4, like=like, generator=generator) - 1
    # Numbers and not a tensor of them, for which the CPU would wait until the device has it.
    angle = drawn[:, 0] * math.radians(config.rotation)
    if config.zoom == "linear":
        log_scale = (drawn[:, 1] * (config.scale - 1)).log1p()
    else:
        log_scale = drawn[:, 1] * math.log(config.scale)
    shift = drawn[:, 2:] * (2 * config.shift)
    return torch.cat((angle[:, None], log_scale[:, None], shift), dim=1)


def _uniform(rows: int, columns: int, *, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, device=like.device, generator=generator)
