"""The estimate of node-hours: as many runs as an experiment plans, at the measured seconds."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="the training extra is not installed")

from salkernels.training.config import FinetuneConfig, OptimConfig, PretrainConfig
from salkernels.training.experiment.cells import plan
from salkernels.training.experiment.tables import TABLES
from salkernels.training.presets import FINETUNE, PRETRAIN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    sys.modules.pop("cost", None)
    import cost

    return cost


@pytest.mark.parametrize("names", [("table1",), ("table3",), ("table1", "table3", "table4")])
def test_runs_are_those_of_the_plan(names, cost, tmp_path):
    pretraining = PretrainConfig(crop=96, optim=OptimConfig(steps=PRETRAIN["acdc"]["optim.steps"]))
    finetuning = FinetuneConfig(optim=OptimConfig(steps=FINETUNE["acdc"]["optim.steps"]))
    folds = {0: tuple(range(finetuning.num_folds))}
    cells = {
        cell.config.out: cell
        for name in names
        for cell in plan(
            TABLES[name].arms, TABLES[name].labelled, folds, tmp_path, pretraining, finetuning
        )
    }
    found = cost.cost("acdc", names)
    commands = [cell.command for cell in cells.values()]
    assert found.pretrainings == commands.count("pretrain")
    assert found.finetunings == commands.count("finetune")
    path = ROOT / "benchmarks" / "results" / "cpu-avx2-step.csv"
    with path.open(newline="") as file:
        rows = {(row["preset"], row["part"]): row["seconds"] for row in csv.DictReader(file)}
    second = float(rows["acdc", "step"])
    steps = sum(c.config.optim.steps for c in cells.values() if c.command == "pretrain")
    assert found.pretraining_seconds == pytest.approx(steps * second)
    assert found.hours > found.pretraining_seconds / 3600


def test_fine_tuning_takes_the_steps_of_the_preset(cost):
    """At `acdc` 8,000, or 200 passes where these are more: over 80 subjects of 19 slices."""
    assert [cost.finetuning_steps("acdc", m) for m in (2, 10, 0)] == [8000, 8000, 30400]


def test_fine_tuning_is_scaled_by_operations(cost):
    """A U-Net costs more than its encoder; ten slices of it less than 64 views."""
    for preset in ("acdc", "chd"):
        encoder = cost.measured(preset, "encoder")
        assert encoder * 10 / 64 < cost.finetuning_step(preset) < encoder


def test_the_page_has_the_table(cost):
    page = (ROOT / "docs" / "training" / "cluster.md").read_text(encoding="utf-8")
    shown = cost.on_page_markdown(page)
    assert shown.count("| `acdc` |") == 4
    assert "<!-- node-hours -->" not in shown
