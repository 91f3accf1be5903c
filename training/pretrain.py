"""Pre-training: scans without labels in, an encoder out (paper, Sec. 2.4)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .augment import augment
from .config import PretrainConfig
from .data.cache import VolumeCache
from .data.errors import DataError, listed
from .data.review import notices, spacing_recorded
from .data.sampling import Shard, SliceBatch, TwoSubjects
from .data.splits import folds_of, pick
from .distributed import (
    first,
    is_main,
    own_folder,
    parallel,
    processes,
    rank,
    synchronise_norms,
    world,
)
from .engine import Device, fit, step_generator
from .figures import pretraining as pretraining_figures
from .identity import Identity, contents, split_of
from .inputs import open_dataset, tell
from .methods import METHODS, Method, Outcome, Views
from .models import save_encoder
from .models.weights import ENCODER
from .runlog import WARNINGS, RunLog, read_metrics
from .steps import Task

INITIAL = "encoder_initial.safetensors"


def pretrain(config: PretrainConfig) -> Path:
    """Runs pre-training in `config.out` and returns the path of the encoder's weights.

    Under torchrun the processes share each step: see `distributed`.
    """
    with processes(config.device):
        device = Device.of(config)
        cache = open_dataset(config)
        told = [*notices(cache), *thin_scans(config, cache, subjects(config, cache))]
        with own_folder(config.out):
            run = Pretraining(config, device, cache)
            first(lambda: tell(config.out, told))
            if run.method.trains:
                run.fit()
            first(run.finish)
    return config.out / ENCODER


class Pretraining:
    """One run of pre-training."""

    def __init__(self, config: PretrainConfig, device: Device, cache: VolumeCache) -> None:
        self.config, self.device, self.cache = config, device, cache
        self.seen = subjects(config, self.cache)
        self.corpus = Slices(self.cache, self.seen)
        self.log = RunLog(config, "pretrain", self.device.describe(), identity(config, self.cache))
        torch.manual_seed(config.seed)
        settings = getattr(config, config.method, None)
        self.method = METHODS[config.method](config.model, settings, self.corpus)
        first(self.keep_start)
        self.device.to(self.method)
        if config.sync_batchnorm and world() > 1:
            synchronise_norms(self.method, self.device.device)
        if config.compile:
            self.method.encoder.compile()  # in place: the keys of the weights stay
        self.module: nn.Module = self.method
        self.latest: tuple[Views, Outcome] | None = None
        self.step = -1  # that the method has been told of

    def fit(self) -> None:
        """All steps."""
        config = self.config
        own = Shard(rank(), world(), config.optim.accumulate)
        self.module = parallel(self.method, self.device.device)
        fit(
            self.module,
            [{"params": list(self.method.parameters())}],
            Task(self.prepare, self.loss),
            TwoSubjects(self.cache, self.seen, config.slices, config.seed, config.pairs, own),
            config,
            self.log,
            self.device,
            self.look if is_main() else None,
        )

    def prepare(self, batch: SliceBatch, generator: torch.Generator) -> Views:
        """The views of a batch."""
        if batch.step != self.step:
            self.step = batch.step
            self.method.before_step(batch.step, self.config.optim.steps, self.corpus)
        return make_views(batch, self.config, self.device.device, generator, self.method.centres)

    def loss(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        with self.device.autocast():
            outcome: Outcome = self.module(views)
        self.latest = views, outcome
        return outcome.loss, outcome.terms

    def look(self, step: int) -> dict[str, float]:
        """What the method monitors, where a look is due."""
        # Step 1 too: what comes later is judged against the untrained network, and an embedding
        # can collapse within 50 steps.
        config = self.config
        if step > 1 and step % config.monitor_every and step < config.optim.steps:
            return {}
        assert self.latest is not None  # a step was taken
        return self.watch(*self.latest)

    @functools.cached_property
    def watch(self) -> CollapseWatch:
        return CollapseWatch(self.method, self.config.out)

    def keep_start(self) -> None:
        """Writes the encoder as it is initialised."""
        path = self.config.out / INITIAL
        if self.log.fresh or not path.exists():
            save_encoder(path, self.method.encoder, self.about(0))

    def finish(self) -> None:
        """Writes the encoder, and the figures of what was learnt."""
        config = self.config
        self.log.close()
        steps = config.optim.steps if self.method.trains else 0
        save_encoder(config.out / ENCODER, self.method.encoder, self.about(steps))
        if self.method.trains:
            pretraining_figures(config.out, self.cache, config, self.method)

    def about(self, step: int) -> dict[str, Any]:
        """What a reader of the weights must know."""
        config = self.config
        return {
            "method": config.method,
            "dataset": config.dataset,
            "step": step,
            "seed": config.seed,
            "leave_out_fold": config.leave_out_fold,
            "num_folds": config.num_folds,
            "split_seed": config.split_seed,
            "scans": len(self.cache.volumes),
            "spacing": spacing_recorded(self.cache),
            "identity": self.log.identity.plain(),
        }


class Slices:
    """The slices of some subjects, for methods that remember or revisit each of them."""

    def __init__(self, cache: VolumeCache, subjects: Sequence[str]) -> None:
        self.cache = cache
        scans = [scan for subject in subjects for scan in cache.of_subject(subject)]
        self.samples = torch.cat([
            cache.volumes[scan].offset + torch.arange(cache.num_slices(scan)) for scan in scans
        ]).sort().values  # fmt: skip

    @property
    def num_samples(self) -> int:
        return len(self.cache.images)

    def canvases(self, samples: Tensor) -> Tensor:
        return torch.from_numpy(self.cache.images[samples.numpy()])[:, None]


def subjects(config: PretrainConfig, cache: VolumeCache) -> tuple[str, ...]:
    """The subjects that pre-training sees: all, unless a fold is to be left out."""
    if config.leave_out_fold is None:
        return tuple(cache.subjects)
    folds = folds_of(cache, config.num_folds, config.split_seed, config.splits)
    held_out = pick(folds, config.leave_out_fold, "leave_out_fold").test
    return tuple(subject for subject in cache.subjects if subject not in held_out)


def thin_scans(config: PretrainConfig, cache: VolumeCache, seen: Sequence[str]) -> list[str]:
    """What to tell of scans with too few slices for a method that goes by position.

    Raises:
        DataError: all have one slice, so that every slice is at the same position.
    """
    method = METHODS[config.method]
    if not method.positional:
        return []
    scans = [cache.volumes[scan] for subject in seen for scan in cache.of_subject(subject)]
    if all(scan.num_slices == 1 for scan in scans):
        raise DataError(
            f"every scan has one slice, but {config.method} learns from where in its scan a slice "
            f"lies; expected several slices, as in {scans[0].name}: pass another --method, such as "
            f"simclr"
        )
    settings = getattr(config, config.method)
    found = []
    for name in ("t", "t_la"):  # t_la: of SAL, where it is not t
        t = getattr(settings, name, None)
        # |i - j| < t V has no solution but i = j.
        alone = [scan.name for scan in scans if t is not None and t * scan.num_slices <= 1]
        if alone:
            found.append(
                f"{config.method}.{name} {t:g} times the number of slices is at most 1 in "
                f"{len(alone)} of {len(scans)} scans, so that no two of their slices are a pair: "
                f"{listed(alone)}; raise --{config.method}.{name}"
            )
    return found


def identity(config: PretrainConfig, cache: VolumeCache) -> Identity:
    """What pre-training believes in: no label is looked at."""
    seen = subjects(config, cache)
    strict = config.leave_out_fold is not None
    return Identity(
        cache.info.name,
        contents(cache),
        without_labels=seen,
        held_out=tuple(sorted(set(cache.subjects) - set(seen))),
        split=split_of(config, "leave_out_fold", "num_folds", "split_seed") if strict else {},
        strict=strict,
    )


def make_views(
    batch: SliceBatch,
    config: PretrainConfig,
    device: torch.device,
    generator: torch.Generator,
    centres: Callable[[Tensor, float, torch.Generator], Tensor | None] | None = None,
) -> Views:
    """Both views of each slice: first view of all slices, then the second of all.

    Each pair of subjects after the first has random numbers of its own, so that its views do not
    depend on which pairs it shares a batch with.
    """
    views = []
    for pair, rows in enumerate(torch.arange(len(batch.images)).split(config.slices)):
        if pair:
            part = batch.part + pair
            own = step_generator(config.seed, batch.step, device, part)
        else:
            own = generator
        views.append(_views_of_pair(batch, rows, config, device, own, centres))
    if len(views) == 1:
        return views[0]

    def both(column: str) -> Tensor:
        halves = [getattr(pair, column).chunk(2) for pair in views]
        return torch.cat([half[view] for view in (0, 1) for half in halves])

    images = both("images").contiguous(memory_format=torch.channels_last)
    names = ("volume", "slice_index", "num_slices", "sample", "frame")
    return Views(images, generator=generator, **{name: both(name) for name in names})


def _views_of_pair(
    batch: SliceBatch,
    rows: Tensor,
    config: PretrainConfig,
    device: torch.device,
    generator: torch.Generator,
    centres: Callable[[Tensor, float, torch.Generator], Tensor | None] | None,
) -> Views:
    images = batch.images[rows].to(device, non_blocking=True).repeat(2, 1, 1, 1)
    volume, index, depth, sample = (
        column[rows].to(device, non_blocking=True).repeat(2)
        for column in (batch.volume, batch.slice_index, batch.num_slices, batch.sample)
    )
    group = None
    geometry = config.augment.geometry
    if geometry == "auto":
        geometry = METHODS[config.method].geometry
    if geometry == "shared":
        # Scans numbered from 0 within the pair: slices of one scan share their strong transform.
        group = torch.unique(volume, return_inverse=True)[1]
    # Views lie on their slices, or leave them as far as the largest shift brings them.
    field = config.crop / images.shape[-1]
    room = max(1 - field, 2 * field * config.augment.shift)
    augmented = augment(
        images,
        config.crop,
        config.augment,
        generator,
        group=group,
        centres=centres(sample, room, generator) if centres else None,
    )
    views = augmented.views.contiguous(memory_format=torch.channels_last)
    return Views(views, volume, index, depth, sample, generator, augmented.frame)


class CollapseWatch:
    """Logs what the method monitors, and warns once of each kind of trouble that it finds."""

    def __init__(self, method: Method, out: Path) -> None:
        self.method = method
        self.path = out / WARNINGS
        self.history = [row for row in read_metrics(out) if method.watched in row]
        said = self.path.read_text().splitlines() if self.path.exists() else []
        self.said = {line.partition(": ")[0] for line in said}

    def __call__(self, views: Views, outcome: Outcome) -> dict[str, float]:
        now = self.method.monitor(views, outcome)
        if now:
            self.history.append(now)
        for kind, sentence in self.method.warnings(self.history).items():
            if kind not in self.said:
                self.said.add(kind)
                with self.path.open("a") as file:
                    file.write(f"{kind}: {sentence}\n")
                tqdm.write(f"warning: {sentence}", file=sys.stderr)
        return now
