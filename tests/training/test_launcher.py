"""Runs of an experiment as jobs of submitit: local ones, and those of a Slurm of four scripts."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="submitit is not installed (the cluster extra)")

import submitit

from salkernels.training.cli import main
from salkernels.training.errors import RunError, Stopped
from salkernels.training.experiment import launcher
from salkernels.training.experiment.cells import plan
from salkernels.training.experiment.launcher import Launcher
from salkernels.training.experiment.schedule import run_cells
from salkernels.training.experiment.tables import TABLES

NUMBERS = itertools.count(4711)
COUNT = """
tries = folder / "tries"
tries.mkdir(exist_ok=True)
number = len(list(tries.iterdir()))
(tries / str(number)).touch()
"""


@pytest.fixture
def cells(pretrain_config, finetune_config, tmp_path):
    def make(*arms, folds=(0,)):
        chosen = tuple(TABLES["table1"].arm(name) for name in arms)
        configs = pretrain_config(), finetune_config()
        return plan(chosen, (1,), {0: folds}, tmp_path / "out", *configs)

    return make


@pytest.fixture(autouse=True)
def body(monkeypatch):
    """What the runs do before they write their product; by default nothing."""
    code = {"body": ""}

    def command(cell, out):
        lines = [
            "import os, pathlib, signal, sys, time",
            f"folder, command = pathlib.Path({str(cell.config.out)!r}), {cell.command!r}",
            "folder.mkdir(parents=True, exist_ok=True)",
            COUNT + code["body"],
            f"pathlib.Path({str(cell.path)!r}).write_text('{{}}')",
            "print('the end')",
        ]
        return [sys.executable, "-S", "-c", "\n".join(lines)]

    monkeypatch.setattr(launcher, "command_of", command)
    monkeypatch.setattr("salkernels.training.experiment.cells.require_same_settings", lambda *_: 0)
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)
    return code


@pytest.fixture
def run(tmp_path):
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)

    def runs(cells, **settings):
        finished = []
        run_cells(cells, out, 2, finished.append, Launcher("local", out), **settings)
        return [cell.name for cell in finished]

    return runs


def tries(cell) -> int:
    return len(list((cell.config.out / "tries").iterdir()))


def test_jobs_run_once_and_wait_for_their_encoder(cells, run, tmp_path):
    planned = cells("random", "pcl")
    done = run(planned)
    assert sorted(done) == sorted(cell.name for cell in planned)
    assert done.index("pcl, pretrain") < done.index("pcl, M = 1, fold 0")
    assert (tmp_path / "out" / "logs" / "pretrain_pcl.log").read_text() == "the end\n"
    assert run(cells("random", "pcl")) == []  # the same cache of cells
    assert [tries(cell) for cell in planned] == [1, 1, 1]
    assert not list((tmp_path / "out" / "logs").glob("*.job.json"))


def test_a_failed_and_a_killed_run_are_submitted_again(cells, run, body, capsys):
    body["body"] = (
        "if number == 0: sys.exit(1)\nif number == 1: os.kill(os.getpid(), signal.SIGKILL)"
    )
    planned = cells("random")
    assert run(planned, retries=2) == ["random, M = 1, fold 0"]
    assert tries(planned[0]) == 3
    said = capsys.readouterr().err
    assert "random, M = 1, fold 0: exit status 1; started again, 1 of 2" in said
    assert "random, M = 1, fold 0: lost or killed; started again, 2 of 2" in said


@pytest.mark.parametrize(("status", "expected"), [(1, 2), (2, 1)])
def test_a_run_that_fails_for_good_is_named(status, expected, cells, run, body):
    """Status 2 is that of settings or data that are refused: they would be again."""
    body["body"] = f"print('the reason'); sys.exit({status})"
    planned = cells("random")
    with pytest.raises(RunError, match=r"fold 0 failed; its log .* ends:\nthe reason"):
        run(planned, retries=1)
    assert tries(planned[0]) == expected


def until(what, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SAVES = """
def save(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
while number == 0: time.sleep(0.05)
"""


def test_a_preempted_run_saves_and_goes_on(cells, body, tmp_path):
    body["body"] = SAVES
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    cell = cells("random")[0]
    running = Launcher("local", out).start(cell, out)
    until((cell.config.out / "ready").exists)
    # As Slurm does: the signal reaches every process of the job.
    task = int(subprocess.check_output(["pgrep", "-P", running.job.job_id]).split()[0])
    child = int(subprocess.check_output(["pgrep", "-P", str(task)]).split()[0])
    os.kill(child, signal.SIGUSR2)
    os.kill(task, signal.SIGUSR2)
    until(lambda: running.poll() is not None)
    assert running.returncode == 0
    assert (cell.config.out / "saved").exists()
    assert tries(cell) == 2


def test_a_lost_job_is_submitted_again(cells, run, body, tmp_path, capsys):
    body["body"] = SAVES
    cell = cells("random")[0]
    record = tmp_path / "out" / "logs" / "finetune_random_m1_f0.job.json"

    def lose():
        until((cell.config.out / "ready").exists)
        number = int(launcher.read_record(record)["job"])
        task = int(subprocess.check_output(["pgrep", "-P", str(number)]).split()[0])
        os.kill(number, signal.SIGKILL)
        os.kill(task, signal.SIGKILL)

    thread = threading.Thread(target=lose)
    thread.start()
    assert run([cell], retries=1) == [cell.name]
    thread.join()
    assert tries(cell) == 2
    assert "lost or killed" in capsys.readouterr().err


def test_a_signal_ends_jobs_of_this_machine(cells, run, body, tmp_path):
    body["body"] = SAVES
    cell = cells("random")[0]

    def stop():
        until((cell.config.out / "ready").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match=r"stopped by SIGTERM$"):
        run([cell], retries=1)
    thread.join()
    until((cell.config.out / "saved").exists)
    assert tries(cell) == 1


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The commands of Slurm: one job, whose state is in a file; the scripts are kept."""
    number = next(NUMBERS)  # submitit remembers jobs that have ended
    folder = tmp_path / "slurm"
    folder.mkdir()
    state, scripts = folder / "state", folder / "scripts"
    scripts.mkdir()
    programs = {
        "srun": "true",
        "sbatch": f'cp "$1" {scripts}/$(ls {scripts} | wc -l); echo "Submitted batch job {number}"',
        "sacct": f'echo "JobID|State|NodeList"; echo "{number}|$(cat {state})|n1"',
        "scancel": f"echo CANCELLED > {state}",
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    state.write_text("RUNNING")
    return state, scripts


@pytest.fixture
def submit(tmp_path):
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    settings = ["timeout_min=90", "gpus_per_node=1", "mem_gb=24", "slurm_partition=gpu"]
    return lambda cell: Launcher("slurm", out, settings).start(cell, out)


def test_slurm_gets_a_job_with_its_settings(cells, slurm, submit):
    state, scripts = slurm
    running = submit(cells("random")[0])
    text = (scripts / "0").read_text()
    for line in ("--time=90", "--gpus-per-node=1", "--mem=24GB", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in text
    assert "--signal=USR2@" in text
    assert running.poll() is None


def test_an_experiment_that_was_ended_finds_its_jobs_again(cells, slurm, submit):
    state, scripts = slurm
    cell = cells("random")[0]
    first = submit(cell)
    first.send_signal(signal.SIGTERM)  # as the experiment ends: the job goes on
    assert state.read_text() == "RUNNING"
    assert first.wait() == 0
    assert submit(cell).job.job_id == first.job.job_id
    assert len(list(scripts.iterdir())) == 1
    state.write_text("TIMEOUT")
    submit(cell)
    assert len(list(scripts.iterdir())) == 2


def test_a_job_that_slurm_preempted_without_queueing_it_again_is_lost(
    cells, slurm, submit, monkeypatch
):
    state, _ = slurm
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 0)
    running = submit(cells("random")[0])
    state.write_text("PREEMPTED")
    running.job.watcher.update()
    assert running.poll() is None  # it may come back
    monkeypatch.setattr(launcher, "SETTLED", 0.0)
    assert running.poll() == -1
    assert state.read_text() == "CANCELLED\n"


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        ("slurm", [], "srun"),
        ("local", ["partition"], "expected NAME=VALUE, such as timeout_min=600, got 'partition'"),
        ("local", ["partitions=gpu"], "--launcher local: Parameter 'partitions' need"),
        ("local", ["timeout_min=soon"], "--launcher local: .*timeout_min"),
    ],
)
def test_what_cannot_be_launched_is_refused(cluster, settings, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=message) as caught:
        Launcher(cluster, tmp_path, settings)
    assert "\n" not in str(caught.value)


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RunError, match=r"pip install -e '\.\[cluster\]'"):
        Launcher("local", tmp_path)


