"""Experiments whose data or encoders change under them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import nibabel as nib
import pytest

from salkernels.training.config import OptimConfig
from salkernels.training.data.phantom import write_phantom
from salkernels.training.errors import RunError
from salkernels.training.experiment import experiment as module
from salkernels.training.experiment.experiment import ExperimentConfig, experiment
from salkernels.training.finetune import finetune
from salkernels.training.pretrain import pretrain

ARMS = ("random", "simclr")


@pytest.fixture(autouse=True)
def runs_in_this_process(monkeypatch):
    """Without processes and figures, which take most of the time."""
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    monkeypatch.setattr("salkernels.training.finetune.finetuning_figures", lambda *_: None)
    monkeypatch.setattr(module, "draw", lambda *_: [])

    def run(cells, out, jobs, finished, *_):
        for cell in cells:
            if not cell.done():
                {"pretrain": pretrain, "finetune": finetune}[cell.command](cell.config)
                finished(cell)

    monkeypatch.setattr(module, "run_cells", run)


@pytest.fixture
def data(tmp_path):
    return write_phantom(tmp_path / "data", subjects=5, slices=4)


@pytest.fixture
def start(pretrain_config, finetune_config, data, tmp_path):
    """Runs the experiment; folds, data and the rest may be other ones."""

    def run(where=data, folds=(0, 1), **changes):
        common = {"data": where, "cache": tmp_path / "cache", "optim": OptimConfig(steps=1)}
        allow = {"allow_mismatch": changes.get("allow_mismatch", False)}
        config = ExperimentConfig(
            name="table1", out=tmp_path / "out", results=None, arms=ARMS, labelled=(1,),
            folds=folds, only_pretrain=False, jobs=1, command="x", preset="phantom",
        )  # fmt: skip
        return experiment(
            replace(config, **changes),
            pretrain_config(**common, **allow),
            finetune_config(**common, **allow),
        )

    return run


def table(tmp_path):
    return json.loads((tmp_path / "out" / "results" / "table1.json").read_text())


def test_more_subjects_do_not_join_the_folds_of_fewer(start, data, tmp_path):
    start(folds=(0,))
    before = table(tmp_path)
    for path in write_phantom(tmp_path / "more", subjects=6, slices=4).iterdir():
        if path.name == "patient006":
            shutil.copytree(path, data / path.name)
    with pytest.raises(RunError, match="new subjects patient006") as caught:
        start(folds=(0, 1))
    assert str(tmp_path / "out") in str(caught.value)
    assert table(tmp_path) == before
    assert before["data"]["subjects"] == 5


def test_a_mismatch_that_is_let_pass_marks_the_table(start, data, tmp_path):
    start(folds=(0,))
    for image in (data / "patient002").glob("*frame??.nii.gz"):
        stored = nib.load(image)
        nib.Nifti1Image(stored.get_fdata() + 1.0, None, stored.header).to_filename(image)
    text = start(folds=(0,), allow_mismatch=True)
    assert "Not all of one piece" in text
    assert "other images of patient002" in text
    assert any("patient002" in mark for mark in table(tmp_path)["mismatches"])


def test_scores_of_an_encoder_that_is_no_more_are_not_kept(start, tmp_path):
    start()
    encoders = tmp_path / "out" / "pretrain" / "simclr"
    kept = tmp_path / "kept"
    encoders.rename(kept)
    with pytest.raises(RunError, match=r"encoder.*is no longer there"):
        start()
    # Another encoder in its place is no better.
    shutil.copytree(kept, encoders)
    start()
    other = tmp_path / "out" / "pretrain" / "simclr" / "encoder.safetensors"
    shutil.copy(encoders / "encoder_initial.safetensors", other)
    with pytest.raises(RunError, match="the encoder was"):
        start()


def test_runs_that_recorded_nothing_are_not_believed(start, tmp_path):
    start(folds=(0,))
    (tmp_path / "out" / "finetune" / "random" / "m1_f0" / "identity.json").unlink()
    with pytest.raises(RunError, match="was not recorded"):
        start(folds=(0,))


def test_two_experiments_do_not_share_a_table(start, tmp_path):
    start(folds=(0,), results=tmp_path / "results")
    before = (tmp_path / "results" / "table1.json").read_text()
    with pytest.raises(RunError, match="another experiment"):
        start(folds=(0,), results=tmp_path / "results", out=tmp_path / "second")
    assert (tmp_path / "results" / "table1.json").read_text() == before
    start(folds=(0, 1), results=tmp_path / "results")  # its own it may


def test_damaged_results_are_one_line_with_the_path(start, tmp_path):
    start(folds=(0,))
    path = tmp_path / "out" / "finetune" / "random" / "m1_f0" / "results.json"
    for content in ("", "{}", '{"dice": 3}', "[]"):
        path.write_text(content)
        with pytest.raises(RunError, match="damaged") as caught:
            start(folds=(0,))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
