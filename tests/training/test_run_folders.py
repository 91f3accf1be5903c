"""Run folders: results that are not overwritten, records that are damaged, settings that are odd,
caches that nobody uses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from salkernels.training import cli, pretrain
from salkernels.training.checkpoint import load_checkpoint
from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data import pruning
from salkernels.training.data.cache import INDEX, locked
from salkernels.training.data.nifti import DataError
from salkernels.training.data.splits import kfold
from salkernels.training.errors import RunError
from salkernels.training.experiment.audit import own_name, require_own_table
from salkernels.training.experiment.summary import Score, _require_one_partition
from salkernels.training.finetune import finetune
from salkernels.training.inputs import open_dataset
from salkernels.training.runlog import METRICS, RunLog, read_metrics
from salkernels.training.settings import MAX_NESTING, check_yaml, read_settings

ONE = OptimConfig(steps=1)
DEVICE = "--device=cpu"


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)
    monkeypatch.setattr("salkernels.training.finetune.finetuning_figures", lambda *_: None)
    monkeypatch.setattr("salkernels.training.figures.finetuning", lambda *_: None)


@pytest.fixture
def model(finetune_config):
    """A fine-tuned model's run."""
    config = finetune_config(optim=ONE)
    finetune(config)
    return config


def evaluated(model, out, *more):
    return main(
        ["evaluate", f"--model={model.out}", f"--data={model.data}", f"--cache={model.cache}",
         f"--out={out}", DEVICE, *more]
    )  # fmt: skip


def test_scores_do_not_overwrite_a_run_nor_other_scores(model, tmp_path, capsys):
    before = {p: p.read_bytes() for p in model.out.iterdir() if p.is_file()}
    assert evaluated(model, model.out) == 2
    assert str(model.out) in capsys.readouterr().err
    assert evaluated(model, model.out, "--overwrite") == 2  # a run never is
    assert {p: p.read_bytes() for p in model.out.iterdir() if p.is_file()} == before
    assert evaluated(model, tmp_path / "scores") == 0
    assert evaluated(model, tmp_path / "scores") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert evaluated(model, tmp_path / "scores", "--overwrite") == 0


def test_subjects_whose_labels_were_learnt_are_scored_by_hand_only(model, tmp_path, capsys):
    learnt = json.loads((model.out / "results.json").read_text())["labelled"][0]
    assert evaluated(model, tmp_path / "a", "--subjects", learnt) == 2
    assert f"seen with labels: {learnt}" in capsys.readouterr().err
    assert not (tmp_path / "a" / "results.json").exists()
    assert evaluated(model, tmp_path / "a", "--subjects", learnt, "--allow_mismatch") == 0
    result = json.loads((tmp_path / "a" / "results.json").read_text())
    assert learnt in result["mismatches"][0]
    assert main(["show", str(tmp_path / "a")]) == 2  # no run, but scores
    run = json.loads((model.out / "results.json").read_text())
    assert run["mismatches"] == []


def test_a_pre_training_run_is_no_model(pretrain_config, tmp_path, phantom, capsys):
    config = pretrain_config(optim=ONE)
    pretrain.pretrain(config)
    image = next(phantom.rglob("*frame01.nii.gz"))
    words = [f"--model={config.out}", f"--input={image}", f"--out={tmp_path / 'x'}", DEVICE]
    assert main(["predict", *words]) == 2
    said = capsys.readouterr().err
    assert "is a run of pre-training" in said
    assert f"finetune --encoder {config.out}" in said


DAMAGE = {
    "config.yaml": ["", "[1, 2]", "a: [", "\x00\x01", "seed: *a", "- " * 60 + "x"],
    "environment.json": ["", "[]", "{", "\udcff"],
    "metrics.jsonl": ['{"step": 1\n{"step": 2}\n', "3\n{}\n", '{"step": "x"}\n{"step": 2}\n'],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, text) for name, texts in DAMAGE.items() for text in texts]
)
def test_a_damaged_record_is_one_line_with_its_path(name, content, pretrain_config, capsys):
    config = pretrain_config(optim=ONE)
    pretrain.pretrain(config)
    path = config.out / name
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match="damaged") as caught:
        pretrain.pretrain(replace(config, resume=True))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "environment.json":
        assert main(["show", str(config.out)]) == 2
        said = capsys.readouterr().err
        assert str(path) in said.splitlines()[-1]
        assert "Traceback" not in said


