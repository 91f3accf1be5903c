"""Experiments: the plan, what is cached, the schedule of runs, and the tables drawn from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from salkernels.training.cli import main
from salkernels.training.errors import RunError, Stopped
from salkernels.training.experiment import schedule
from salkernels.training.experiment.cells import plan, with_settings
from salkernels.training.experiment.plots import draw
from salkernels.training.experiment.schedule import run_cells
from salkernels.training.experiment.statistics import paired_difference
from salkernels.training.experiment.summary import (
    PAPERS,
    Results,
    Score,
    collect,
    markdown,
    write,
)
from salkernels.training.experiment.tables import ALL, TABLES
from salkernels.training.methods import METHODS

ABOUT = {"commands": ["the command"], "conditions": "the conditions"}


@pytest.fixture
def cells(pretrain_config, finetune_config, tmp_path):
    """Plans some arms of table 1, two folds, M = 1."""

    def make(*arms, labelled=(1,), folds=(0, 1)):
        chosen = tuple(TABLES["table1"].arm(name) for name in arms)
        own = {0: folds}
        return plan(chosen, labelled, own, tmp_path / "out", pretrain_config(), finetune_config())

    return make


def test_tables_name_known_methods_and_valid_settings(pretrain_config):
    config = replace(
        pretrain_config(crop=96, preprocess=replace(pretrain_config().preprocess, size=96))
    )
    for name, table in TABLES.items():
        assert table.baseline in {arm.name for arm in table.arms}, name
        assert set(table.paper) <= {arm.name for arm in table.arms}, name
        names = [arm.name for arm in table.arms]
        assert len(set(names)) == len(names), name
        for arm in table.arms:
            assert arm.method in METHODS
            with_settings(config, {**arm.settings, "method": arm.method})
    paper = ["random", "rotation", "pirl", "simclr", "gcl", "pcl", "ccrop", "sal"]
    assert [arm.method for arm in TABLES["table1"].arms] == paper
    # An arm that two tables share is the same run.
    shared = {}
    for table in TABLES.values():
        for arm in table.arms:
            assert shared.setdefault(arm.name, (arm.method, dict(arm.settings))) == (
                arm.method,
                dict(arm.settings),
            )


def test_plan_pretrains_each_arm_once_and_starts_random_from_nothing(cells):
    made = cells("random", "pcl", "sal", labelled=(1, 2))
    assert [c.arm for c in made if c.command == "pretrain"] == ["pcl", "sal"]
    finetuning = [c for c in made if c.command == "finetune"]
    assert len(finetuning) == 3 * 2 * 2
    # M by M, fold by fold, all arms: a comparison is complete as soon as can be.
    assert [(c.labelled, c.fold, c.arm) for c in finetuning[:4]] == [
        (1, 0, "random"), (1, 0, "pcl"), (1, 0, "sal"), (1, 1, "random"),
    ]  # fmt: skip
    for cell in finetuning:
        assert (cell.config.encoder is None) == (cell.arm == "random")
        assert cell.ready() == (cell.arm == "random")
    configs = {c.config.out for c in made}
    assert len(configs) == len(made)


def test_settings_by_dotted_name(pretrain_config):
    config = with_settings(pretrain_config(), {"sal.lambda_": 5.0, "optim.steps": 7, "seed": 3})
    assert (config.sal.lambda_, config.optim.steps, config.seed) == (5.0, 7, 3)
    assert pretrain_config().sal.lambda_ == 1.0
    with pytest.raises(ValueError, match="no setting 'lambda'"):
        with_settings(pretrain_config(), {"sal.lambda": 5.0})
    with pytest.raises(ValueError, match="lambda_"):
        with_settings(pretrain_config(), {"sal.lambda_": -1.0})


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that only write their product; returns the list of those started, and sets the code."""
    started = []
    code = {"body": ""}

    def start(cell, out):
        started.append((cell.arm, cell.command, cell.fold))
        log = schedule.log_of(cell, out)
        log.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "import json, pathlib, sys, time, signal",
            f"arm, command, fold = {cell.arm!r}, {cell.command!r}, {cell.fold}",
            f"path = pathlib.Path({str(cell.path)!r})",
            code["body"],
            "path.parent.mkdir(parents=True, exist_ok=True)",
            "path.write_text('{}')",
        ]
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-S", "-c", "\n".join(lines)], stdout=file, stderr=file
            )

    monkeypatch.setattr(schedule, "_start", start)
    monkeypatch.setattr(
        "salkernels.training.experiment.cells.require_same_settings", lambda *_: None
    )
    return started, code


