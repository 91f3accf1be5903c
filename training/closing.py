"""The last words of a run: how long it took, what came out, what to mind, what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .config import FinetuneConfig, PretrainConfig
from .experiment.audit import OWN
from .experiment.cells import with_settings
from .inputs import NOTES
from .presets import FINETUNE, PresetName
from .runlog import WARNINGS, read_metrics, to_plain

# Settings that fine-tuning shares with pre-training: an encoder fits only where they agree, or they
# say where data and device are.
SHARED = ("dataset", "cache", "splits", "crop", "device", "precision", "threads")
SHARED_GROUPS = ("preprocess.", "model.")


def of_pretraining(
    config: PretrainConfig, encoder: Path, preset: PresetName, seconds: float
) -> str:
    """What to say at the end of pre-training.

    preset: the one that the settings started from, for the next command.
    """
    rows = read_metrics(config.out)
    steps = f"{int(rows[-1]['step']):,} steps of " if rows else ""
    lines = [f"{config.out}: {steps}{config.method}, {duration(seconds)}"]
    if len(rows) > 1:
        names = [name for name in rows[-1] if name in ("loss", "gp", "la", "accuracy")]
        course = (f"{name} {rows[0][name]:.3g} -> {rows[-1][name]:.3g}" for name in names
                  if name in rows[0])  # fmt: skip
        lines += [f"course:   {', '.join(course)}"]
    lines += [f"encoder:  {encoder}"]
    if (config.out / "figures").is_dir():
        lines += [f"figures:  {config.out / 'figures'}"]
    lines += [f"warning:  {text}" for text in warnings(config.out)] or ["warnings: none"]
    if not of_an_experiment(config.out):  # which fine-tunes by itself
        lines += [f"next:     {next_command(config, preset)}"]
    return "\n".join(lines)


def of_an_experiment(out: Path) -> bool:
    """Whether a run's folder lies in that of an experiment."""
    return any((folder / OWN).is_file() for folder in out.absolute().parents[:4])


def warnings(out: Path) -> list[str]:
    """What a run warned of, in its training and of its data."""
    found = []
    for name in (WARNINGS, NOTES):
        if (out / name).is_file():
            found += (out / name).read_text(encoding="utf-8").splitlines()
    return found


def next_command(config: PretrainConfig, preset: PresetName) -> str:
    """Fine-tuning from this encoder, on the data and at the scale that it was trained on."""
    started = _flat(to_plain(with_settings(FinetuneConfig(), FINETUNE[preset])))
    ours = _flat(to_plain(config))
    changed = {
        name: value
        for name, value in ours.items()
        if (name in SHARED or name.startswith(SHARED_GROUPS))
        and name in started
        and value != started[name]
    }
    if config.leave_out_fold is not None:
        changed |= {"fold": config.leave_out_fold}
        for name in ("num_folds", "split_seed"):
            if ours[name] != started[name]:
                changed[name] = ours[name]
    words = ["salkernels-train", "finetune", "--preset", preset, "--data", str(config.data)]
    for name, value in changed.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    out = config.out.with_name(f"{config.out.name}_m2")
    words += ["--labelled", "2", "--encoder", str(config.out), "--out", str(out)]
    return shlex.join(words)


def duration(seconds: float) -> str:
    """A time in words: 142 s, 12 min, 3 h 20 min."""
    if seconds < 200:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {
            f"{prefix}{name}": value
        }  # fmt: skip
    return found
