"""From the configuration of a run to its preprocessed slices."""

from __future__ import annotations

import sys

from tqdm import tqdm

from .config import RunConfig
from .data.cache import VolumeCache, open_cache
from .data.manifest import dataset_info
from .data.review import notices
from .data.text import printable
from .distributed import first


def open_dataset(config: RunConfig) -> VolumeCache:
    """The run's data, preprocessed once and kept; every bad file is named in one DataError.

    Of many processes the first preprocesses; then all open what it wrote.
    """

    def opened() -> VolumeCache:
        info = dataset_info(config.dataset, config.data_folder())
        scans = info.find(config.data_folder(), cine=config.cine)
        return open_cache(scans, config.preprocess, info, config.cache_folder)

    def opened_and_told() -> None:
        own.append(opened())
        tell(own[0])

    own: list[VolumeCache] = []
    first(opened_and_told)
    return own[0] if own else opened()


def tell(cache: VolumeCache) -> None:
    """Says on the screen what is to be known of the data."""
    for line in notices(cache):
        tqdm.write(f"note: {printable(line)}", file=sys.stderr)
