"""The command line as one meets it first: mistakes, help, versions, what is said and when."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

import salkernels
from salkernels.training import closing, wording
from salkernels.training.cli import FIRST, _build, main, make_parser
from salkernels.training.config import FinetuneConfig, PretrainConfig
from salkernels.training.data import saying
from salkernels.training.experiment import schedule


def _stops(words, capsys) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretain"], "there is no command 'pretain'; did you mean pretrain?"),
        (["pretrain", "--stpes=5"], "there is no setting --stpes; did you mean --optim.steps?"),
        # An abbreviation could name another setting in the next version.
        (["pretrain", "--optim.step=5"], "no setting --optim.step; did you mean --optim.steps"),
        (["pretrain", "--conf=x"], "no setting --conf; did you mean --config?"),
        (["pretrain", "--iterations=5"], "did you mean --optim.steps?"),
        (["pretrain", "--epochs=5"], "did you mean --optim.epochs?"),
        (
            ["pretrain", "--preset=laptop"],
            "--preset must be one of phantom, mini, desk, acdc, chd, pcl",
        ),
        (["pretrain", "--optim.name=sdg"], "adamw, got 'sdg'; did you mean sgd?"),
        (["pretrain", "--optim.lr=fast"], "--optim.lr must be a number, got 'fast'"),
        (["pretrain", "--seed=1.5"], "--seed must be a whole number, got '1.5'"),
        (["pretrain", "--method=simcrl"], "did you mean simclr?"),
        (["pretrain", "optim.steps=4"], "settings are given as --name value; did you mean --optim"),
        (["experiment", "tabel1", "--data=x", "--out=y"], "no experiment 'tabel1'; did you mean"),
        (["predict", "--model=x"], "--input and --out must be given"),
        (["show"], "RUN must be given"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_meant(words, expected, capsys):
    code, _, said = _stops(words, capsys)
    assert code == 2
    assert expected in said
    assert len(said.splitlines()) == 1
    assert "Literal" not in said


@pytest.mark.parametrize("command", FIRST)
def test_help_is_a_page_with_the_five_settings_that_matter(command, capsys):
    code, said, _ = _stops([command, "--help"], capsys)
    assert code == 0
    assert len(said.splitlines()) < 25
    shown = re.findall(r"^  (--[\w.]+) ", said, flags=re.MULTILINE)
    assert shown == [option.partition(" ")[0] for option in FIRST[command]]
    assert len(shown) == 5
    code, everything, _ = _stops([command, "--help-all"], capsys)
    assert code == 0
    hidden = int(re.search(r"--help-all lists (\d+) more settings", said)[1])
    assert len(set(re.findall(r"--[\w.]+", everything))) >= hidden
    assert "--seed" in everything


def test_version(capsys):
    code, said, _ = _stops(["--version"], capsys)
    assert (code, said.strip()) == (0, f"salkernels-train {salkernels.__version__}")


def test_what_draws_segments_and_counts_is_loaded_when_it_is_used(tmp_path):
    code = (
        "import sys; from salkernels.training.cli import main\n"
        f"assert main(['show', {str(tmp_path)!r}]) == 2\n"
        "heavy = {'matplotlib', 'monai', 'scipy.stats', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def clock(monkeypatch):
    """A time that the test moves."""
    now = [0.0]
    monkeypatch.setattr(saying.time, "monotonic", lambda: now[0])
    return now


def test_a_log_is_told_after_five_seconds_and_later_more_seldom(clock):
    rhythm, said = saying.Rhythm(), []
    while clock[0] < 600:
        clock[0] += 1
        if rhythm.due():
            said.append(clock[0])
    gaps = [after - before for before, after in zip([0, *said], said, strict=False)]
    assert gaps[:9] == [5] * 9
    assert gaps == sorted(gaps)
    assert gaps[-1] == 30


def test_a_log_gets_what_a_terminal_gets_as_a_bar(clock, capsys):
    for item in saying.counted(["a", "b", "c"], "preprocessing", "scan"):
        clock[0] += {"a": 4, "b": 4, "c": 1}[item]
    said = capsys.readouterr().err.splitlines()
    assert said == ["preprocessing: 2 of 3 scans", "preprocessing: 3 scans in 00:09"]
    assert list(saying.counted(["a"], "x", "y", shown=False)) == ["a"]
    assert capsys.readouterr().err == ""


def test_preprocessing_and_evaluation_are_in_the_log_and_the_end_says_what_came_out(
    phantom, tmp_path, capsys
):
    tiny = [
        "--preset=phantom", "--crop=32", "--preprocess.size=32", "--preprocess.spacing=4",
        "--model.width=4", "--model.depth=4", "--device=cpu", f"--data={phantom}",
    ]  # fmt: skip
    out = tmp_path / "pre"
    assert main(["pretrain", *tiny, f"--out={out}", "--optim.steps=3", "--slices=8"]) == 0
    said = capsys.readouterr()
    for line in (r"reading: \d+ scans in", r"preprocessing: \d+ scans in", "drawing figures"):
        assert re.search(f"^{line}", said.err, flags=re.MULTILINE), said.err
    assert re.search(rf"^{re.escape(str(out))}: 3 steps of sal, \d+ s$", said.out, re.MULTILINE)
    assert f"encoder:  {out / 'encoder.safetensors'}" in said.out
    assert re.search(r"^course:   loss [\d.]+ -> [\d.]+", said.out, flags=re.MULTILINE)
    assert re.search("^warning", said.out, flags=re.MULTILINE)
    (following,) = re.findall("^next:     (.*)$", said.out, flags=re.MULTILINE)
    words = shlex.split(following)
    assert words[0] == "salkernels-train"
    quick = [f"--out={tmp_path / 'fine'}", "--optim.steps=2", "--num_folds=3"]
    assert main([*words[1:], *quick]) == 0, "what is proposed runs"
    said = capsys.readouterr()
    assert re.search(r"^evaluating: \d+ scans in", said.err, flags=re.MULTILINE)


def test_the_next_command_leaves_out_the_fold_and_keeps_what_must_agree(tmp_path):
    words = [
        "pretrain", "--preset=mini", f"--data={tmp_path / 'my scans'}", f"--out={tmp_path / 'run'}",
        "--leave_out_fold=3", "--num_folds=4", "--model.width=12", "--dataset=chd",
    ]  # fmt: skip
    config = _build(PretrainConfig, make_parser(words).parse_args(words)["pretrain"])
    proposed = shlex.split(closing.next_command(config, "mini"))[1:]
    tuned = _build(FinetuneConfig, make_parser(proposed).parse_args(proposed)["finetune"])
    assert (tuned.fold, tuned.num_folds, tuned.dataset) == (3, 4, "chd")
    assert tuned.model == config.model
    assert tuned.preprocess == config.preprocess
    assert tuned.crop == config.crop
    assert (tuned.data, tuned.encoder) == (config.data, config.out)


def test_times_are_words():
    assert [closing.duration(s) for s in (42, 141, 1500, 12000)] == [
        "42 s", "141 s", "25 min", "3 h 20 min",
    ]  # fmt: skip


def test_the_last_line_of_a_run_in_progress_is_shown(tmp_path, monkeypatch):
    log = tmp_path / "run.log"
    monkeypatch.setattr(schedule, "log_of", lambda cell, out: log)

    class Cell:
        class config:
            out = tmp_path / "sal"

    assert schedule._last_line(Cell, tmp_path) == "starting"
    log.write_bytes(b"x" * 5000 + b"\nsal: step 5 of 9\r\n\n")
    assert schedule._last_line(Cell, tmp_path) == "step 5 of 9"


def test_a_line_of_a_run_is_told_once(capsys):
    class Log:
        disable = True  # no terminal

    teller = schedule._Teller(Log())
    for doing in ({"sal": "step 1", "pcl": "reading"}, {"sal": "step 2", "pcl": "reading"}):
        teller.tell(doing)
    assert capsys.readouterr().err.count("pcl: reading") == 1
    teller.tell({"pcl": "step 1"})
    assert "pcl: step 1" in capsys.readouterr().err


def test_words_of_other_packages_lead_to_ours():
    known = {option for words in (["pretrain"], ["finetune"]) for option in _options(words)}
    assert {f"--{name}" for name in wording.CALLED.values()} <= known


def _options(words) -> set[str]:
    command = make_parser(words).commands[words[0]]
    return {option for action in command._actions for option in action.option_strings}
