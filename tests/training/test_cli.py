"""Every subcommand on a tiny phantom, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from salkernels.training.cli import COMMANDS, main
from salkernels.training.config import FinetuneConfig, PretrainConfig
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.presets import FINETUNE, PRETRAIN

TINY = [
    "--preset=phantom", "--crop=32", "--preprocess.size=32", "--preprocess.spacing=4",
    "--model.width=4", "--model.depth=4", "--device=cpu",
]  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(phantom, cache_folder, tmp_path_factory):
    """A pre-training run and a fine-tuning run that starts from it, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*TINY, f"--data={phantom}", f"--cache={cache_folder}"]
    assert main(
        ["pretrain", *common, f"--out={folder / 'pre'}", "--optim.steps=6", "--slices=8",
         "--method=sal", "--dataset=acdc", "--monitor_every=3"]
    ) == 0  # fmt: skip
    assert main(
        ["finetune", *common, f"--out={folder / 'fine'}", "--optim.steps=6", "--num_folds=3",
         f"--encoder={folder / 'pre'}", "--select=best-on-test", "--select_every=3",
         "--optim.epochs=0"]
    ) == 0  # fmt: skip
    return folder


def test_pretraining_leaves_a_folder_that_explains_itself(runs):
    out = runs / "pre"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == "sal"
    assert config["model"]["width"] == 4
    environment = json.loads((out / "environment.json").read_text())
    assert environment["kind"] == "pretrain"
    assert environment["packages"]["torch"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6
    assert {"loss", "gp", "la", "lr", "la_pairs", "la_control", "cosine_embedding"} <= set(rows[-1])
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "checkpoints" / "last.pt").is_file()
    for name in ("curves", "input_slices", "matches"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000


def test_finetuning_reports_dice_and_what_it_was_measured_on(runs):
    result = json.loads((runs / "fine" / "results.json").read_text())
    assert set(result["dice"]) == {"RV", "myocardium", "LV"}
    assert result["select"] == "best-on-test"
    assert len(result["labelled"]) == 2
    assert len(result["held_out"]) == 2
    assert not set(result["labelled"]) & set(result["held_out"])
    assert (runs / "fine" / "figures" / "overlays.png").stat().st_size > 10_000


def test_evaluate_repeats_the_result(runs, phantom, cache_folder, tmp_path, capsys):
    arguments = [f"--model={runs / 'fine'}", f"--data={phantom}", f"--cache={cache_folder}"]
    assert main(["evaluate", *arguments, f"--out={tmp_path / 'again'}", "--device=cpu"]) == 0
    before = json.loads((runs / "fine" / "results.json").read_text())
    after = json.loads((tmp_path / "again" / "results.json").read_text())
    assert after["dice"] == before["dice"]
    assert "mean Dice" in capsys.readouterr().out
    some = ["--subjects", "patient001", "patient003", f"--out={tmp_path / 'some'}"]
    assert main(["evaluate", *arguments, *some, "--device=cpu"]) == 0
    chosen = json.loads((tmp_path / "some" / "results.json").read_text())["evaluated"]
    assert chosen == ["patient001", "patient003"]
    assert main(["evaluate", *arguments, "--subjects", "patient099", f"--out={tmp_path}"]) == 2
    assert "patient099: no such subject among 6" in capsys.readouterr().err


def test_predict_writes_one_label_map_per_image(runs, phantom, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    source = next(phantom.rglob("patient*_frame01.nii.gz"))
    for name in ("a.nii.gz", "b.nii.gz"):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "broken.nii.gz").write_bytes(source.read_bytes()[:200])
    out = tmp_path / "labels"
    arguments = ["predict", f"--model={runs / 'fine'}", f"--input={folder}", f"--out={out}"]
    assert main([*arguments, "--device=cpu"]) == 2
    said = capsys.readouterr()
    assert "2 label maps" in said.out
    assert "broken.nii.gz" in said.err
    image, labels = nib.load(source), nib.load(out / "a_pred.nii.gz")
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert labels.shape == image.shape
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1, 2, 3}
    assert main(arguments) == 2
    assert "already there" in capsys.readouterr().err


