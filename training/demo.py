"""The whole job on a phantom, without a download: pre-train, fine-tune with and without."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from .config import FinetuneConfig, PretrainConfig, RunConfig
from .data.phantom import write_phantom
from .device import Device
from .errors import RunError
from .figures import dice_bars, overlays
from .finetune import finetune
from .inputs import open_dataset
from .models import load_unet
from .models.weights import ENCODER, MODEL
from .pretrain import pretrain
from .runlog import require_same_settings
from .settings import read_record


def demo(out: Path, pretraining: PretrainConfig, finetuning: FinetuneConfig, draws: int) -> str:
    """Runs all of it below `out`, going on where an earlier demo stopped; returns the table.

    draws: folds on which both ways to start are fine-tuned, with the same labelled subjects.
    """
    began = time.monotonic()
    data = write_phantom(out / "phantom", subjects=12)
    pretraining = replace(pretraining, data=data, out=out / "pretrain", cache=out / "cache")
    finetuning = replace(finetuning, data=data, cache=out / "cache")
    if not _finished(pretraining, ENCODER):
        pretrain(replace(pretraining, resume=(pretraining.out / "config.yaml").exists()))
    starts = {"random": None, "sal": pretraining.out}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in starts}
    for fold in range(draws):
        for name, encoder in starts.items():
            run = out / f"finetune_{name}_fold{fold}"
            config = replace(finetuning, encoder=encoder, out=run, fold=fold)
            if not _finished(config, "results.json"):
                finetune(replace(config, resume=(run / "config.yaml").exists()))
            results[name].append(read_record(run / "results.json")["dice"])
    dice_bars(out / "figures" / "dice.png", results)
    _compare(out, finetuning, list(starts))
    table = markdown(results)
    (out / "results.md").write_text(table + "\n")
    minutes = (time.monotonic() - began) / 60
    return (
        f"{table}\n\n{draws} draws of {finetuning.labelled} labelled subjects, phantom data, "
        f"{minutes:.1f} min. Figures: {out / 'figures'}, {pretraining.out / 'figures'}\n"
        f"A phantom shows that everything runs; it says nothing about real scans."
    )


def _finished(config: RunConfig, last: str) -> bool:
    """Whether an earlier demo has done this run; one with other settings is not passed for it."""
    done = (config.out / last).exists()
    if done:
        require_same_settings(config.out, config)
    return done


def markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean (standard deviation) of Dice over the draws, one line per way to start."""
    classes = [*next(iter(results.values()))[0]]
    lines = [
        "| start | " + " | ".join([*classes, "mean Dice"]) + " |",
        "| --- |" + " --- |" * (len(classes) + 1),
    ]
    for name, draws in results.items():
        columns = [[draw[c] for draw in draws] for c in classes]
        columns.append([float(np.mean([*draw.values()])) for draw in draws])
        cells = [f"{np.mean(c):.3f} ({np.std(c):.3f})" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compare(out: Path, config: FinetuneConfig, starts: list[str]) -> None:
    """Outlines of fold 0 for both ways to start, side by side."""
    models, held_out = {}, []
    for name in starts:
        models[name], about = load_unet(out / f"finetune_{name}_fold0" / MODEL)
        held_out = about["held_out"]
    if not held_out:
        raise RunError("the models name no held-out subjects")
    device = Device.of(config).exact()
    for model in models.values():
        device.to(model)
    overlays(out, models, open_dataset(config), held_out, device)