def test_runs_wait_for_their_encoder_and_are_not_repeated(cells, fake_runs, tmp_path):
    started, _ = fake_runs
    reported = []
    run_cells(cells("random", "pcl"), tmp_path / "out", 2, reported.append)
    assert len(started) == len(reported) == 5
    assert started[0] == ("pcl", "pretrain", 0)
    first = started.index(("pcl", "finetune", 0))
    assert first > started.index(("random", "finetune", 0))
    started.clear()
    run_cells(cells("random", "pcl", "gcl"), tmp_path / "out", 1, reported.append)
    assert {arm for arm, _, _ in started} == {"gcl"}
    assert len(started) == 3


def test_a_failed_run_is_named_with_the_end_of_its_log(cells, fake_runs, tmp_path):
    started, code = fake_runs
    code["body"] = "if fold == 1: print('first line'); sys.exit('the disk is full')"
    with pytest.raises(RunError, match=r"random, M = 1, fold 1 failed(.|\n)*the disk is full"):
        run_cells(cells("random", folds=(0, 1, 2)), tmp_path / "out", 1, lambda _: None)
    assert ("random", "finetune", 2) not in started
    code["body"] = ""  # mended: what was done stays done
    started.clear()
    run_cells(cells("random", folds=(0, 1, 2)), tmp_path / "out", 1, lambda _: None)
    assert [fold for _, _, fold in started] == [1, 2]


def test_a_signal_ends_the_runs_in_progress_once(cells, fake_runs, tmp_path):
    _, code = fake_runs
    note = tmp_path / "signals"
    code["body"] = (
        f"signal.signal(15, lambda *_: (open({str(note)!r}, 'a').write('x'), sys.exit(143)))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\ntime.sleep(60)"
    )

    def interrupt():
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match="SIGTERM"):
        run_cells(cells("random"), tmp_path / "out", 1, lambda _: None)
    thread.join()
    assert note.read_text() == "x"


def test_one_experiment_per_folder(cells, tmp_path):
    with schedule._only_one(tmp_path / "out"), pytest.raises(RunError, match="another experiment"):
        run_cells(cells("random"), tmp_path / "out", 1, lambda _: None)


def results(**changes):
    """Two arms, three folds: differences of 0.10, 0.12 and 0.14 at M = 2; one fold at all."""
    scores = []
    for arm, gain in (("random", (0, 0, 0)), ("sal", (0.10, 0.12, 0.14))):
        for fold in range(3):
            mean = 0.5 + 0.05 * fold + gain[fold]
            dice = {"RV": mean - 0.1, "LV": mean + 0.1}
            scores.append(Score(arm, 2, fold, dice, mean, ("a", "b")))
    scores.append(Score("sal", ALL, 0, {"RV": 0.9, "LV": 0.9}, 0.9, ("a", "b", "c")))
    looks = [(9.0, 9.0), (0.1, 0.4), (0.2, 0.5), (0.3, 0.5), (0.2, 0.5), (0.2, 0.6)]
    history = [
        {"step": step, "la_pairs": same, "la_control": other, "cosine_encoder": 0.3}
        for step, (same, other) in enumerate(looks)
    ]
    made = Results(
        TABLES["table1"], ("random", "sal"), (2, ALL), ((0, 0), (0, 1), (0, 2)), tuple(scores),
        {"sal": history}, ("abc0", "abc1"),
    )  # fmt: skip
    return replace(made, **changes)


def test_paired_difference_is_students_interval():
    found = paired_difference([0.10, 0.12, 0.14])
    # t(0.975, 2) = 4.302653; standard error 0.02 / sqrt(3)
    reach = 4.302653 * 0.02 / np.sqrt(3)
    assert found.mean == pytest.approx(0.12)
    assert (found.low, found.high) == pytest.approx((0.12 - reach, 0.12 + reach), abs=1e-6)


def test_differences_are_paired_by_fold_and_by_subjects():
    made = results()
    found = made.difference("sal", 2, "random")
    assert found.mean == pytest.approx(0.12)
    assert found.folds == 3
    assert made.difference("sal", ALL, "random") is None
    assert made.difference("random", 2, "random") is None
    other = replace(made.scores[-2], subjects=("a", "c"))
    with pytest.raises(ValueError, match="fold 2: sal and random were fine-tuned on other subj"):
        replace(made, scores=(*made.scores[:-2], other)).difference("sal", 2, "random")


