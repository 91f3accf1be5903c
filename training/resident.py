"""The slices of a data set in the memory of the training device."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from .config import RunConfig
from .data.cache import VolumeCache
from .data.sampling import SliceBatch
from .transfer import to_device

Config = TypeVar("Config", bound=RunConfig)
SHARE = 0.25  # of a GPU's free memory that slices may take; the rest is for the network
PART = 256  # slices copied at once


class Resident:
    """All slices on the device, so that a step reads none from disk and sends none across.

    Batches then come without their pixels (`read=False` of the data sets), and `fill` adds them.
    """

    def __init__(self, cache: VolumeCache, device: torch.device, *, labels: bool) -> None:
        """labels: whether label maps are wanted, too."""
        shape = cache.images.shape
        self.images = torch.empty(shape, device=device)
        self.labels = torch.empty(shape if labels else 0, dtype=torch.uint8, device=device)
        for start in range(0, len(self.images), PART):
            part = slice(start, start + PART)
            self.images[part] = torch.from_numpy(np.array(cache.images[part])).to(device)
            if labels:
                self.labels[part] = torch.from_numpy(np.array(cache.labels[part])).to(device)

    def fill(self, batch: SliceBatch) -> SliceBatch:
        """The batch with its pixels, on the device."""
        rows = to_device(batch.sample, self.images.device)
        labels = self.labels[rows] if len(self.labels) else batch.labels
        return batch._replace(images=self.images[rows][:, None], labels=labels)


def resident(
    cache: VolumeCache, config: RunConfig, device: torch.device, *, labels: bool = False
) -> Resident | None:
    """The slices on the device, where the configuration wants them there; None: read as needed."""
    if config.cache_on == "host" or (config.cache_on == "auto" and not _fits(cache, device)):
        return None
    return Resident(cache, device, labels=labels)


def without_loaders(config: Config, store: Resident | None) -> Config:
    """The configuration of the loop: nothing is left to do for processes that load slices."""
    return config if store is None else replace(config, workers=0)


def _fits(cache: VolumeCache, device: torch.device) -> bool:
    if device.type != "cuda":
        return False  # on a CPU they are in memory already: the operating system keeps the file
    free, _ = torch.cuda.mem_get_info(device)
    return cache.images.nbytes + cache.labels.nbytes <= SHARE * free
