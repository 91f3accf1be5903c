"""Tables of the presets of training, from the code.

`<!-- presets -->` becomes their main settings, `<!-- deviations -->` all settings in which some
preset differs from `pcl`.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from salkernels.training.config import FinetuneConfig, PretrainConfig
from salkernels.training.presets import FINETUNE, PRETRAIN

# What is shown, and of which run: setting -> words.
SHOWN = (
    ("pretrain", "preprocess.spacing", "pixel in mm"),
    ("pretrain", "preprocess.size", "cached slice, pixels"),
    ("pretrain", "crop", "network input, pixels"),
    ("pretrain", "model.width", "channels of the first level"),
    ("pretrain", "sal.scale", "scale s of LA"),
    ("pretrain", "sal.t", "threshold t"),
    ("pretrain", "slices", "slices n per pre-training step"),
    ("pretrain", "optim.lr", "pre-training rate (SGD)"),
    ("pretrain", "optim.steps", "pre-training steps, at least"),
    ("pretrain", "optim.epochs", "passes over all slices"),
    ("finetune", "batch_size", "slices per fine-tuning step"),
    ("finetune", "optim.name", "fine-tuning optimiser"),
    ("finetune", "optim.lr", "fine-tuning rate"),
    ("finetune", "optim.steps", "fine-tuning steps, at least"),
    ("finetune", "optim.epochs", "passes over the labelled slices"),
)
RUNS: dict[str, tuple[Any, Any]] = {
    "pretrain": (PRETRAIN, PretrainConfig()),
    "finetune": (FINETUNE, FinetuneConfig()),
}
STAGES = {"pretrain": "pre-training", "finetune": "fine-tuning"}
REFERENCE = "pcl"
# Not part of a protocol: how a run is carried out, and what is done where a header has no spacing.
LEFT_OUT = ("method", "workers", "checkpoint_every", "monitor_every", "preprocess.unknown_")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""
    for name, make in (("presets", table), ("deviations", deviations)):
        place = f"<!-- {name} -->"
        markdown = markdown.replace(place, make()) if place in markdown else markdown
    return markdown


def table() -> str:
    names = list(PRETRAIN)
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for run, setting, words in SHOWN:
        values = [shown(value(run, name, setting)) for name in names]
        lines.append(f"| {words} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def deviations() -> str:
    """Each setting in which a preset differs from `pcl`; a cell is empty where it does not."""
    names = [name for name in PRETRAIN if name != REFERENCE]
    rows: dict[str, dict[str, str]] = {}  # setting -> cells -> of which runs
    for run, (presets, _) in RUNS.items():
        for setting in dict.fromkeys(s for name in [REFERENCE, *names] for s in presets[name]):
            reference, *others = (value(run, name, setting) for name in [REFERENCE, *names])
            if setting.startswith(LEFT_OUT) or all(other == reference for other in others):
                continue
            shared = ["" if other == reference else shown(other) for other in others]
            cells = rows.setdefault(setting, {})
            line = " | ".join([shown(reference), *shared])
            cells[line] = f"{cells[line]} and {STAGES[run]}" if line in cells else STAGES[run]
    head = ["setting", "of", f"`{REFERENCE}`", *(f"`{name}`" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for setting, cells in rows.items():
        lines += [f"| `{setting}` | {stages} | {line} |" for line, stages in cells.items()]
    return "\n".join(lines)


def value(run: str, preset: str, setting: str) -> Any:
    """What a preset has for a setting."""
    presets, defaults = RUNS[run]
    return presets[preset].get(setting, reduce(getattr, setting.split("."), defaults))


def shown(value: Any) -> str:
    """A value as a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
