"""From the slices of a batch to the augmented views that a method is shown."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .augment import augment
from .config import PretrainConfig
from .data.sampling import SliceBatch
from .device import step_generator
from .methods import Views, side_by_side
from .transfer import to_device

Centres = Callable[[Tensor, float, torch.Generator], Tensor | None]


def make_views(
    batch: SliceBatch,
    config: PretrainConfig,
    device: torch.device,
    generator: torch.Generator,
    centres: Centres | None = None,
) -> Views:
    """Both views of each slice, in the order of the batch; see `Views`.

    Each pair of subjects after the first has random numbers of its own, so that its views do not
    depend on which pairs it shares a batch with.
    """
    views = []
    for pair, start in enumerate(range(0, len(batch.sample), config.slices)):
        own = generator
        if pair:
            own = step_generator(config.seed, batch.step, device, batch.part + pair)
        rows = slice(start, start + config.slices)
        views.append(_views_of_pair(batch, rows, config, device, own, centres))
    if len(views) == 1:
        return views[0]

    def joined(column: str) -> Tensor:
        return torch.cat([getattr(pair, column) for pair in views])

    images = joined("images").contiguous(memory_format=torch.channels_last)
    names = ("volume", "slice_index", "num_slices", "sample", "frame")
    return Views(images, generator=generator, **{name: joined(name) for name in names})


def _views_of_pair(
    batch: SliceBatch,
    rows: slice,
    config: PretrainConfig,
    device: torch.device,
    generator: torch.Generator,
    centres: Centres | None,
) -> Views:
    # A slice of the batch and not a copy: it stays in pinned memory, from where it is sent while
    # the CPU goes on. What is drawn is drawn for all first views, then for all second ones.
    images = to_device(batch.images[rows], device).repeat(2, 1, 1, 1)
    sample = batch.sample[rows]
    group = None
    if config.geometry == "shared":
        # Scans numbered from 0 within the pair: slices of one scan share their strong transform.
        group = torch.unique(batch.volume[rows], return_inverse=True)[1].repeat(2)
    # Views lie on their slices, or leave them as far as the largest shift brings them.
    field = config.crop / images.shape[-1]
    room = max(1 - field, 2 * field * config.augment.shift)
    augmented = augment(
        images,
        config.crop,
        config.augment,
        generator,
        group=group,
        centres=centres(to_device(sample.repeat(2), device), room, generator) if centres else None,
    )
    views = side_by_side(augmented.views).contiguous(memory_format=torch.channels_last)
    return Views(
        views,
        volume=batch.volume[rows].repeat_interleave(2),
        slice_index=batch.slice_index[rows].repeat_interleave(2),
        num_slices=batch.num_slices[rows].repeat_interleave(2),
        sample=sample.repeat_interleave(2),
        generator=generator,
        frame=side_by_side(augmented.frame),
    )