def test_an_experiment_from_the_command_line_as_jobs(phantom, tmp_path, monkeypatch, capsys):
    """A real run, whose job starts this very package."""
    from salkernels.training.experiment.command import command_of

    monkeypatch.undo()
    monkeypatch.setattr(launcher, "command_of", command_of)
    small = ["crop=32", "model.width=4", "model.depth=4", "preprocess.spacing=4.0",
             "preprocess.size=32", "device=cpu", "precision=fp32"]  # fmt: skip
    options = [f"--{stage}.{setting}" for stage in ("pretrain", "finetune") for setting in small]
    out = tmp_path / "experiment"
    command = ["experiment", "table1", "--preset=phantom", f"--data={phantom}", f"--out={out}",
               "--labelled=1", "--folds=0", "--threads=1", "--finetune.optim.steps=2",
               "--arms=random", "--launcher=local", *options]  # fmt: skip
    assert main(command) == 0
    assert "| Random | 0." in capsys.readouterr().out
    assert (out / "jobs").is_dir()
    assert main([*command, "--retries=-1"]) == 2
    assert "retries must be >= 0" in capsys.readouterr().err
    processes = [word for word in command if word != "--launcher=local"]
    assert main([*processes, "--launch_with", "timeout_min=5"]) == 2
    assert "launch_with is for --launcher slurm or local" in capsys.readouterr().err


def test_jobs_import_nothing_from_the_current_folder(cells, tmp_path, monkeypatch):
    if sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH came with Python 3.11")
    here = tmp_path / "data"
    here.mkdir()
    (here / "cloudpickle.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a')\n")
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    monkeypatch.chdir(here)
    running = Launcher("local", out).start(cells("random")[0], out)
    until(lambda: running.poll() is not None)
    assert running.returncode == 0
    assert not (Path(tmp_path) / "trace").exists()
