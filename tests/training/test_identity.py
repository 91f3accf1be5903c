"""What a run believes in: data, split and encoder are compared, and differences are named."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.checkpoint import LAST, load_checkpoint
from salkernels.training.config import OptimConfig
from salkernels.training.data.phantom import write_phantom
from salkernels.training.errors import RunError
from salkernels.training.finetune import finetune, identity, split
from salkernels.training.identity import (
    FILE,
    Identity,
    contents,
    differences,
    read_identity,
    require_unseen,
    same_names,
    seen_before,
)
from salkernels.training.inputs import open_dataset
from salkernels.training.models import load_encoder, load_unet
from salkernels.training.pretrain import pretrain

ONE = OptimConfig(steps=1)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    monkeypatch.setattr("salkernels.training.finetune.finetuning_figures", lambda *_: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("data") / "set", subjects=6, slices=4)


@pytest.fixture
def data(template, tmp_path):
    return shutil.copytree(template, tmp_path / "data")


def files(data, subject, kind="image"):
    found = sorted((data / subject).glob("*frame*.nii.gz"))
    return [path for path in found if ("_gt" in path.name) == (kind == "label")]


def alter(data, subject, kind="image"):
    """One voxel of a subject's files becomes another; the dates stay what they were."""
    for path in files(data, subject, kind):
        before = path.stat()
        stored = nib.load(path)
        voxels = np.asanyarray(stored.dataobj).copy()
        voxels[0, 0, 0] = 1 - voxels[0, 0, 0]
        nib.Nifti1Image(voxels, None, stored.header).to_filename(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def begun(pretrain_config, data, tmp_path):
    """A run of pre-training that has ended, and could be resumed."""
    config = pretrain_config(data=data, cache=tmp_path / "cache", optim=ONE)
    pretrain(config)
    return replace(config, resume=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: alter(data, "patient003"), "other images of patient003"),
        (lambda data: shutil.rmtree(data / "patient002"), "subjects that are gone patient002"),
        (
            lambda data: (data / "patient004").rename(data / "patient014"),
            "new subjects patient014; subjects that are gone patient004",
        ),
    ],
    ids=["replaced", "removed", "renamed"],
)
def test_pretraining_does_not_go_on_with_other_data(begun, data, change, named):
    pretrain(begun)  # the same data: nothing to say
    if named.startswith("new"):
        for path in (data / "patient004").iterdir():
            path.rename(path.with_name(path.name.replace("patient004", "patient014")))
    change(data)
    with pytest.raises(RunError, match=named) as caught:
        pretrain(begun)
    assert "--allow_mismatch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mismatch_that_is_let_pass_marks_checkpoint_weights_and_folder(begun, data):
    alter(data, "patient003")
    pretrain(replace(begun, allow_mismatch=True))
    marks = ("other images of patient003",)
    assert read_identity(begun.out).mismatches == marks
    assert load_encoder(begun.out)[1]["identity"]["mismatches"] == [*marks]
    # The folder now says what is used now, but the checkpoint is of other data still.
    with pytest.raises(RunError, match="other images of patient003"):
        pretrain(begun)


def test_the_checkpoint_itself_says_of_which_data_it_is(begun, pretrain_config, tmp_path, data):
    other = shutil.copytree(data, tmp_path / "other")
    alter(other, "patient005")
    config = pretrain_config(data=other, out=tmp_path / "b", cache=tmp_path / "cache", optim=ONE)
    pretrain(config)
    shutil.copy(begun.out / LAST, config.out / LAST)
    with pytest.raises(RunError, match="other images of patient005"):
        pretrain(replace(config, resume=True))
    assert load_checkpoint(begun.out)["identity"]["dataset"] == "acdc"


def test_labels_matter_to_fine_tuning_alone(begun, finetune_config, data, tmp_path):
    config = finetune_config(data=data, cache=tmp_path / "cache", optim=ONE)
    finetune(config)
    alter(data, "patient003", "label")
    pretrain(begun)
    with pytest.raises(RunError, match="other labels of patient003"):
        finetune(replace(config, resume=True))


def test_another_encoder_under_the_same_name_is_another_run(
    pretrain_config, finetune_config, tmp_path
):
    start = pretrain_config(optim=ONE)
    pretrain(start)
    config = finetune_config(encoder=start.out, optim=ONE)
    finetune(config)
    shutil.rmtree(start.out)
    pretrain(replace(start, optim=OptimConfig(steps=2)))
    with pytest.raises(RunError, match=r"the encoder was [0-9a-f]{12}, and is [0-9a-f]{12}"):
        finetune(replace(config, resume=True))