def test_markdown_holds_means_spread_paper_and_gaps():
    text = markdown(results(), ABOUT)
    assert "| SAL | 0.670 (0.070) | 0.900, 2 of 3 missing | 0.723 (0.04) | 0.929 (0.00) |" in text
    assert "| Random | 0.550 (0.050) | not run | 0.588 (0.07) | 0.928 (0.00) |" in text
    assert "| SAL | +0.120 [+0.070, +0.170], p = 0.25 |" in text
    assert "    the command" in text
    assert "the conditions. Runs of revision abc0, abc1." in text
    # Means of the last five looks, the first one is another: 0.2, 0.5 and their ratio.
    assert "| SAL |  |  | 0.2 | 0.5 | 0.4 |  |  | 0.3 |  |" in text
    assert PAPERS in text  # what the paper's columns are


def test_files_are_strict_json_and_one_csv_line_per_run(tmp_path):
    broken = replace(results().scores[0], dice={"RV": float("nan"), "LV": 0.5})
    made = results(scores=(broken, *results().scores[1:]))
    write(made, tmp_path, "table1", ABOUT)
    document = json.loads((tmp_path / "table1.json").read_text(), parse_constant=pytest.fail)
    assert document["scores"][0]["dice"] == {"RV": None, "LV": 0.5}
    assert document["differences"][0]["folds"] == 3
    lines = (tmp_path / "table1.csv").read_text().splitlines()
    assert len(lines) == 1 + 7
    assert lines[-1] == "sal,all,0,0,0.9000,0.9000,0.9000,a b c"


@pytest.mark.filterwarnings("error")  # of an empty legend, for one
def test_every_figure_is_drawn_from_partial_results(tmp_path):
    kinds = {p.stem for p in draw(results(), tmp_path, "x", "conditions")}
    assert kinds == {"x-dice", "x-classes", "x-differences", "x-collapse"}
    varied = replace(results(), table=TABLES["table3"], arms=("sal-lambda0", "sal"), labelled=(2,))
    assert "y-curve" in {p.stem for p in draw(varied, tmp_path, "y", "conditions")}
    empty = results(scores=(), pretraining={})
    assert draw(empty, tmp_path, "z", "conditions") == []


def test_an_experiment_from_the_command_line(phantom, tmp_path, capsys):
    """Real runs: pre-training, two starts, one fold; then an arm more computes what is missing."""
    small = ["crop=32", "model.width=4", "model.depth=4", "preprocess.spacing=4.0",
             "preprocess.size=32", "device=cpu", "precision=fp32"]  # fmt: skip
    options = [f"--{stage}.{setting}" for stage in ("pretrain", "finetune") for setting in small]
    options += ["--pretrain.slices=8", "--pretrain.optim.steps=3", "--finetune.optim.steps=2"]
    out = tmp_path / "experiment"
    command = ["experiment", "table1", "--preset=phantom", f"--data={phantom}", f"--out={out}",
               "--labelled=1", "--folds=0", "--threads=1", "--jobs=2"]  # fmt: skip
    assert main([*command, *options, "--arms", "random", "simclr"]) == 0
    assert "| SimCLR | 0." in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/**/*.safetensors")}
    assert len(before) == 4  # two models, an encoder and its start

    changed = [*options, "--finetune.optim.lr=0.5"]
    assert main([*command, *changed, "--arms", "random", "simclr"]) == 2
    assert "optim.lr: 0.001 then, 0.5 now" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before

    assert main([*command, *options, "--arms", "random", "simclr", "--folds=1"]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    results = out / "results"
    assert {p.name for p in results.glob("*")} >= {"table1.json", "table1.csv", "table1.md"}
    rows = (results / "table1.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["random", "1", "1"], ["simclr", "1", "1"]]
    assert collect(TABLES["table1"], []).scores == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "table9"),
        (["table1", "--arms", "dino"], "no arm 'dino'"),
        (["table1", "--folds", "7"], "folds are counted from 0 to 4"),
        (["table1", "--jobs", "0"], "jobs must be at least 1"),
        (["table1", "--pretrain.sal.window_size", "0"], "at least 1"),
    ],
)
def test_wrong_experiments_are_refused(arguments, message, phantom, tmp_path, capsys):
    where = [f"--data={phantom}", f"--out={tmp_path / 'x'}"]
    try:
        code = main(["experiment", *arguments, *where])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
