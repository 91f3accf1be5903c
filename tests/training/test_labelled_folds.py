"""Who is trained on and tested on where some scans are labelled and most are not; own splits."""

import json
import re
import shutil
from pathlib import Path

import pytest

from salkernels.training.data.errors import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.splits import kfold, read_splits
from salkernels.training.finetune import finetune, split
from salkernels.training.inputs import open_dataset
from salkernels.training.pretrain import subjects

LABELLED = ["patient002", "patient003", "patient005", "patient006"]


@pytest.fixture
def some(tmp_path):
    """Eight subjects; four have labels, one of them for its first frame alone."""
    data = write_phantom(tmp_path / "data", subjects=8, slices=4, size=32)
    for folder in data.glob("patient*"):
        labels = sorted(folder.glob("*_gt.nii.gz"))
        for path in labels if folder.name not in LABELLED else ():
            path.unlink()
        if folder.name == "patient003":
            labels[1].unlink()
    return data


def test_folds_are_those_of_the_labelled_subjects(some, finetune_config, pretrain_config):
    cache = open_dataset(finetune_config(data=some))
    assert cache.labelled_subjects == LABELLED
    tested = []
    for number, expected in enumerate(kfold(LABELLED, 2, 0)):
        config = finetune_config(data=some, num_folds=2, fold=number, labelled=0)
        fold, labelled = split(config, cache)
        assert (fold, labelled) == (expected, expected.train)
        tested += fold.test
        # Pre-training sees all others, with labels or without.
        seen = subjects(pretrain_config(data=some, num_folds=2, leave_out_fold=number), cache)
        assert set(seen) == set(cache.subjects) - set(fold.test)
    assert sorted(tested) == LABELLED
    assert subjects(pretrain_config(data=some), cache) == tuple(cache.subjects)


def test_training_and_scores_take_the_labelled_scans_alone(some, finetune_config):
    config = finetune_config(data=some, num_folds=2, labelled=0)
    scores = finetune(config)
    fold, labelled = split(config, open_dataset(config))
    result = json.loads((config.out / "results.json").read_text())
    assert (result["labelled"], result["held_out"]) == ([*labelled], [*fold.test])
    scored = {(row["subject"], row["role"]) for row in scores.rows}
    whole = {(name, role) for name in fold.test for role in ("ED", "ES")}
    assert scored == whole - {("patient003", "ES")}


@pytest.mark.parametrize(
    ("left", "k", "reason"),
    [
        (["patient002"], 5, "at least two subjects with labels, got patient002; add label maps"),
        (["patient002", "patient003"], 5, "5 folds: expected 2 to 2.*pass --num_folds"),
    ],
)
def test_too_few_labelled_subjects(some, finetune_config, left, k, reason):
    for path in some.rglob("*_gt.nii.gz"):
        if path.parent.name not in left:
            path.unlink()
    with pytest.raises(DataError, match=reason):
        finetune(finetune_config(data=some, num_folds=k))


def test_no_label_at_all(some, finetune_config, pretrain_config):
    for path in some.rglob("*_gt.nii.gz"):
        path.unlink()
    with pytest.raises(DataError, match="scans without labels"):
        finetune(finetune_config(data=some))
    cache = open_dataset(pretrain_config(data=some))
    left_out = subjects(pretrain_config(data=some, leave_out_fold=0), cache)
    assert left_out == kfold(cache.subjects)[0].train  # nothing to score, but something to leave


def folds(path, *pairs, test="val"):
    path.write_text(json.dumps([{"train": train, test: held} for train, held in pairs]))
    return path