def test_show_prints_the_run_and_its_figures(runs, capsys, tmp_path):
    assert main(["show", str(runs / "fine")]) == 0
    said = capsys.readouterr().out
    assert "mean Dice" in said
    assert "curves.png" in said
    assert main(["show", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert main(["show", str(runs)]) == 2
    assert "the runs in it are fine, pre" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(runs, phantom, cache_folder, capsys):
    arguments = ["pretrain", *TINY, f"--data={phantom}", f"--cache={cache_folder}", "--slices=8"]
    before = (runs / "pre" / "encoder.safetensors").read_bytes()
    assert main([*arguments, f"--out={runs / 'pre'}", "--optim.steps=6"]) == 2
    assert "already holds a run; pass --resume" in capsys.readouterr().err
    assert main([*arguments, f"--out={runs / 'pre'}", "--optim.steps=9", "--resume=true"]) == 2
    assert "optim.steps: 6 then, 9 now" in capsys.readouterr().err
    assert (runs / "pre" / "encoder.safetensors").read_bytes() == before


def test_a_saved_configuration_is_a_settings_file(runs, tmp_path, capsys):
    saved = yaml.safe_load((runs / "pre" / "config.yaml").read_text())
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(saved))
    out = tmp_path / "repeat"
    # The command line counts more than the file, whichever comes first.
    assert main(["pretrain", f"--out={out}", "--config", str(path), "--optim.steps=2"]) == 0
    again = yaml.safe_load((out / "config.yaml").read_text())
    assert again["optim"] == {**saved["optim"], "steps": 2}
    assert again["model"] == saved["model"]
    path.write_text("preset: acdc\n")
    with pytest.raises(SystemExit):
        main(["pretrain", f"--config={path}"])
    assert "preset is for the command line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.learning_rate=1"], "learning_rate"),
        (["--preset=laptop"], "laptop"),
        (["--dataset=brats"], "expected one of acdc, chd"),
        (["--method=dino"], "expected one of random, rotation"),
        (["--crop=50"], "multiple of 16"),
        (["--optim.lr=-1"], "optim.lr must be a finite number > 0"),
        (["--sal.window_size=99"], "larger than the 12 x 12 map"),
        (["--seed=-1"], "seed must be >= 0, got -1"),
        (["--leave_out_fold=5"], "leave_out_fold must be in [0, 5), got 5"),
        ([], "pass --data DIR"),
        (["--data=/nowhere"], "/nowhere"),
    ],
)
def test_wrong_settings_are_named(arguments, message, capsys, tmp_path):
    try:
        code = main(["pretrain", f"--out={tmp_path / 'x'}", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_switches_need_no_value():
    from salkernels.training.cli import _spell_out

    given = ["pretrain", "--resume", "--cine", "false", "--seed", "1", "--resume"]
    spelt = ["pretrain", "--resume", "true", "--cine", "false", "--seed", "1", "--resume", "true"]
    assert _spell_out(given) == spelt


def test_without_arguments_the_subcommands_are_listed(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_more_draws_than_folds_are_refused_before_anything_is_run(tmp_path, capsys):
    assert main(["demo", "--draws=6", f"--out={tmp_path / 'demo'}"]) == 2
    assert "draws must be 1 to 5" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_unknown_key_in_a_settings_file(tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text("optim:\n  lr: 0.1\n  rate: 3\n")
    with pytest.raises(SystemExit):
        main(["pretrain", f"--config={path}"])
    assert "rate" in capsys.readouterr().err


def test_an_encoder_of_another_size_is_explained(runs, phantom, cache_folder, tmp_path, capsys):
    arguments = ["finetune", *TINY, f"--data={phantom}", f"--cache={cache_folder}"]
    wide = ["--model.width=8", f"--encoder={runs / 'pre'}", "--num_folds=3"]
    assert main([*arguments, *wide, f"--out={tmp_path / 'x'}"]) == 2
    assert "model.* settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(PRETRAIN))
def test_presets_are_valid(name):
    from salkernels.training.cli import _build, make_parser

    for command, kind, presets in (
        ("pretrain", PretrainConfig, PRETRAIN),
        ("finetune", FinetuneConfig, FINETUNE),
    ):
        arguments = [command, f"--preset={name}"]
        config = _build(kind, make_parser(arguments).parse_args(arguments)[command])
        assert config.optim.steps == presets[name]["optim.steps"]
        assert config.crop % config.model.stride == 0


def test_mini_is_the_field_of_the_desk_at_a_lower_resolution():
    for presets in (PRETRAIN, FINETUNE):
        mini, desk = presets["mini"], presets["desk"]
        size, spacing = "preprocess.size", "preprocess.spacing"
        assert mini[size] * mini[spacing] == pytest.approx(desk[size] * desk[spacing])
        known, default = mini["preprocess.unknown_zoom"], PreprocessConfig().unknown_zoom
        assert mini[size] / known == desk[size] / default
        differ = {name for name in mini.keys() | desk if mini.get(name) != desk.get(name)}
        assert differ - {"optim.steps"} == {
            size, spacing, "preprocess.unknown_zoom", "crop", "model.width",
        }  # fmt: skip


def test_desk_pretrains_with_what_did_best_and_experiments_with_what_the_arms_say(tmp_path):
    from salkernels.training.cli import _build, make_parser

    def sal(*more):
        arguments = ["pretrain", *more]
        config = _build(PretrainConfig, make_parser(arguments).parse_args(arguments)["pretrain"])
        return config.sal.embedding, config.sal.common_frame, config.augment.geometry

    assert sal() == sal("--preset=desk") == sal("--preset=mini") == ("none", True, "independent")
    assert sal("--preset=acdc") == ("linear", False, "auto")
    paper = ("--sal.embedding=linear", "--sal.common_frame=false", "--augment.geometry=shared")
    assert sal(*paper) == ("linear", False, "shared")
    arguments = ["experiment", "table1", f"--data={tmp_path}", f"--out={tmp_path}"]
    start = make_parser(arguments).parse_args(arguments).experiment.pretrain
    assert start.sal.embedding == "linear"
    assert start.augment.geometry == "auto"


@pytest.mark.slow
def test_demo_as_a_script_without_arguments_that_matter(tmp_path):
    command = [sys.executable, str(ROOT / "training" / "run.py"), "demo"]
    small = ["--pretrain_steps=4", "--finetune_steps=4", "--draws=1", f"--out={tmp_path / 'demo'}"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| Random |" in done.stdout
    assert "| SAL |" in done.stdout
    assert (tmp_path / "demo" / "results" / "demo-classes.png").is_file()
    assert (tmp_path / "demo" / "figures" / "overlays.png").is_file()
    # Again: everything is there, nothing is trained anew.
    again = subprocess.run([*command, *small], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "| SAL |" in again.stdout
    # Other settings: the old result is not passed for the new one.
    longer = [*command, "--pretrain_steps=5", *small[1:]]
    other = subprocess.run(longer, capture_output=True, text=True, cwd=tmp_path)
    assert other.returncode == 2
    assert "optim.steps: 4 then, 5 now" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_that_resumes(phantom, cache_folder, tmp_path, kind, code):
    """As a terminal or a batch system does it: every process gets the signal, loaders too."""
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "salkernels.training.run", "pretrain", *TINY, "--slices=8",
        f"--data={phantom}", f"--cache={cache_folder}", f"--out={out}", "--optim.steps=60",
        "--checkpoint_every=1000", "--log_every=1", "--workers=2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "go on with --resume" in said
    assert (out / "checkpoints" / "last.pt").is_file()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 61))
