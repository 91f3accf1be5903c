"""Pre-training: scans without labels in, an encoder out (paper, Sec. 2.4)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .callable_module import make_callable
from .config import PretrainConfig, require_kind
from .data.cache import VolumeCache
from .data.errors import DataError, listed
from .data.review import notices, spacing_recorded
from .data.sampling import AnySlices, Shard, SliceBatch, TwoSubjects
from .device import Device
from .distributed import (
    first,
    own_folder,
    parallel,
    processes,
    rank,
    synchronise_norms,
    world,
)
from .engine import Look, fit
from .identity import Identity, contents, split_of
from .inputs import open_dataset, subjects, tell
from .methods import METHODS, Method, Outcome, Views
from .models import save_encoder
from .models.weights import ENCODER
from .plugins import used_by
from .progress import say
from .resident import resident, without_loaders
from .runlog import WARNINGS, RunLog, read_metrics
from .steps import Task
from .views import make_views

INITIAL = "encoder_initial.safetensors"


def pretrain(config: PretrainConfig) -> Path:
    """Pre-trains an encoder on scans without labels, as the command `pretrain` does.

    Args:
        config: such as `PretrainConfig.preset("desk", data="acdc", out="runs/sal")`.

    Returns:
        The path of the encoder's weights, `config.out`/encoder.safetensors.

    Raises:
        RunError: `config.out` holds another run; the device does not do.
        DataError: the data cannot be read.
        TypeError: the configuration is that of another kind of run.

    Under torchrun the processes share each step: see `distributed`.
    """
    require_kind(config, PretrainConfig)
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
        self.device, self.cache = device, cache
        self.seen = subjects(config, self.cache)
        self.corpus = Slices(self.cache, self.seen)
        self.log = RunLog(config, "pretrain", self.device.describe(), identity(config, self.cache))
        step = config.slices * config.pairs * world() * config.optim.accumulate
        optim = config.optim.for_slices(len(self.corpus.samples), step)
        self.config = config = replace(config, optim=optim)
        torch.manual_seed(config.seed)
        self.method = METHODS[config.method](config.model, config.settings, self.corpus)
        first(self.keep_start)
        self.device.to(self.method)
        if config.sync_batchnorm and world() > 1:
            synchronise_norms(self.method, self.device.device)
        if config.compile:
            self.method.encoder.compile()  # in place: the keys of the weights stay
        self.module: nn.Module = self.method
        self.latest: tuple[Views, Outcome] | None = None
        self.step = -1  # that the method has been told of
        self.store = resident(cache, config, device.device) if self.method.trains else None

    def fit(self) -> None:
        """All steps."""
        config = self.config
        own = Shard(rank(), world(), config.optim.accumulate)
        read = self.store is None
        draw = TwoSubjects if config.sampling == "subjects" else AnySlices
        self.module = parallel(self.method, self.device.device)
        fit(
            self.module,
            [{"params": list(self.method.parameters())}],
            Task(self.prepare, self.loss),
            draw(self.cache, self.seen, config.slices, config.seed, config.pairs, own, read),
            without_loaders(config, self.store),
            self.log,
            self.device,
            Look(self.due, self.figures),
        )

    def prepare(self, batch: SliceBatch, generator: torch.Generator) -> Views:
        """The views of a batch."""
        if batch.step != self.step:
            self.step = batch.step
            self.method.before_step(batch.step, self.config.optim.steps, self.corpus)
        if self.store is not None:
            batch = self.store.fill(batch)
        return make_views(batch, self.config, self.device.device, generator, self.method.centres)

    def loss(self, views: Views) -> tuple[Tensor, dict[str, Tensor]]:
        with self.device.autocast():
            outcome: Outcome = self.module(views)
        self.latest = views, outcome
        return outcome.loss, outcome.terms

    def due(self, step: int) -> bool:
        """Whether what the method monitors is looked at after this step."""
        # Step 1 too: what comes later is judged against the untrained network, and an embedding
        # can collapse within 50 steps.
        return step in (1, self.config.optim.steps) or step % self.config.monitor_every == 0

    def figures(self, step: int) -> dict[str, float]:
        """What the method monitors."""
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
            "preprocess": asdict(config.preprocess),
            "spacing": spacing_recorded(self.cache),
            "identity": self.log.identity.plain(),
        }


def pretraining_figures(
    out: Path, cache: VolumeCache, config: PretrainConfig, method: Method
) -> None:
    """All figures of a run."""
    from .figures import pretraining  # matplotlib takes seconds, when it is used

    say("drawing figures")
    pretraining(out, cache, config, method)


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
    settings = config.settings
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
        plugins=used_by(config),
    )


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


make_callable(__name__)  # so that `salkernels.training.pretrain` is this module, and the function
