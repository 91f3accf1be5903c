"""From the configuration of a run to its preprocessed slices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from salkernels._shared.files import write_atomically

from .config import PretrainConfig, RunConfig
from .data.cache import VolumeCache, open_cache
from .data.manifest import dataset_info
from .data.splits import folds_of, pick
from .data.text import printable
from .distributed import first

NOTES = "data.txt"  # in a run folder: what the user should know of its data


def open_dataset(config: RunConfig) -> VolumeCache:
    """The run's data, preprocessed once and kept; every bad file is named in one DataError.

    Of many processes the first preprocesses; then all open what it wrote.
    """

    def opened() -> VolumeCache:
        info = dataset_info(config.dataset, config.data_folder())
        scans = info.find(config.data_folder(), cine=config.cine)
        return open_cache(scans, config.preprocess, info, config.cache_folder)

    own: list[VolumeCache] = []
    first(lambda: own.append(opened()))
    return own[0] if own else opened()


def subjects(config: PretrainConfig, cache: VolumeCache) -> tuple[str, ...]:
    """The subjects that pre-training sees: all, or all outside the fold that is left out."""
    if config.leave_out_fold is None:
        return tuple(cache.subjects)
    folds = folds_of(cache, config.num_folds, config.split_seed, config.splits)
    held_out = pick(folds, config.leave_out_fold, "leave_out_fold").test
    return tuple(subject for subject in cache.subjects if subject not in held_out)


def tell(out: Path, lines: Sequence[str]) -> None:
    """Prints the notes on the data, and writes them to `out`/data.txt."""
    for line in lines:
        tqdm.write(f"note: {printable(line)}", file=sys.stderr)
    if lines:
        write_atomically(out / NOTES, "".join(f"{printable(line)}\n" for line in lines))
    else:
        (out / NOTES).unlink(missing_ok=True)