def test_a_last_row_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    (tmp_path / METRICS).unlink()
    assert read_metrics(tmp_path) == []


def test_no_space_for_metrics_is_one_line_and_the_run_goes_on_later(pretrain_config, monkeypatch):
    config = pretrain_config(log_every=1, checkpoint_every=1)
    original = RunLog.write

    def full(self, step, values):
        if step == 4:
            path, self._metrics = self._metrics, Path("/dev/full")
            try:
                original(self, step, values)
            finally:
                self._metrics = path
        original(self, step, values)

    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(RunError, match=r"cannot be written: .*No space.*--resume"):
        pretrain.pretrain(config)
    assert load_checkpoint(config.out)["step"] == 3
    monkeypatch.setattr(RunLog, "write", original)
    pretrain.pretrain(replace(config, resume=True))
    assert [row["step"] for row in read_metrics(config.out)] == [1, 2, 3, 4, 5, 6]


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases"),
        ("[" * 100_000, "nesting"),
        ("a: " + "[" * (MAX_NESTING + 1), "nesting"),
        ("x" * (2**20 + 1), "characters"),
        ("&a [*a]", "aliases"),
        ("a: {class_path: os.system}", "no class"),
    ],
    ids=["bomb", "deep", "just too deep", "long", "self", "class"],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_settings_that_expand_without_end_are_refused_at_once(
    command, text, message, tmp_path, capsys
):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(SystemExit):
        main([command, f"--config={path}", f"--out={tmp_path / 'x'}"])
    with pytest.raises(RunError, match=message) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)
    with pytest.raises(yaml.YAMLError, match=message):
        check_yaml(text)
    assert time.monotonic() - began < 10
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge"])
def test_settings_are_files_that_end(kind, tmp_path, capsys):
    path = tmp_path / "settings"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path = Path("/dev/zero")
    for words in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(SystemExit) as stopped:
            main(["pretrain", *words])
        assert stopped.value.code == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["pretrain", "--steps", "5"], "--optim.steps"),
        (["pretrain", "--stpes=5"], "--optim.steps"),
        (["finetune", "--lr", "0.1"], "--optim.lr"),
        (["finetune", "--encodr=x"], "--encoder"),
        (["pretrain", "--sal.lamda_", "1"], "--sal.lambda_"),
        (["experiment", "table1", "--data=x", "--out=y", "--steps=3"], "--pretrain.optim.steps"),
        (["predict", "--model=x", "--input=x", "--outt=y", "--out=z"], "--out"),
    ],
)
def test_a_typo_names_what_may_have_been_meant_in_a_few_lines(words, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}" in said
    assert len(said.splitlines()) <= 4
    assert "[options]" not in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7 TiB for an array"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 7696581394432 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_a_full_memory_is_one_line(error, monkeypatch, capsys):
    def full(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "show", full)
    assert main(["show", "x"]) == 1
    said = capsys.readouterr().err
    assert "the computer's memory is full" in said
    assert "lower slices or batch_size" in said
    assert len(said.splitlines()) == 1


def test_other_errors_of_torch_are_not_called_a_full_memory(monkeypatch):
    def broken(_):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "show", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["show", "x"])


