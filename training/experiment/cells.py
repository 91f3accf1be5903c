"""The runs that an experiment is made of: where each lies, and whether it has been done."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..augment import AugmentConfig
from ..config import (
    FinetuneConfig,
    LabelledConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
)
from ..methods import METHODS
from ..models.weights import ENCODER
from ..runlog import require_same_settings
from .tables import SCORED, Arm, Endpoint

Config = TypeVar("Config")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. It is done when `product` is in its folder; it can start when `needs` is done."""

    command: str  # "pretrain", "finetune" or "probe"
    config: RunConfig
    product: str
    needs: Path | None = None
    arm: str = ""
    labelled: int = 0
    fold: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        if not self.scored:
            return f"{self.arm}, pretrain{seed}"
        kind = "probe, " if self.command == "probe" else ""
        return f"{self.arm}, {kind}M = {self.labelled or 'all'}, fold {self.fold}{seed}"

    @property
    def scored(self) -> bool:
        """Whether it gives Dice on held-out scans."""
        return self.command != "pretrain"

    @property
    def path(self) -> Path:
        return self.config.out / self.product

    def done(self) -> bool:
        """Whether the run has ended; RunError if it was another run than this one."""
        if not self.path.exists():
            return False
        require_same_settings(self.config.out, self.config)
        return True

    def ready(self) -> bool:
        return self.needs is None or self.needs.exists()


def folds_by_seed(
    seeds: Sequence[int], folds: Sequence[int], rotate: int = 0
) -> dict[int, tuple[int, ...]]:
    """Which folds each seed is scored on: all, or `rotate` of them, the next ones for each seed.

    They depend on the seed and not on which others there are, so that seeds can be added.
    """
    count = rotate or len(folds)
    return {
        seed: tuple(sorted(folds[(seed * rotate + i) % len(folds)] for i in range(count)))
        for seed in seeds
    }


def plan(
    arms: tuple[Arm, ...],
    labelled: tuple[int, ...],
    folds: Mapping[int, tuple[int, ...]],
    out: Path,
    pretraining: PretrainConfig,
    finetuning: FinetuneConfig,
    endpoint: Endpoint = "dice",
) -> list[Cell]:
    """All runs, in the order in which they give complete comparisons soonest.

    folds: seed -> folds. The seed is that of pre-training and of fine-tuning: without the latter
    `Random` would be the same start every time.
    """
    cells = []
    command = SCORED[endpoint]
    scoring = finetuning if endpoint == "dice" else probing(finetuning)
    for seed, own in folds.items():
        starts = {arm.name: _pretraining(arm, seed, out, pretraining) for arm in arms}
        cells += [cell for cell in starts.values() if cell]
        for m, fold, arm in itertools.product(labelled, own, arms):
            start = starts[arm.name]
            config = replace(
                scoring,
                encoder=start.config.out if start else None,
                labelled=m,
                fold=fold,
                seed=seed,
                out=out / command / _folder(arm, seed) / f"m{m or 'all'}_f{fold}",
                resume=True,
            )
            needs = start.path if start else None
            cells.append(Cell(command, config, "results.json", needs, arm.name, m, fold, seed))
    return cells


def _pretraining(arm: Arm, seed: int, out: Path, settings: PretrainConfig) -> Cell | None:
    """The pre-training of an arm; None for one that starts from random weights by itself."""
    if not METHODS[arm.method].trains:
        return None
    folder = out / "pretrain" / _folder(arm, seed)
    own = {"method": arm.method, "out": folder, "seed": seed, "resume": True}
    config = with_settings(settings, {**arm.settings, **own})
    return Cell("pretrain", config, ENCODER, arm=arm.name, seed=seed)


def _folder(arm: Arm, seed: int) -> str:
    return arm.name + (f"_s{seed}" if seed else "")


def probing(finetuning: FinetuneConfig) -> ProbeConfig:
    """The probe on the data and folds of fine-tuning, whatever its training is like."""
    shared = {f.name: getattr(finetuning, f.name) for f in fields(LabelledConfig)}
    unused = {"optim": OptimConfig(), "augment": AugmentConfig(), "precision": "fp32"}
    return ProbeConfig(**{**shared, **unused})


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of a dataclass in which dotted names ("sal.lambda_") have other values."""
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        if not hasattr(config, head):
            raise ValueError(f"{type(config).__name__} has no setting {head!r}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            changes[head] = value
    for head, inner in nested.items():
        changes[head] = with_settings(getattr(config, head), inner)
    assert is_dataclass(config)
    changed: Config = replace(config, **changes)  # type: ignore[type-var]
    return changed
