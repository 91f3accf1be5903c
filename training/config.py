"""Configuration of the runs: dataclasses that name every setting, with units."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from .augment import AugmentConfig, Geometry
from .data.manifest import dataset_names
from .data.preprocess import PreprocessConfig
from .methods import METHODS, Method
from .models import UNetConfig
from .presets import STARTS, build
from .wording import closest

Config = TypeVar("Config")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SegmentationLoss = Literal["dice+ce", "ce"]


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Args:
        name: "sgd", "adam" or "adamw".
        lr: learning rate after warm-up; it then falls along a cosine.
        final_lr: where the cosine ends, as a fraction of lr.
        momentum: of SGD.
        nesterov: whether that momentum is Nesterov's.
        weight_decay: L2 penalty (SGD, Adam) or decoupled decay (AdamW).
        decay_all: decay biases and norms too, and not only matrices and kernels.
        warmup: share of the steps over which the rate rises linearly from 0.
        clip: largest norm of the gradient; 0 does not clip.
        steps: number of optimiser steps; with `epochs`, at least so many.
        epochs: passes over the slices that training draws from: a run takes epochs · slices / batch
            steps, but no fewer than `steps`, so that its length follows the number of subjects
            while few of them do not end it early. 0: `steps` alone.
        accumulate: k, batches per step on each process. In pre-training a step contrasts the
            samples of all of them, as with k times the processes; that takes a second forward pass.
            Batch norms see one batch at a time. In fine-tuning a step takes the mean of the
            batches' losses, which is not the loss of one large batch (Dice is no mean).
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    final_lr: float = 0.0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    decay_all: bool = False
    warmup: float = 0.05
    clip: float = 5.0
    steps: int = 2500
    epochs: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optim.lr must be a finite number > 0, got {self.lr}")
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("final_lr", "momentum", "weight_decay", "clip", "epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup is a share of the steps in [0, 1), got {self.warmup}")

    def for_slices(self, slices: int, per_step: int) -> OptimConfig:
        """With the steps that a run on so many slices takes, `per_step` of them in each step."""
        return replace(self, steps=max(self.steps, math.ceil(self.epochs * slices / per_step)))


@dataclass
class RunConfig:
    """What every run has.

    Args:
        data: folder of the data set, or the file of a manifest.
        dataset: its layout: "acdc" (which also reads phantoms), "chd", or "manifest".
        out: run folder; everything that the run writes is in it.
        cache: folder of preprocessed slices, shared by runs; by default `cache` beside `out`.
        splits: JSON file of folds, [{"train": [subjects], "val": [subjects]}, ...] as nnU-Net
            writes it, in place of folds that are drawn; `fold` and `leave_out_fold` count in it.
        cine: use all frames of 4D cine files for pre-training where the release has them.
        crop: side of the network's square input in pixels of the cached slices.
        seed: of weights, batches and augmentation.
        device: "auto" takes a GPU if torch sees one; under torchrun each process its own.
        precision: of training; "auto" is bf16 on GPUs that have it, else fp32. Evaluation is in
            fp32.
        threads: CPU threads of torch; 0 leaves torch's choice.
        workers: processes that load slices, per training process; 0 loads in the main one.
        cache_on: where training takes preprocessed slices from: "host" reads each as it is needed,
            "device" puts all into the memory of the device first, "auto" does that where they take
            at most a quarter of a GPU's free memory. Results are the same.
        compile: torch.compile of the encoder, or of the U-Net in fine-tuning. Off: on a CPU (2
            cores, desk) forward and backward took 0.50 s with it and 0.30 s without. Weights and
            checkpoints are the same.
        sync_batchnorm: under torchrun, batch norms over the samples of all processes.
        log_every: steps between two lines of metrics.
        checkpoint_every: steps between two checkpoints.
        loader_warning: seconds without a batch from a loader after which it is said.
        resume: go on from the last checkpoint in `out`.
        allow_mismatch: go on although data, split or encoder are not those that were recorded, or
            test subjects were seen in training; weights and results say so (`mismatches`).
    """

    data: Path | None = None
    dataset: str = "acdc"
    out: Path = Path("runs/run")
    cache: Path | None = None
    splits: Path | None = None
    cine: bool = False
    crop: int = 96
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    threads: int = 0
    workers: int = 0
    cache_on: Literal["auto", "host", "device"] = "auto"
    compile: bool = False
    sync_batchnorm: bool = False
    log_every: int = 25
    checkpoint_every: int = 250
    loader_warning: float = 60.0
    resume: bool = False
    allow_mismatch: bool = False
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    STAGE: ClassVar[str] = "finetune"  # whose presets it starts from

    @classmethod
    def preset(cls: type[Config], name: str, **changes: Any) -> Config:
        """The settings that `--preset NAME` gives on the command line, with changes.

        Args:
            name: "phantom", "mini", "desk", "acdc", "chd" or "pcl".
            changes: settings by name; those of a part as `optim__steps=100`.

        Raises:
            ValueError: there is no such preset, or a value does not do.
            TypeError: there is no such setting.
        """
        kind: Any = cls
        if kind is PretrainConfig:  # with the settings of plug-ins
            kind = pretrain_config()
        made: Config = build(kind, STARTS[kind.STAGE], name, changes)
        return made

    def __post_init__(self) -> None:
        for name in ("data", "out", "cache", "splits", "encoder"):
            if isinstance(value := getattr(self, name, None), str):
                setattr(self, name, Path(value))
        if self.dataset not in dataset_names():
            raise ValueError(
                f"unknown dataset {self.dataset!r}; expected one of {', '.join(dataset_names())}, "
                f"or one of a plug-in"
            )
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 step, got {getattr(self, name)}")
        for name in ("seed", "threads", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.model.in_channels != 1:
            raise ValueError(
                f"model.in_channels must be 1, the channels of a slice of a scan, got "
                f"{self.model.in_channels}; give several sequences of a subject as several scans"
            )
        if not self.loader_warning > 0:
            raise ValueError(f"loader_warning must be > 0 seconds, got {self.loader_warning}")
        stride = self.model.stride
        if self.crop < stride or self.crop % stride:
            raise ValueError(
                f"crop must be a multiple of {stride} for a U-Net of {self.model.depth} levels, "
                f"got {self.crop}"
            )
        if self.crop > self.preprocess.size:
            raise ValueError(
                f"crop ({self.crop}) is larger than the cached slices (preprocess.size "
                f"{self.preprocess.size})"
            )

    def require_fold(self, name: str, number: int, count: int) -> None:
        """Raises a ValueError for a number that no fold has; a file of splits has its own count."""
        if number < 0 or (self.splits is None and number >= count):
            raise ValueError(f"{name} must be in [0, {count}), got {number}")

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out.parent / "cache"

    def data_folder(self) -> Path:
        """The data folder, which a run cannot do without."""
        if self.data is None:
            raise ValueError("no data given: pass --data DIR, the folder of the data set")
        return self.data


MethodSettings = make_dataclass(
    "MethodSettings",
    [
        (name, kind.Settings, field(default_factory=kind.Settings))
        for name, kind in METHODS.items()
        if kind.Settings is not None
    ],
)


@dataclass
class PretrainConfig(RunConfig, MethodSettings):  # type: ignore[misc, valid-type]
    """Pre-training of an encoder on scans without labels.

    Args:
        method: name of the pre-training method.
        slices: n, slices per pair of subjects, half from each; each gives two views.
        pairs: pairs of subjects per batch. The paper has one; k pairs, or one pair on each of k
            processes, or in each of k accumulated batches, are one step over 2k subjects.
        sampling: "subjects", as said; or "slices": n · pairs slices of whatever scans, in shuffled
            passes over all of them, as the public code of PCL draws its batches.
        leave_out_fold: keep the held-out subjects of this fold out of pre-training; by default all
            subjects are used without their labels, as in the paper.
        num_folds: number of folds that leave_out_fold counts in.
        split_seed: of these folds; the same as in fine-tuning, or they are other folds.
        monitor_every: steps between two looks at collapse.

    And the settings of each method, under its name.
    """

    STAGE: ClassVar[str] = "pretrain"

    method: str = "sal"
    slices: int = 16
    pairs: int = 1
    sampling: Literal["subjects", "slices"] = "subjects"
    leave_out_fold: int | None = None
    num_folds: int = 5
    split_seed: int = 0
    monitor_every: int = 50

    @property
    def settings(self) -> Any:
        """Those of the method; None where it has none."""
        return getattr(self, self.method, None)

    @property
    def geometry(self) -> Geometry:
        """How views are transformed: as the method wants it, unless that is set."""
        chosen = self.augment.geometry
        return METHODS[self.method].geometry if chosen == "auto" else chosen

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            close = closest(self.method, METHODS)
            raise ValueError(
                f"unknown method {self.method!r}; expected one of {', '.join(METHODS)}, or one of "
                f"a plug-in" + (f"; did you mean {close[0]}?" if close else "")
            )
        if self.slices < 4 or self.slices % 2:
            raise ValueError(f"slices must be an even number of at least 4, got {self.slices}")
        for name in ("pairs", "monitor_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.leave_out_fold is not None:
            self.require_fold("leave_out_fold", self.leave_out_fold, self.num_folds)
        kind = METHODS[self.method]
        if kind.Settings is not None and self.settings is None:
            raise ValueError(
                f"the settings of {self.method}, a plug-in, are no field of PretrainConfig; make "
                f"the configuration with config.pretrain_config()(...)"
            )
        kind.check(self.settings, self)


def pretrain_config() -> type[PretrainConfig]:
    """PretrainConfig with fields for the settings of all methods known by now: of plug-ins too."""
    own = {field.name for field in fields(PretrainConfig)}
    return _with_settings_of(tuple(item for item in METHODS.items() if item[0] not in own))


@functools.cache
def _with_settings_of(added: tuple[tuple[str, type[Method]], ...]) -> type[PretrainConfig]:
    if not added:
        return PretrainConfig
    own = [
        (name, kind.Settings, field(default_factory=kind.Settings))
        for name, kind in added
        if kind.Settings is not None
    ]
    made: type[PretrainConfig] = make_dataclass("PretrainConfig", own, bases=(PretrainConfig,))
    words = "name of the pre-training method"
    made.__doc__ = str(PretrainConfig.__doc__).replace(
        f"{words}.", f"{words}: {', '.join(METHODS)}."
    )
    made.__module__ = __name__
    return made


@dataclass
class LabelledConfig(RunConfig):
    """What every use of labels has: an encoder, a fold, and M labelled subjects of it.

    Args:
        encoder: pre-trained weights (encoder.safetensors, or the folder of its run); none starts
            from random weights.
        fold: which of the folds is held out for evaluation.
        num_folds: number of folds over subjects.
        labelled: M, labelled subjects used for fine-tuning; 0 uses all of the fold.
        split_seed: of folds and of the draw of labelled subjects; the same for every method.
    """

    encoder: Path | None = None
    fold: int = 0
    num_folds: int = 5
    labelled: int = 2
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        stride = self.model.stride
        if self.preprocess.size % stride:
            # Scans are segmented on the whole canvas: better said now than after the training.
            raise ValueError(
                f"preprocess.size must be a multiple of {stride} for a U-Net of "
                f"{self.model.depth} levels, got {self.preprocess.size}"
            )
        if self.labelled < 0:
            raise ValueError(f"labelled must be >= 1 subjects, or 0 for all, got {self.labelled}")
        self.require_fold("fold", self.fold, self.num_folds)


@dataclass
class ProbeConfig(LabelledConfig):
    """A linear probe on frozen maps of the encoder, scored on the fold's held-out subjects.

    It sees whole slices as they are: `crop`, `augment` and `optim` play no part.

    Args:
        ridge: penalty on the squared weights of standardised features; > 0.
        balance: a pixel of a class with N pixels weighs N to the power of minus this: 0 takes all
            pixels alike, 1 all classes.

    Of nine values the defaults gave an *untrained* encoder the highest Dice on three folds of ACDC
    (`mini`, M = 2: .35, against .18 at balance 0.3 and .30 at 1).
    """

    ridge: float = 0.1
    balance: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge must be a finite number > 0, got {self.ridge}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be in [0, 1], got {self.balance}")


@dataclass
class FinetuneConfig(LabelledConfig):
    """Fine-tuning on a few labelled subjects, then evaluation on the fold's held-out subjects.

    Args:
        batch_size: slices per step.
        loss: "dice+ce", cross-entropy and soft Dice, or "ce", cross-entropy alone.
        encoder_lr: factor on the learning rate of the encoder.
        select: "last" evaluates the last weights; "best-on-test" keeps the weights that did best on
            the held-out subjects, as published code does, which flatters the result.
        select_every: steps between the evaluations of "best-on-test".
        dice: "scans", the mean over scans, or "pooled", over the voxels of all scans together, as
            published code does: a scan then weighs by its size, and a class that it lacks counts
            nothing. Results have both; this is the one that is reported and selected by.
    """

    batch_size: int = 10
    loss: SegmentationLoss = "dice+ce"
    encoder_lr: float = 1.0
    select: Literal["last", "best-on-test"] = "last"
    select_every: int = 100
    dice: Literal["scans", "pooled"] = "scans"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.select_every < 1:
            raise ValueError("batch_size and select_every must be at least 1")
        if self.encoder_lr < 0:
            raise ValueError(f"encoder_lr must be >= 0, got {self.encoder_lr}")


def require_kind(config: object, kind: type[RunConfig]) -> None:
    """Raises a TypeError where a run is given the configuration of another."""
    if not isinstance(config, kind):
        raise TypeError(
            f"config must be a {kind.__name__}, got {type(config).__name__}; "
            f'{kind.__name__}.preset("desk", ...) makes one'
        )