@pytest.mark.slow
def test_a_network_that_does_not_fit_into_memory(phantom, cache_folder, tmp_path):
    """For real, in a process that may take 4 GB of addresses beyond what it starts with."""
    script = (
        "import resource, sys\nimport salkernels.training.pretrain\n"
        "from salkernels.training.cli import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, -1))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "pretrain", "--preset=phantom", "--model.width=2048", f"--data={phantom}", DEVICE,
        f"--cache={cache_folder}", f"--out={tmp_path / 'x'}", "--slices=8", "--precision=fp32",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "memory is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_folds_of_one_subject_and_data_that_are_a_file(phantom, tmp_path, capsys):
    with pytest.raises(DataError, match=r"at least two subjects with labels, got p1"):
        kfold(["p1"])
    image = next(phantom.rglob("*.nii.gz"))
    assert main(["pretrain", f"--data={image}", f"--out={tmp_path / 'x'}"]) == 2
    said = capsys.readouterr().err
    assert f"{image}: expected the folder of acdc, got a file" in said
    assert "--dataset manifest" in said


def test_a_table_is_not_overwritten_by_another_experiment(tmp_path):
    one, two = (own_name(tmp_path / name) for name in ("one", "two"))
    assert own_name(tmp_path / "one") == one != two
    document = tmp_path / "results" / "table1.json"
    require_own_table(document, one)
    document.parent.mkdir()
    document.write_text(json.dumps({"id": one}))
    require_own_table(document, one)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    require_own_table(document, own_name(tmp_path / "moved"))
    for other in ({"id": two}, {}):
        document.write_text(json.dumps(other))
        with pytest.raises(RunError, match="another experiment") as caught:
            require_own_table(document, one)
        assert str(document) in str(caught.value)


def test_results_of_two_partitions_are_not_averaged():
    def score(arm, fold, *held_out):
        return Score(arm, 2, fold, {}, 0.5, ("a",), held_out)

    one = [score("random", 0, "p1", "p2"), score("random", 1, "p3")]
    _require_one_partition([*one, score("sal", 0, "p1", "p2"), score("sal", 1, "p3")])
    with pytest.raises(RunError, match="p2 is tested in fold 0 and in fold 1"):
        _require_one_partition([*one, score("sal", 1, "p2")])


@pytest.fixture
def folder(pretrain_config, tmp_path):
    """Two caches, one unused for 40 days; the rest of a killed build; a folder of someone."""
    where = tmp_path / "caches"
    config = pretrain_config(cache=where)
    young = open_dataset(config).folder
    old = open_dataset(replace(config, preprocess=replace(config.preprocess, size=48))).folder
    then = time.time() - 40 * pruning.DAY
    os.utime(old / INDEX, (then, then))
    dead = where / f".{'0' * 16}.1234.tmp"
    dead.mkdir()
    (dead / "images.npy").write_bytes(b"half")
    (where / "mine").mkdir()
    return where, young, old, dead


def test_caches_are_listed_and_those_that_nobody_uses_are_removed(folder, capsys):
    where, young, old, dead = folder
    assert main(["cache", str(where)]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if old.name in line]
    assert "acdc, 12 scans, 48 pixels" in lines[0]
    assert "40.0 days" in lines[0]
    assert "left by a build that was killed" in said.out
    assert said.err.startswith("3 caches")
    assert old.exists()  # listing removes nothing
    assert main(["cache", str(where), "--prune"]) == 0
    assert not old.exists()
    assert not dead.exists()
    assert young.exists()
    assert (where / "mine").exists()
    assert main(["cache", str(where), "--prune", "--idle=0"]) == 0
    assert not young.exists()
    assert main(["cache", str(where / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_cache_in_the_making_is_not_removed(folder):
    where, _, old, dead = folder
    with locked(where / f".{'0' * 16}.lock"):
        assert [cache.path for cache in pruning.prune(where, 30)] == [old]
    assert dead.exists()


def test_caches_that_this_version_cannot_open_are_removed(folder):
    where, young, _, _ = folder
    (young / INDEX).write_text("{}")
    assert young in [cache.path for cache in pruning.prune(where, 30)]


def test_use_keeps_a_cache(folder, pretrain_config):
    where, _, old, _ = folder
    config = pretrain_config(cache=where)
    open_dataset(replace(config, preprocess=replace(config.preprocess, size=48)))
    assert old not in [cache.path for cache in pruning.prune(where, 30)]
