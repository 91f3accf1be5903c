"""The whole job on a phantom, without a download: an experiment of two arms, on one page."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from salkernels._shared.tabular import markdown_table

from .closing import duration, warnings
from .config import FinetuneConfig, PretrainConfig
from .data.phantom import write_phantom
from .device import Device
from .experiment.cells import plan, with_settings
from .experiment.experiment import ExperimentConfig, experiment
from .experiment.summary import Results, collect
from .experiment.tables import TABLES
from .inputs import open_dataset
from .models import load_unet
from .models.weights import MODEL
from .progress import say

SUBJECTS = 12
JOBS = 2  # runs at a time: the random starts do not wait for pre-training
FIGURES = {
    "matches.png": "which pixel of one slice matches which of another, before and after",
    "overlays.png": "outlines on held-out scans, from random weights and from SAL",
}


def demo(
    out: Path, pretraining: PretrainConfig, finetuning: FinetuneConfig, draws: int, command: str
) -> str:
    """Runs all of it below `out`, going on where an earlier demo stopped; returns the page.

    draws: folds on which both ways to start are fine-tuned, with the same labelled subjects.
    """
    began = time.monotonic()
    say(f"drawing a phantom: {SUBJECTS} subjects with a beating heart, in {out / 'phantom'}")
    data = write_phantom(out / "phantom", subjects=SUBJECTS)
    jobs, threads = _share_of_cores()
    common = {"data": data, "cache": out / "cache", "threads": threads}
    config = ExperimentConfig(
        name="demo",
        out=out,
        results=None,
        arms=(),
        labelled=(finetuning.labelled,),
        folds=tuple(range(draws)),
        only_pretrain=False,
        jobs=jobs,
        command=command,
        preset="phantom",
    )
    pretraining = with_settings(pretraining, common)
    finetuning = with_settings(finetuning, common)
    experiment(config, pretraining, finetuning)
    say("drawing outlines")
    _compare(out, finetuning)
    table, folds = TABLES[config.name], {0: config.folds}
    cells = plan(table.arms, config.labelled, folds, out, pretraining, finetuning)
    seconds = time.monotonic() - began
    return page(collect(table, cells), pretraining, finetuning, out, seconds)


def page(
    results: Results,
    pretraining: PretrainConfig,
    finetuning: FinetuneConfig,
    out: Path,
    seconds: float,
) -> str:
    """What came out: a table, two figures, what was learnt, what next."""
    m = finetuning.labelled
    subjects = f"{m} labelled subject{'s' * (m != 1)}" if m else "all labelled subjects"
    told = [f"warning: {text}" for text in warnings(out / "pretrain" / "sal")]
    return "\n".join([
        "",
        f"Two ways to start a U-Net on a phantom: random weights, and SAL "
        f"({pretraining.optim.steps:,} steps without labels).",
        f"Fine-tuned on {subjects} for {finetuning.optim.steps} steps; 3D Dice on those held out, "
        f"mean of {len(results.select('random', m))} folds.",
        "",
        _table(results, m),
        "",
        learnt(results, m),
        *told,
        "",
        *(f"{out / 'figures' / name}  {text}" for name, text in FIGURES.items()),
        f"{out / 'results' / 'demo.md'}  the whole table; {out / 'pretrain' / 'sal'}  the encoder",
        "",
        "Next, on scans of your own (docs/training/own-data.md) or on ACDC:",
        *_activation(),
        "  salkernels-train pretrain --preset desk --data DIR --out runs/sal",
        f"{duration(seconds)}. Settings and phantom are made so that an effect can show in "
        f"minutes: it says nothing about real scans.",
    ])  # fmt: skip


def _activation() -> list[str]:
    """The command that puts `salkernels-train` on the path, where it is not."""
    if shutil.which("salkernels-train"):
        return []
    return [f"  . {Path(sys.prefix) / 'bin' / 'activate'}"]


def _table(results: Results, m: int) -> str:
    """Mean Dice of each class by arm."""
    names = list(results.scores[0].dice)
    rows = [["3D Dice", *names, "mean"]]
    for arm in results.arms:
        found = [results.summary(arm, m, name) for name in (*names, "")]
        rows.append([results.table.arm(arm).label, *(f"{s.mean:.3f}" for s in found if s)])
    return markdown_table(rows)


def learnt(results: Results, m: int) -> str:
    """The paired difference in a sentence, which claims no more than its interval does."""
    found = results.difference("sal", m, "random")
    if found is None:
        return "One fold alone says nothing about the difference: pass --draws 5."
    said = (
        f"SAL less random, paired by fold: {found.mean:+.3f} Dice, 95 % interval "
        f"[{found.low:+.3f}, {found.high:+.3f}], {found.folds} folds of one pre-training."
    )
    if found.low > 0 or found.high < 0:
        better = "better" if found.low > 0 else "worse"
        return f"{said}\nSAL did {better} on these folds; the interval knows one pre-training only."
    return f"{said}\nNo difference can be told: the interval holds 0."


def _share_of_cores() -> tuple[int, int]:
    """Runs at a time, and threads of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = min(JOBS, cores or 1)
    return jobs, max(1, min(4, (cores or 1) // jobs))


def _compare(out: Path, config: FinetuneConfig) -> None:
    """The two pictures: matches, and outlines of fold 0 for both ways to start, side by side."""
    from .figures import overlays  # matplotlib takes seconds, when it is used

    models, held_out = {}, []
    for arm, title in (("random", "random start"), ("sal", "SAL pre-trained")):
        folder = out / "finetune" / arm / f"m{config.labelled or 'all'}_f0"
        models[title], about = load_unet(folder / MODEL)
        held_out = about["held_out"]
    device = Device.of(replace(config, out=out)).exact()
    for model in models.values():
        device.to(model)
    overlays(out, models, open_dataset(config), held_out, device, most=2)
    matches = out / "pretrain" / "sal" / "figures" / "matches.png"
    shutil.copy(matches, out / "figures" / "matches.png")