def test_two_releases_of_equal_size_and_date_are_two(pretrain_config, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    alter(other, "patient003")  # copytree keeps dates, and phantoms sizes differ ...
    for path in files(other, "patient003"):  # ... so one bit of a voxel that gzip leaves in place
        shutil.copy2(data / path.relative_to(other), path)
        before, content = path.stat(), bytearray(path.read_bytes())
        content[4] ^= 1  # the time stamp in gzip's header: size and voxels stay
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        twin = (data / path.relative_to(other)).stat()
        assert (twin.st_size, twin.st_mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    config = pretrain_config(cache=tmp_path / "cache")
    one, two = (open_dataset(replace(config, data=folder)) for folder in (data, other))
    assert one.key != two.key
    found = [n for n, c in contents(one).items() if contents(two)[n] != c]
    assert found == ["patient003"]


def test_run_folders_and_weights_say_who_was_seen_and_how(
    pretrain_config, finetune_config, tmp_path
):
    start = pretrain_config(leave_out_fold=1, num_folds=3, optim=ONE)
    pretrain(start)
    finetune(finetune_config(encoder=start.out, fold=1, optim=ONE))
    about = load_unet(tmp_path / "finetune")[1]
    own = Identity.of(about["identity"])
    assert own == read_identity(tmp_path / "finetune")
    fold, labelled = split(finetune_config(fold=1), open_dataset(finetune_config()))
    assert (own.with_labels, own.held_out) == (labelled, fold.test)
    inner = Identity.of(own.encoder["identity"])
    assert inner == read_identity(start.out)
    assert inner.strict
    assert inner.without_labels == fold.train
    result = json.loads((tmp_path / "finetune" / "results.json").read_text())
    assert result["identity"]["data"] == own.plain()["data"]
    assert result["mismatches"] == []
    assert "subjects" not in json.dumps(result)


def test_the_hash_is_of_beliefs_and_not_of_marks():
    one = Identity("acdc", {"a": {"scans": "1", "labels": None, "images": ["1"]}}, ("a",))
    assert one.plain()["hash"] == replace(one, mismatches=("x",)).plain()["hash"]
    assert one.plain()["hash"] != replace(one, held_out=("b",)).plain()["hash"]
    assert Identity.of(json.loads(json.dumps(one.plain()))) == one
    assert differences(one, one, labels=True) == []


@pytest.mark.parametrize("content", ["", "[]", "{", "{}", '{"subjects": {"a": 3}}', "\x00\x01"])
def test_a_damaged_identity_is_one_line_with_the_path(content, begun):
    (begun.out / FILE).write_text(content)
    with pytest.raises(RunError, match="is damaged") as caught:
        pretrain(begun)
    assert str(begun.out / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def person(*images):
    return {"scans": "-".join(images), "labels": "x", "images": [*images]}


TESTED = Identity("acdc", {"p1": person("a"), "p2": person("b"), "p3": person("c")})


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # By content, whatever the name and the data set.
        (Identity("x", {"q": person("b")}, with_labels=("q",)), ["seen with labels: p2"]),
        # By name, where the data sets have an image in common.
        (
            Identity("acdc", {"p1": person("new"), "p3": person("c")}, with_labels=("p1",)),
            ["seen with labels: p1"],
        ),
        # Unrelated people of the same names.
        (Identity("acdc", {"p1": person("y"), "p2": person("z")}, with_labels=("p1",)), []),
        # Without labels, as in the paper; and where that was to be avoided.
        (Identity("acdc", TESTED.subjects, without_labels=("p1",)), []),
        (
            Identity("acdc", TESTED.subjects, without_labels=("p1",), strict=True),
            ["seen in pre-training: p1"],
        ),
    ],
)
def test_who_was_seen_is_known_by_content_and_by_name_within_a_data_set(seen, expected):
    assert seen_before(TESTED, ["p1", "p2"], seen) == expected
    # One generation on, nothing is forgotten.
    later = Identity("other", {}, encoder={"sha256": "0", "identity": seen.plain()})
    assert seen_before(TESTED, ["p1", "p2"], later) == expected


def test_the_same_names_in_unrelated_data_are_said(capsys, tmp_path):
    seen = Identity("acdc", {"p1": person("y")}, with_labels=("p1",))
    assert same_names(TESTED, ["p1", "p2"], seen) == ["p1"]
    about = {"identity": seen.plain()}
    assert require_unseen(TESTED, ["p1"], tmp_path / "m", about, allow=False) == []
    assert "other images under the same names (p1)" in capsys.readouterr().err


def test_weights_without_a_record_are_believed_by_what_they_say(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(RunError, match="seen with labels: p2"):
        require_unseen(TESTED, ["p1", "p2"], path, {"labelled": ["p2"]}, allow=False)
    with pytest.raises(RunError, match="does not say whom"):
        require_unseen(TESTED, ["p1"], path, {"leave_out_fold": 0}, allow=False)
    assert require_unseen(TESTED, ["p1"], path, {"leave_out_fold": None}, allow=False) == []
    marks = require_unseen(TESTED, ["p2"], path, {"labelled": ["p2"]}, allow=True)
    assert marks == ["model.safetensors: seen with labels: p2"]


def test_an_encoder_of_unrelated_data_serves_any_fold(
    pretrain_config, finetune_config, tmp_path, template
):
    """A fold left out elsewhere says nothing about this one."""
    other = write_phantom(tmp_path / "elsewhere", subjects=4, slices=4, seed=9)
    start = pretrain_config(data=other, leave_out_fold=0, num_folds=2, optim=ONE)
    pretrain(start)
    scores = finetune(finetune_config(encoder=start.out, fold=1, data=template, optim=ONE))
    assert scores.rows


def test_a_fine_tuned_model_is_no_encoder_for_the_fold_of_its_subjects(finetune_config, tmp_path):
    first = finetune_config(labelled=0, optim=ONE)
    finetune(first)
    path = first.out / "model.safetensors"
    second = finetune_config(fold=1, out=tmp_path / "second", encoder=path, optim=ONE)
    learnt = set(split(first, open_dataset(first))[1])
    tested = set(split(second, open_dataset(second))[0].test)
    with pytest.raises(RunError, match=f"seen with labels: {sorted(learnt & tested)[0]}"):
        finetune(second)
    assert not second.out.exists()
    finetune(replace(second, allow_mismatch=True))
    result = json.loads((second.out / "results.json").read_text())
    assert "seen with labels" in result["mismatches"][0]
    # Its marks go on into whatever is made from it.
    third = finetune_config(
        fold=1, out=tmp_path / "third", encoder=second.out, labelled=1, allow_mismatch=True
    )
    marked = identity(third, open_dataset(third), load_encoder(second.out)[1])
    assert result["mismatches"][0] in marked.mismatches
