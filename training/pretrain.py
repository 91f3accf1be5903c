"""Pre-training: scans without labels in, an encoder out (paper, Sec. 2.4)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .augment import augment
from .config import PretrainConfig
from .data.cache import VolumeCache
from .data.sampling import SliceBatch, TwoSubjects
from .data.splits import kfold
from .engine import Device, fit
from .figures import pretraining as pretraining_figures
from .inputs import open_dataset
from .methods import METHODS, Method, Outcome, Views
from .models import save_encoder
from .runlog import RunLog, read_metrics

ENCODER = "encoder.safetensors"
INITIAL = "encoder_initial.safetensors"


def pretrain(config: PretrainConfig) -> Path:
    """Runs pre-training in `config.out` and returns the path of the encoder's weights."""
    device = Device.of(config)
    cache = open_dataset(config)
    seen = subjects(config, cache)
    corpus = Slices(cache, seen)
    dataset = TwoSubjects(cache, seen, config.slices, config.seed)
    log = RunLog(config, "pretrain", device.describe())

    torch.manual_seed(config.seed)
    settings = getattr(config, config.method, None)
    method = METHODS[config.method](config.model, settings, corpus)
    if not (config.out / INITIAL).exists():
        save_encoder(config.out / INITIAL, method.encoder, _about(config, cache, 0))
    if not method.trains:
        log.close()
        save_encoder(config.out / ENCODER, method.encoder, _about(config, cache, 0))
        return config.out / ENCODER
    device.to(method)
    latest: dict[str, Any] = {}

    def step(batch: SliceBatch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        method.before_step(batch.step, config.optim.steps, corpus)
        views = make_views(batch, config, device.device, generator, method.centres)
        with device.autocast():
            outcome = method(views)
        latest.update(views=views, outcome=outcome)
        return outcome.loss, outcome.terms

    watch = CollapseWatch(method, config.out)

    def hook(step: int) -> dict[str, float]:
        # Step 1 too: what comes later is judged against the untrained network, and an embedding
        # can collapse within 50 steps.
        if step > 1 and step % config.monitor_every and step < config.optim.steps:
            return {}
        return watch(latest["views"], latest["outcome"])

    fit(
        method,
        [{"params": list(method.parameters())}],
        step,
        dataset,
        config,
        log,
        device,
        hook,
    )
    log.close()
    save_encoder(config.out / ENCODER, method.encoder, _about(config, cache, config.optim.steps))
    pretraining_figures(config.out, cache, config, method)
    return config.out / ENCODER


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
    return kfold(cache.subjects, config.num_folds, config.split_seed)[config.leave_out_fold].train


def make_views(
    batch: SliceBatch,
    config: PretrainConfig,
    device: torch.device,
    generator: torch.Generator,
    centres: Callable[[Tensor, float, torch.Generator], Tensor | None] | None = None,
) -> Views:
    """Both views of each slice: first view of all n slices, then the second of all."""
    images = batch.images.to(device, non_blocking=True).repeat(2, 1, 1, 1)
    volume, index, depth, sample = (
        column.to(device, non_blocking=True).repeat(2)
        for column in (batch.volume, batch.slice_index, batch.num_slices, batch.sample)
    )
    group = None
    geometry = config.augment.geometry
    if geometry == "auto":
        geometry = METHODS[config.method].geometry
    if geometry == "shared":
        # Scans numbered from 0 within the batch: slices of one scan share their strong transform.
        group = torch.unique(volume, return_inverse=True)[1]
    # Views lie on their slices, or leave them as far as the largest shift brings them.
    field = config.crop / images.shape[-1]
    room = max(1 - field, 2 * field * config.augment.shift)
    views, _ = augment(
        images,
        config.crop,
        config.augment,
        generator,
        group=group,
        centres=centres(sample, room, generator) if centres else None,
    )
    views = views.contiguous(memory_format=torch.channels_last)
    return Views(views, volume, index, depth, sample, generator)


class CollapseWatch:
    """Logs what the method monitors, and warns once of each kind of trouble that it finds."""

    def __init__(self, method: Method, out: Path) -> None:
        self.method = method
        self.path = out / "warnings.txt"
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


def _about(config: PretrainConfig, cache: VolumeCache, step: int) -> dict[str, Any]:
    return {
        "method": config.method,
        "dataset": config.dataset,
        "step": step,
        "seed": config.seed,
        "leave_out_fold": config.leave_out_fold,
        "num_folds": config.num_folds,
        "split_seed": config.split_seed,
        "scans": len(cache.volumes),
    }
