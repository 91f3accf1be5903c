"""The table of what each preset changes, against the presets themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("nibabel", reason="the training extra is not installed")

from salkernels.training.config import FinetuneConfig, PretrainConfig
from salkernels.training.experiment.cells import with_settings
from salkernels.training.presets import FINETUNE, PRETRAIN

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    sys.modules.pop("presets", None)
    import presets

    return presets


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_every_deviation_is_in_the_table_and_nothing_else(hook):
    head, _, *body = rows(hook.deviations())
    names = [name.strip("`") for name in head[2:]]
    assert names[0] == "pcl"
    assert set(names) == set(PRETRAIN)
    shown = {}
    for setting, stages, reference, *cells in body:
        for stage in stages.split(" and "):
            assert any(cells), setting
            shown[stage, setting.strip("`")] = dict(zip(names[1:], cells, strict=True)), reference
    for stage, presets, base in (
        ("pre-training", PRETRAIN, PretrainConfig()),
        ("fine-tuning", FINETUNE, FinetuneConfig()),
    ):
        configs = {name: with_settings(base, settings) for name, settings in presets.items()}
        for setting in {setting for settings in presets.values() for setting in settings}:
            if setting.startswith(hook.LEFT_OUT):
                continue
            values = {}
            for name, config in configs.items():
                value = config
                for part in setting.split("."):
                    value = getattr(value, part)
                values[name] = value
            differ = {name for name in names[1:] if values[name] != values["pcl"]}
            cells, reference = shown.get((stage, setting), ({}, None))
            assert {name for name, cell in cells.items() if cell} == differ, (stage, setting)
            for name in differ:
                assert cells[name] == hook.shown(values[name])
                assert reference == hook.shown(values["pcl"])


def test_pages_hold_the_tables(hook):
    page = (ROOT / "docs" / "training" / "experiments.md").read_text()
    made = hook.on_page_markdown(page)
    assert "| `augment.rotation` | pre-training | 180 | 30 |" in made
    assert "<!-- deviations -->" not in made
    index = hook.on_page_markdown((ROOT / "docs" / "training" / "index.md").read_text())
    assert "| passes over the labelled slices |" in index
