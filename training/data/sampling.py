"""Batches of slices, each a function of (seed, step, its number in the step) alone.

A batch does not depend on the ones before it, on the number of loader workers or on when a run was
interrupted: resuming at step s gives exactly the batches that an uninterrupted run would have seen.
Nor does it depend on how a step's batches are spread over processes and time.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..checkpoint import STOPPING
from .cache import VolumeCache
from .nifti import DataError


class SliceBatch(NamedTuple):
    """Slices of one step, before augmentation."""

    step: int
    part: int  # number of the batch in its step; of its first pair, where it holds pairs
    images: Tensor  # (n, 1, H, W) float32
    labels: Tensor  # (n, H, W) uint8; 255 where unlabelled
    volume: Tensor  # (n,) int64, the scan in the cache
    slice_index: Tensor  # (n,) int64, the slice in its scan
    num_slices: Tensor  # (n,) int64, V of that scan
    sample: Tensor  # (n,) int64, the slice among all slices of the cache
    names: list[str]  # the scan of each slice, for messages

    def describe(self) -> str:
        """Which slices these are, for an error message: 'patient001_frame01 [3, 5], ...'."""
        slices: dict[str, list[int]] = {}
        for name, index in zip(self.names, self.slice_index.tolist(), strict=True):
            slices.setdefault(name, []).append(index)
        return ", ".join(f"{name} {sorted(indices)}" for name, indices in slices.items())


@dataclass(frozen=True)
class Shard:
    """Which of a step's world · accumulate batches this process takes: `accumulate` in a row."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    @property
    def count(self) -> int:
        """Batches per step, over all processes."""
        return self.world * self.accumulate

    def place(self, index: int) -> tuple[int, int]:
        """Step of this process's batch `index`, and the batch's number in that step."""
        step, place = divmod(index, self.accumulate)
        return step, self.rank * self.accumulate + place


ALONE = Shard()


