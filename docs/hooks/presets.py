"""Shows the presets of training as a table: `<!-- presets -->` becomes what the code has."""

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
    ("pretrain", "optim.steps", "pre-training steps"),
    ("finetune", "batch_size", "slices per fine-tuning step"),
    ("finetune", "optim.lr", "fine-tuning rate (AdamW)"),
    ("finetune", "optim.steps", "fine-tuning steps"),
)
RUNS: dict[str, tuple[Any, Any]] = {
    "pretrain": (PRETRAIN, PretrainConfig()),
    "finetune": (FINETUNE, FinetuneConfig()),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page."""
    return markdown.replace("<!-- presets -->", table())


def table() -> str:
    names = list(PRETRAIN)
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for run, setting, words in SHOWN:
        presets, defaults = RUNS[run]
        default = reduce(getattr, setting.split("."), defaults)
        values = [f"{presets[name].get(setting, default):,}" for name in names]
        lines.append(f"| {words} | " + " | ".join(values) + " |")
    return "\n".join(lines)
