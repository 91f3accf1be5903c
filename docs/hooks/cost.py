"""What the paper's tables cost at full scale: `<!-- node-hours -->` becomes a table of estimates.

Steps are counted from tables and presets, and a step of pre-training is that of
`benchmarks/results`; only a step of fine-tuning is scaled, by counted operations.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from salkernels.training.config import FinetuneConfig, OptimConfig
from salkernels.training.experiment.tables import TABLES
from salkernels.training.methods import METHODS
from salkernels.training.models import Encoder, UNet, UNetConfig
from salkernels.training.presets import FINETUNE, PRETRAIN

STEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-avx2-step.csv"
FOLDS = FinetuneConfig().num_folds
CLASSES = {"acdc": 4, "chd": 8}
# Labelled slices of a subject, on average, and subjects that four of five folds have. ACDC: 1,902
# slices of 100 subjects at ED and ES. CHD was not available to us: its CTs have 130 to 340 slices.
SLICES = {"acdc": 19, "chd": 208}
SUBJECTS = {"acdc": 80, "chd": 54}
GROUPS = (
    ("Table 1", "acdc", ("table1",)),
    ("Table 3", "acdc", ("table3",)),
    ("Table 4", "acdc", ("table4",)),
    ("Tables 1, 3 and 4 in one `--out`", "acdc", ("table1", "table3", "table4")),
    ("Table 2", "chd", ("table2",)),
)


@dataclass(frozen=True)
class Cost:
    """Runs and seconds of an experiment."""

    pretrainings: int
    finetunings: int
    pretraining_seconds: float
    finetuning_seconds: float

    @property
    def hours(self) -> float:
        return (self.pretraining_seconds + self.finetuning_seconds) / 3600


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""
    return markdown.replace("<!-- node-hours -->", table()) if "<!-- node" in markdown else markdown


def cost(preset: Any, names: tuple[str, ...]) -> Cost:
    """Of these tables together; runs that they share are counted once."""
    arms = {arm.name: arm for name in names for arm in TABLES[name].arms}
    pretrainings = sum(METHODS[arm.method].trains for arm in arms.values())
    starts = {
        (arm.name, m) for name in names for arm in TABLES[name].arms for m in TABLES[name].labelled
    }
    steps = FOLDS * sum(finetuning_steps(preset, m) for _, m in starts)
    return Cost(
        pretrainings,
        FOLDS * len(starts),
        pretrainings * PRETRAIN[preset]["optim.steps"] * measured(preset, "step"),
        steps * finetuning_step(preset),
    )


def finetuning_steps(preset: Any, labelled: int) -> int:
    """Those of one run on so many subjects; 0: all of the fold."""
    settings = {
        name: FINETUNE[preset][f"optim.{name}"]
        for name in ("steps", "epochs")
        if f"optim.{name}" in FINETUNE[preset]
    }
    slices = SLICES[preset] * (labelled or SUBJECTS[preset])
    return OptimConfig(**settings).for_slices(slices, batch_size(preset)).steps


def batch_size(preset: Any) -> int:
    size: int = FINETUNE[preset].get("batch_size", FinetuneConfig().batch_size)
    return size


def measured(preset: str, part: str) -> float:
    """Seconds, of benchmarks/results."""
    return next(
        float(row["seconds"]) for row in _rows() if (row["preset"], row["part"]) == (preset, part)
    )


@cache
def finetuning_step(preset: Any) -> float:
    """Seconds: the encoder's in a step of pre-training, times the ratio of the operations."""
    width, crop = PRETRAIN[preset]["model.width"], PRETRAIN[preset]["crop"]
    views = next(int(row["batch"]) for row in _rows() if row["preset"] == preset)
    with torch.device("meta"):
        config = UNetConfig(width=width)
        encoder, unet = Encoder(config), UNet(config, CLASSES[preset])
        image = torch.empty(1, 1, crop, crop)
    ratio = _operations(unet, image) / _operations(encoder, image)
    return measured(preset, "encoder") / views * batch_size(preset) * ratio


def table() -> str:
    """Markdown."""
    lines = ["| | preset | pre-trainings | fine-tunings | node-hours | of which pre-training |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for title, preset, names in GROUPS:
        found = cost(preset, names)
        share = found.pretraining_seconds / 3600
        lines.append(
            f"| {title} | `{preset}` | {found.pretrainings} | {found.finetunings} | "
            f"{found.hours:,.0f} | {share:,.0f} |"
        )
    row = next(row for row in _rows() if row["preset"] == "acdc")
    steps = ", ".join(
        f"`{preset}` {measured(preset, 'step'):.0f} s (measured) and "
        f"{finetuning_step(preset):.0f} s (scaled)"
        for preset in ("acdc", "chd")
    )
    first = cost("acdc", ("table1",)).hours / measured("acdc", "step")
    return "\n".join([
        *lines, "",
        f"On a node whose step of pre-training takes s seconds at `acdc`, Table 1 takes "
        f"{first:,.0f} × s node-hours, if fine-tuning is as many times faster.", "",
        f"*A node: {row['cores']} cores of {row['processor']}, fp32, torch {row['torch']}, commit "
        f"{row['commit']}. A step of pre-training and one of fine-tuning: {steps}.*",
    ])  # fmt: skip


def _operations(network: torch.nn.Module, image: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops()


@cache
def _rows() -> list[dict[str, str]]:
    with STEPS.open(newline="") as file:
        return list(csv.DictReader(file))