class TwoSubjects(Dataset[SliceBatch]):
    """Pre-training batches: n/2 slices from one scan of each of two subjects (paper, Sec. 2.4).

    A scan with fewer than n/2 slices is drawn from with replacement. With several pairs of subjects
    in a step, whether in one batch, on other processes or in later batches, no subject comes twice
    before all have come; so a scan's slices are never on two processes while there are enough.
    """

    def __init__(
        self,
        cache: VolumeCache,
        subjects: Sequence[str],
        slices: int,
        seed: int,
        pairs: int = 1,
        shard: Shard = ALONE,
        read: bool = True,
    ) -> None:
        """read: whether batches hold pixels; without, they only say which slices they are."""
        if len(subjects) < 2:
            raise DataError(
                f"pre-training draws from two subjects at a time, got {len(subjects)}; add scans"
            )
        if slices < 4 or slices % 2:
            raise ValueError(
                f"slices must be even and at least 4 (half from each subject), got {slices}"
            )
        self.cache = cache
        self.scans = [cache.of_subject(subject) for subject in subjects]
        self.slices = slices
        self.seed = seed
        self.pairs = pairs
        self.shard = shard
        self.read = read

    def __getitem__(self, index: int) -> SliceBatch:
        step, number = self.shard.place(index)
        rng = np.random.default_rng((self.seed, step))
        half = self.slices // 2
        chosen: list[tuple[int, int]] = []
        # All of the step is drawn, which costs nothing beside reading: then all processes agree.
        for subject in self._subjects(rng):
            scans = self.scans[subject]
            scan = scans[rng.integers(len(scans))]
            depth = self.cache.num_slices(scan)
            drawn = rng.choice(depth, size=half, replace=depth < half)
            chosen += [(scan, int(index)) for index in np.sort(drawn)]
        size = self.pairs * self.slices
        own = chosen[number * size : (number + 1) * size]
        return _collect(self.cache, step, number * self.pairs, own, self.read)

    def _subjects(self, rng: np.random.Generator) -> list[int]:
        """Two for each pair of the step, different ones for as long as there are enough."""
        left, drawn = self.shard.count * self.pairs, []
        while left:
            pairs = min(left, len(self.scans) // 2)
            drawn += rng.choice(len(self.scans), size=2 * pairs, replace=False).tolist()
            left -= pairs
        return drawn


class ShuffledSlices(Dataset[SliceBatch]):
    """Batches of the slices of a pool, in shuffled passes over it.

    A batch that begins in one pass may end in the next; none is left out.
    """

    def __init__(
        self,
        cache: VolumeCache,
        pool: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        shard: Shard = ALONE,
        read: bool = True,
    ) -> None:
        """pool: (scan, slice) each. read: whether batches hold pixels; without, they only say
        which slices they are."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.cache = cache
        self.pool = pool
        self.batch_size = batch_size
        self.seed = seed
        self.shard = shard
        self.read = read

    def chosen(self, number: int) -> list[tuple[int, int]]:
        """The slices of batch `number`, counted over all steps and processes."""
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        orders = {p // len(self.pool): None for p in positions}
        shuffled = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(len(self.pool))
            for epoch in orders
        }
        return [self.pool[shuffled[p // len(self.pool)][p % len(self.pool)]] for p in positions]

    def __getitem__(self, index: int) -> SliceBatch:
        step, number = self.shard.place(index)
        chosen = self.chosen(step * self.shard.count + number)
        return _collect(self.cache, step, number, chosen, self.read)


class AnySlices(ShuffledSlices):
    """Pre-training batches of slices of whatever scans.

    Those of one scan lie together, as the methods expect it.
    """

    def __init__(
        self,
        cache: VolumeCache,
        subjects: Sequence[str],
        slices: int,
        seed: int,
        pairs: int = 1,
        shard: Shard = ALONE,
        read: bool = True,
    ) -> None:
        pool = [
            (scan, index)
            for subject in subjects
            for scan in cache.of_subject(subject)
            for index in range(cache.num_slices(scan))
        ]
        super().__init__(cache, pool, slices * pairs, seed, shard, read)
        self.pairs = pairs

    def __getitem__(self, index: int) -> SliceBatch:
        step, number = self.shard.place(index)
        chosen = sorted(self.chosen(step * self.shard.count + number))
        return _collect(self.cache, step, number * self.pairs, chosen, self.read)


class LabelledSlices(ShuffledSlices):
    """Fine-tuning batches: slices drawn evenly from the labelled scans, in shuffled epochs."""

    def __init__(
        self,
        cache: VolumeCache,
        subjects: Sequence[str],
        batch_size: int,
        seed: int,
        shard: Shard = ALONE,
        read: bool = True,
    ) -> None:
        pool = [
            (scan, index)
            for subject in subjects
            for scan in cache.of_subject(subject)
            if cache.volumes[scan].labelled
            for index in range(cache.num_slices(scan))
        ]
        if not pool:
            raise DataError(f"none of the subjects {', '.join(subjects)} has a labelled scan")
        super().__init__(cache, pool, batch_size, seed, shard, read)


def batches(
    dataset: Dataset[SliceBatch], start: int, stop: int, workers: int, timeout: float = 0
) -> DataLoader[SliceBatch]:
    """Batches `start` to `stop` − 1 of this process, in order.

    timeout: seconds after which waiting for a worker raises a RuntimeError; 0 waits for ever.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=_Numbers(start, stop),
        num_workers=workers,
        timeout=timeout,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and batch systems signal every process: a loader that dies takes the run with it,
    before its state is saved. Loaders end when their parent closes them, or ends."""
    for kind in STOPPING:
        signal.signal(kind, signal.SIG_IGN)


class _Numbers(Sampler[int]):
    def __init__(self, start: int, stop: int) -> None:
        self.range = range(start, stop)

    def __iter__(self) -> Iterator[int]:
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


def _collect(
    cache: VolumeCache, step: int, part: int, chosen: Sequence[tuple[int, int]], read: bool
) -> SliceBatch:
    scans, indices = [scan for scan, _ in chosen], [index for _, index in chosen]
    images, labels = np.empty((len(chosen), 0, 0), np.float32), np.empty(0, np.uint8)
    if read:
        images = np.stack([cache.image(s)[i] for s, i in chosen])
        labels = np.stack([cache.label(s)[i] for s, i in chosen])
    return SliceBatch(
        step=step,
        part=part,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels),
        volume=torch.tensor(scans),
        slice_index=torch.tensor(indices),
        num_slices=torch.tensor([cache.num_slices(scan) for scan in scans]),
        sample=torch.tensor([cache.volumes[scan].offset + index for scan, index in chosen]),
        names=[cache.volumes[scan].name for scan in scans],
    )
