"""The whole job on a phantom, without a download: an experiment of two arms, and their outlines."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from .config import FinetuneConfig, PretrainConfig
from .data.phantom import write_phantom
from .device import Device
from .experiment.cells import with_settings
from .experiment.experiment import ExperimentConfig, experiment
from .figures import overlays
from .inputs import open_dataset
from .models import load_unet
from .models.weights import MODEL

SUBJECTS = 12


def demo(
    out: Path, pretraining: PretrainConfig, finetuning: FinetuneConfig, draws: int, command: str
) -> str:
    """Runs all of it below `out`, going on where an earlier demo stopped; returns the table.

    draws: folds on which both ways to start are fine-tuned, with the same labelled subjects.
    """
    began = time.monotonic()
    data = write_phantom(out / "phantom", subjects=SUBJECTS)
    common = {"data": data, "cache": out / "cache"}
    config = ExperimentConfig(
        name="demo",
        out=out,
        results=None,
        arms=(),
        labelled=(finetuning.labelled,),
        folds=tuple(range(draws)),
        only_pretrain=False,
        jobs=1,
        command=command,
        preset="phantom",
    )
    pretraining = with_settings(pretraining, common)
    finetuning = with_settings(finetuning, common)
    table = experiment(config, pretraining, finetuning)
    _compare(out, finetuning)
    minutes = (time.monotonic() - began) / 60
    return (
        f"{table}\n{minutes:.1f} min. Figures: {out / 'results'}, {out / 'figures'}, "
        f"{out / 'pretrain' / 'sal' / 'figures'}\n"
        f"A phantom shows that everything runs; it says nothing about real scans."
    )


def _compare(out: Path, config: FinetuneConfig) -> None:
    """Outlines of fold 0 for both ways to start, side by side."""
    models, held_out = {}, []
    for arm in ("random", "sal"):
        folder = out / "finetune" / arm / f"m{config.labelled or 'all'}_f0"
        models[arm], about = load_unet(folder / MODEL)
        held_out = about["held_out"]
    device = Device.of(replace(config, out=out)).exact()
    for model in models.values():
        device.to(model)
    overlays(out, models, open_dataset(config), held_out, device)
