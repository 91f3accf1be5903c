"""What data and runs say together: splits, scales, meanings of labels, copies of one image."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data.errors import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.errors import RunError
from salkernels.training.experiment.experiment import ExperimentConfig, experiment
from salkernels.training.finetune import finetune
from salkernels.training.identity import read_identity
from salkernels.training.inputs import open_dataset
from salkernels.training.models import load_encoder
from salkernels.training.pretrain import pretrain

ONE = OptimConfig(steps=1)
NAMES = [f"patient00{number}" for number in range(1, 7)]
LABELLED = NAMES[:4]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    monkeypatch.setattr("salkernels.training.finetune.finetuning_figures", lambda *_: None)


@pytest.fixture
def data(tmp_path):
    """Six subjects, two of them without labels."""
    root = write_phantom(tmp_path / "data", subjects=6, slices=4, size=32)
    for name in NAMES[4:]:
        for path in (root / name).glob("*_gt.nii.gz"):
            path.unlink()
    return root


def folds(path, *held_out):
    """A file of splits: each fold trains on all other labelled subjects."""
    path.write_text(json.dumps([
        {"train": [n for n in LABELLED if n not in names], "val": list(names)}
        for names in held_out
    ]))  # fmt: skip
    return path


def test_folds_over_labelled_subjects_are_what_is_recorded(data, finetune_config, pretrain_config):
    start = pretrain_config(data=data, num_folds=2, leave_out_fold=0, optim=ONE)
    pretrain(start)
    strict = read_identity(start.out)
    assert set(strict.held_out) < set(LABELLED)
    assert set(strict.without_labels) == set(NAMES) - set(strict.held_out)
    config = finetune_config(data=data, num_folds=2, labelled=0, optim=ONE, encoder=start.out)
    finetune(config)
    kept = read_identity(config.out)
    assert kept.held_out == strict.held_out
    assert {*kept.with_labels, *kept.held_out} == set(LABELLED)
    other = replace(config, fold=1, out=config.out / "other")
    with pytest.raises(RunError, match=f"seen in pre-training: .*{LABELLED[0]}|{LABELLED[1]}"):
        finetune(other)


def test_labels_that_come_later_change_the_folds_and_are_named(data, finetune_config):
    config = finetune_config(data=data, num_folds=2, labelled=0, optim=ONE)
    finetune(config)
    for path in (data / NAMES[0]).glob("*_gt.nii.gz"):
        path.unlink()
    with pytest.raises(RunError, match=f"other labels of {NAMES[0]}"):
        finetune(replace(config, resume=True))


def test_splits_are_compared_by_content(data, finetune_config, tmp_path):
    path = folds(tmp_path / "a.json", LABELLED[:1], LABELLED[1:2])
    config = finetune_config(data=data, splits=path, labelled=0, optim=ONE)
    finetune(config)
    assert len(read_identity(config.out).split["splits"]) == 64
    again = replace(config, resume=True)
    moved = shutil.move(path, tmp_path / "b.json")
    finetune(replace(again, splits=moved))  # another path, the same folds
    folds(path, LABELLED[1:2], LABELLED[:1])  # the same path, other folds
    named = f"with labels: {', '.join(LABELLED[1:])} then, {LABELLED[0]}, .* now"
    with pytest.raises(RunError, match=named):
        finetune(replace(again, splits=path))


def test_splits_of_pre_training_are_compared_by_content(data, pretrain_config, tmp_path):
    path = folds(tmp_path / "a.json", LABELLED[:1], LABELLED[1:2])
    config = pretrain_config(data=data, splits=path, leave_out_fold=0, optim=ONE)
    pretrain(config)
    folds(path, LABELLED[1:2], LABELLED[:1])
    with pytest.raises(
        RunError, match=f"without labels: {LABELLED[1]}, .* then, {LABELLED[0]}, .* now"
    ):
        pretrain(replace(config, resume=True))


def test_experiments_take_the_folds_of_a_file(data, pretrain_config, finetune_config, tmp_path):
    six = [[name] for name in LABELLED]
    path = folds(tmp_path / "s.json", *six)
    finetuning = finetune_config(data=data, splits=path, num_folds=2, optim=ONE)
    config = ExperimentConfig(
        name="table1", out=tmp_path / "out", results=None, arms=("random",), labelled=(1,),
        folds=(3,), only_pretrain=False, jobs=1, command="test", preset="desk",
    )  # fmt: skip
    experiment(config, pretrain_config(data=data, optim=ONE), finetuning)
    run = read_identity(tmp_path / "out" / "finetune" / "random" / "m1_f3")
    assert run.held_out == (LABELLED[3],)
    folds(path, *reversed(six))
    with pytest.raises(RunError, match=r"trained on with labels: \w+ then, \w+ now"):
        experiment(config, pretrain_config(data=data, optim=ONE), finetuning)


def test_a_copy_of_an_image_under_another_subject_is_named(
    data, pretrain_config, finetune_config, capsys
):
    source = next((data / NAMES[1]).glob("*frame01.nii.gz"))
    target = data / NAMES[4] / source.name.replace(NAMES[1], NAMES[4])
    config = finetune_config(data=data, num_folds=2, labelled=0, optim=ONE)
    finetune(config)
    shutil.copy(source, target)
    said = f"{NAMES[4]}_frame01: its image has the content of that of {NAMES[1]}_frame01"
    for run, again in ((pretrain, pretrain_config(data=data, optim=ONE)), (finetune, config)):
        out = config.out / run.__name__
        run(replace(again, out=out))
        assert said in (out / "data.txt").read_text()
        assert said in capsys.readouterr().err
    out = config.out.parent / "scores" / "held_out"
    command = ["evaluate", f"--model={config.out}", f"--data={data}", f"--out={out}"]
    assert main([*command, "--device=cpu"]) == 0
    assert said in capsys.readouterr().err
    assert said in (out / "data.txt").read_text()


def test_copies_within_a_subject_are_its_own_affair(data, pretrain_config):
    one, two = sorted(p for p in (data / NAMES[4]).glob("*frame??.nii.gz"))
    shutil.copy(one, two)
    assert len(open_dataset(pretrain_config(data=data)).subjects) == 6


def manifest(root, affine, **more):
    """Four subjects with labels 0 and 1, whose headers say what the affine does."""
    root.mkdir(exist_ok=True)
    scans = []
    for number in range(1, 5):
        voxels = np.random.default_rng(number).normal(100, 20, (32, 32, 4)).astype(np.float32)
        label = np.zeros((32, 32, 4), np.uint8)
        label[8:20, 8:20] = 1
        for name, array in ((f"p{number}.nii", voxels), (f"p{number}_seg.nii", label)):
            nib.Nifti1Image(array, affine).to_filename(root / name)
        names = {"image": f"p{number}.nii", "label": f"p{number}_seg.nii"}
        scans.append({"subject": f"p{number}", **names})
    content = {"classes": ["background", "organ"], "scans": scans, **more}
    (root / "manifest.json").write_text(json.dumps(content))
    return root


KNOWN, UNKNOWN = np.diag([1.5, 1.5, 8, 1.0]), np.eye(4)


@pytest.mark.parametrize("trained", ["recorded", "unknown"])
def test_the_scale_of_an_encoder_is_that_of_fine_tuning(
    trained, tmp_path, pretrain_config, finetune_config
):
    affines = [KNOWN, UNKNOWN] if trained == "recorded" else [UNKNOWN, KNOWN]
    one, other = (manifest(tmp_path / n, a) for n, a in zip("ab", affines, strict=True))
    start = pretrain_config(data=one, dataset="manifest", optim=ONE)
    pretrain(start)
    assert load_encoder(start.out)[1]["spacing"] == trained
    config = finetune_config(
        data=other, dataset="manifest", encoder=start.out, labelled=1, optim=ONE
    )
    with pytest.raises(DataError, match=r"pass --preprocess.mixed_spacing true") as caught:
        finetune(config)
    assert all(name in str(caught.value) for name in (str(start.out), "p1_scan", "spacing"))
    finetune(replace(config, preprocess=replace(config.preprocess, mixed_spacing=True)))
    if trained == "recorded":
        stated = replace(config.preprocess, unknown_spacing=1.5)
        finetune(replace(config, preprocess=stated, out=tmp_path / "stated"))
    finetune(replace(config, data=one, out=tmp_path / "same"))


def test_what_a_manifest_says_of_its_files_is_part_of_them(
    tmp_path, pretrain_config, finetune_config
):
    root = manifest(tmp_path / "a", KNOWN)
    start = pretrain_config(data=root, dataset="manifest", optim=ONE)
    pretrain(start)
    config = finetune_config(data=root, dataset="manifest", labelled=1, optim=ONE)
    finetune(config)
    manifest(root, KNOWN, values=[1, 0])
    with pytest.raises(RunError, match="other labels of p1, p2, p3, p4"):
        finetune(replace(config, resume=True))
    pretrain(replace(start, resume=True))  # looks at no label
    manifest(root, KNOWN, spacing=[1.0, 1.0, 8.0])
    for run, again in ((pretrain, start), (finetune, config)):
        with pytest.raises(RunError, match="other images of p1, p2, p3, p4"):
            run(replace(again, resume=True))


def test_a_refused_evaluation_leaves_a_run_as_it_was(data, finetune_config):
    config = finetune_config(data=data, num_folds=2, labelled=0, optim=ONE)
    finetune(config)
    before = {p.name: p.read_bytes() for p in config.out.iterdir() if p.is_file()}
    command = ["evaluate", f"--model={config.out}", f"--data={data}", f"--out={config.out}"]
    assert main([*command, "--device=cpu", "--overwrite"]) == 2
    assert {p.name: p.read_bytes() for p in config.out.iterdir() if p.is_file()} == before


def test_all_subjects_are_not_scored_where_some_were_learnt(data, finetune_config, capsys):
    config = finetune_config(data=data, num_folds=2, labelled=0, optim=ONE)
    finetune(config)
    out = config.out.parent / "scores" / "all"
    command = ["evaluate", f"--model={config.out}", f"--data={data}", f"--out={out}"]
    command += ["--device=cpu", "--subjects", "all"]
    assert main(command) == 2
    learnt = read_identity(config.out).with_labels
    assert f"seen with labels: {', '.join(learnt)}" in capsys.readouterr().err
    assert main([*command, "--allow_mismatch"]) == 0
    assert json.loads((out / "results.json").read_text())["mismatches"]