@pytest.mark.parametrize("test", ["val", "test"])
def test_one_s_own_splits(some, finetune_config, pretrain_config, tmp_path, test):
    first = ["patient002", "patient001", "patient006"], ["patient003"]
    second = ["patient003_frame01"], ["patient002", "patient005"]  # a scan stands for its subject
    path = folds(tmp_path / "splits_final.json", first, second, test=test)
    config = finetune_config(data=some, splits=path, fold=0, labelled=0, num_folds=5)
    fold, labelled = split(config, open_dataset(config))
    assert fold.test == ("patient003",)
    assert fold.train == ("patient001", "patient002", "patient006")
    assert labelled == ("patient002", "patient006")  # one has no labels
    config = finetune_config(data=some, splits=path, fold=1, labelled=0)
    fold, labelled = split(config, open_dataset(config))
    assert (labelled, fold.test) == (("patient003",), ("patient002", "patient005"))
    finetune(config)
    result = json.loads((config.out / "results.json").read_text())
    assert result["held_out"] == ["patient002", "patient005"]
    seen = subjects(pretrain_config(data=some, splits=path, leave_out_fold=1), open_dataset(config))
    assert set(seen) == {f"patient00{n}" for n in (1, 3, 4, 6, 7, 8)}


def test_folds_that_a_file_does_not_have(some, finetune_config, tmp_path):
    path = folds(tmp_path / "s.json", (["patient002"], ["patient003"]))
    with pytest.raises(DataError, match="fold is 3, but there are 1 folds"):
        finetune(finetune_config(data=some, splits=path, fold=3))
    with pytest.raises(ValueError, match=r"fold must be in \[0, 3\), got 3"):
        finetune_config(fold=3)


def test_held_out_subjects_without_labels_are_named(some, finetune_config, tmp_path):
    path = folds(tmp_path / "s.json", (["patient002"], ["patient001", "patient003"]))
    with pytest.raises(DataError, match="scans without labels") as caught:
        finetune(finetune_config(data=some, splits=path, labelled=0))
    assert str(caught.value).splitlines()[1:] == ["  patient001"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not readable as JSON"),
        ("[" * 10**5, "not readable as JSON"),
        ("{}", "expected a list of folds"),
        ("[]", "expected a list of folds"),
        ("[3]", "fold 0: expected"),
        ('[{"train": ["a"]}]', "fold 0: val: expected a list of subjects"),
        ('[{"train": [], "val": ["a"]}]', "fold 0: train: expected a list"),
        ('[{"train": "a", "val": ["b"]}]', "fold 0: train: expected a list"),
        ('[{"train": ["a"], "val": ["b", "z"]}]', "fold 0: val: not in the data: 'z'"),
        ('[{"train": ["a", "b"], "val": ["b_es"]}]', "subjects in train and in val.*\n  b"),
    ],
)
def test_files_of_splits_that_do_not_fit(tmp_path, text, reason):
    path = tmp_path / "s.json"
    path.write_text(text)
    scans = {"a_ed": "a", "b_ed": "b", "b_es": "b"}
    with pytest.raises(DataError, match=reason) as caught:
        read_splits(path, scans)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_splits(tmp_path / "none.json", scans)


def test_the_example_of_the_documentation_can_be_fine_tuned_on(some, finetune_config, tmp_path):
    """Its subjects, labels and options, on files of the phantom."""
    text = (Path(__file__).parents[2] / "docs/training/own-data.md").read_text()
    content = json.loads(re.search(r"## Or by hand\s+```json\n(.*?)```", text, re.DOTALL)[1])
    options = re.search(r"--(num_folds) (\d) --(labelled)\s(\d)", text)
    images = sorted(some.glob("*/*_frame01.nii.gz"))
    sources = iter([path for path in images if path.parent.name not in LABELLED])
    labels = iter(sorted(some.glob("*/*_frame01_gt.nii.gz")))
    for row in content["scans"]:
        if "label" in row:
            label = next(labels)
            image = label.with_name(label.name.replace("_gt", ""))
        else:
            image = next(sources)
        for key, source in (("image", image), ("label", label)):
            if key in row:
                (tmp_path / row[key]).parent.mkdir(exist_ok=True)
                shutil.copy(source, tmp_path / row[key])
    content["classes"] = ["background", "RV", "myocardium", "LV"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    numbers = {options[1]: int(options[2]), options[3]: int(options[4])}
    config = finetune_config(dataset="manifest", data=tmp_path, **numbers)
    assert {row["subject"] for row in finetune(config).rows} < {"p01", "p02"}
