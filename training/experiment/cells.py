"""The runs that an experiment is made of: where each lies, and whether it has been done."""

from __future__ import annotations

from collections.abc import Mapping
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

    @property
    def name(self) -> str:
        if not self.scored:
            return f"{self.arm}, pretrain"
        kind = "probe, " if self.command == "probe" else ""
        return f"{self.arm}, {kind}M = {self.labelled or 'all'}, fold {self.fold}"

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


def plan(
    arms: tuple[Arm, ...],
    labelled: tuple[int, ...],
    folds: tuple[int, ...],
    out: Path,
    pretraining: PretrainConfig,
    finetuning: FinetuneConfig,
    endpoint: Endpoint = "dice",
) -> list[Cell]:
    """All runs, in the order in which they give complete comparisons soonest."""
    cells = []
    command = SCORED[endpoint]
    scoring = finetuning if endpoint == "dice" else probing(finetuning)
    encoders: dict[str, Path | None] = {}
    for arm in arms:
        encoders[arm.name] = None
        if not METHODS[arm.method].trains:
            continue  # fine-tuning starts from the same weights by itself
        folder = out / "pretrain" / arm.name
        start = with_settings(
            pretraining, {**arm.settings, "method": arm.method, "out": folder, "resume": True}
        )
        encoders[arm.name] = folder
        cells.append(Cell("pretrain", start, ENCODER, arm=arm.name))
    for m in labelled:
        for fold in folds:
            for arm in arms:
                encoder = encoders[arm.name]
                config = replace(
                    scoring,
                    encoder=encoder,
                    labelled=m,
                    fold=fold,
                    out=out / command / arm.name / f"m{m or 'all'}_f{fold}",
                    resume=True,
                )
                needs = encoder / ENCODER if encoder else None
                cells.append(Cell(command, config, "results.json", needs, arm.name, m, fold))
    return cells


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
