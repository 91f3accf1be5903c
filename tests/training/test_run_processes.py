"""Processes: one per run folder, cells that end with their parent, signals, loaders, and whose
modules are imported."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from salkernels.training import loading, pretrain
from salkernels.training.checkpoint import STOPPING, has_checkpoint, load_checkpoint, stop_on_signal
from salkernels.training.config import OptimConfig
from salkernels.training.data.sampling import TwoSubjects
from salkernels.training.errors import RunError, Stopped
from salkernels.training.experiment import child, schedule
from salkernels.training.experiment.cells import plan
from salkernels.training.experiment.schedule import run_cells
from salkernels.training.experiment.tables import TABLES
from salkernels.training.locks import in_use, sole_use
from salkernels.training.runlog import read_metrics
from salkernels.training.startup import without_current_folder

TINY = [
    "--preset=phantom", "--crop=32", "--preprocess.size=32", "--preprocess.spacing=4",
    "--model.width=4", "--model.depth=4", "--device=cpu", "--precision=fp32", "--threads=1",
]  # fmt: skip
HOLD = """
import sys, time
from pathlib import Path
from salkernels.training.locks import sole_use
with sole_use(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def hang_ups_are_heard():
    """Also where the tests themselves run under nohup, whose children would ignore them too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_held_by_one_process_and_freed_by_a_kill(holder, tmp_path):
    out = tmp_path / "run"
    assert f"process {holder.pid} on " in in_use(out)
    with (
        pytest.raises(RunError, match=f"in use by process {holder.pid}") as caught,
        sole_use(out, patience=0.2),
    ):
        pass
    assert str(out) in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert in_use(out) == ""
    (out / ".x.json.elsewhere-7.0a1b2c3d.tmp").write_text("of another machine")
    with sole_use(out):
        with pytest.raises(RunError, match="by this process"), sole_use(out):
            pass
        assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    assert in_use(tmp_path / "nowhere") == ""


def test_a_predecessor_that_is_just_ending_is_waited_for(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()
    with sole_use(tmp_path / "run", patience=20):
        pass


def test_loaders_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path):
    with sole_use(tmp_path):
        context = multiprocessing.get_context("fork")
        forked = context.Process(target=time.sleep, args=(30,), daemon=True)
        forked.start()
    try:
        with sole_use(tmp_path, patience=0):
            pass
        script = HOLD.replace("time.sleep(60)", "")
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    finally:
        forked.kill()


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_does_not_start_in_a_folder_in_use(
    command, pretrain_config, finetune_config, tmp_path
):
    from salkernels.training.finetune import finetune

    made = {"pretrain": pretrain_config, "finetune": finetune_config}[command]
    run = {"pretrain": pretrain.pretrain, "finetune": finetune}[command]
    with pytest.raises(RunError, match="in use by process"):
        run(made(out=tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.fixture
def cells(pretrain_config, finetune_config, tmp_path):
    arms = tuple(TABLES["table1"].arm(name) for name in ("random", "simclr"))
    long = pretrain_config(optim=OptimConfig(steps=100_000), log_every=1, threads=1)
    short = finetune_config(optim=OptimConfig(steps=1), threads=1)
    return plan(arms, (1,), {0: (0,)}, tmp_path / "out", long, short)


class Started:
    """Processes that do not outlive their test, even where it fails."""

    def __init__(self):
        self.processes, self.cells = [], []

    def __call__(self, command):
        self.processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return self.processes[-1]

    def also(self, cell):
        self.cells.append(cell)

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.cells:
            with suppress(OSError):  # gone, as it should be
                if b"child.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def started():
    made = Started()
    yield made
    made.end()


EXPERIMENT = """
import pickle, sys
from pathlib import Path
from salkernels.training.experiment.schedule import run_cells
cells, out = pickle.loads(Path(sys.argv[1]).read_bytes())
run_cells(cells, out, 1, lambda _: None)
"""


@pytest.mark.slow
def test_cells_end_with_an_experiment_that_is_killed_and_the_next_waits(cells, tmp_path, started):
    import pickle

    only = [cell for cell in cells if cell.command == "pretrain"]
    run = only[0].config.out
    (tmp_path / "plan").write_bytes(pickle.dumps((only, tmp_path / "out")))
    command = [sys.executable, "-c", EXPERIMENT, str(tmp_path / "plan")]
    first = started(command)
    until(lambda: len(read_metrics(run)) > 2 if (run / "metrics.jsonl").exists() else False)
    pid = int(in_use(run).split()[1])
    started.also(pid)
    first.kill()
    first.wait()
    # At once, while the cell is still about to end: it is waited for, then gone on from.
    second = started(command)
    until(lambda: in_use(run) and int(in_use(run).split()[1]) != pid)
    before = load_checkpoint(run)["step"]  # saved, as after any SIGTERM
    until(lambda: len(read_metrics(run)) > before + 2)
    second.terminate()
    assert second.wait(60) == 1  # Stopped, here without the command line around it
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == [*range(1, len(steps) + 1)]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_cell_that_another_process_has_ended_is_not_run_again(cells, monkeypatch, tmp_path):
    cell = next(cell for cell in cells if cell.arm == "random")
    busy = iter(["process 7 on a", "process 7 on a", ""])

    def other(_):
        now = next(busy)
        if not now:
            cell.path.parent.mkdir(parents=True)
            cell.path.write_text("{}")
        return now

    monkeypatch.setattr(schedule, "in_use", other)
    monkeypatch.setattr(schedule, "_start", lambda *_: pytest.fail("started again"))
    monkeypatch.setattr(
        "salkernels.training.experiment.cells.require_same_settings", lambda *_: None
    )
    finished = []
    run_cells([cell], tmp_path / "out", 1, finished.append)
    assert finished == [cell]


@pytest.mark.parametrize("kind", STOPPING, ids=lambda kind: kind.name)
def test_every_signal_that_warns_saves_and_stops(kind, pretrain_config, monkeypatch):
    from salkernels.training import engine

    original = engine.step_generator

    def warned(seed, step, device, part=0):
        if step == 3:
            signal.raise_signal(kind)
        return original(seed, step, device, part)

    monkeypatch.setattr(engine, "step_generator", warned)
    config = pretrain_config(checkpoint_every=1000)
    with pytest.raises(Stopped, match=f"{kind.name} at step 4 of 6") as stopped:
        pretrain.pretrain(config)
    assert stopped.value.code == 128 + kind
    assert load_checkpoint(config.out)["step"] == 4


def test_the_signals_are_those_of_batch_systems():
    names = {kind.name for kind in STOPPING}
    assert names == {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"}


def test_a_hang_up_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stuck_loader_is_reported_and_can_be_ended(pretrain_config, monkeypatch):
    original = TwoSubjects.__getitem__

    def stuck(self, index):
        if index >= 3:
            time.sleep(3600)
        return original(self, index)

    monkeypatch.setattr(TwoSubjects, "__getitem__", stuck)
    monkeypatch.setattr(loading, "POLL", 0.2)
    config = pretrain_config(
        workers=1, optim=OptimConfig(steps=60), loader_warning=0.5, checkpoint_every=1000
    )
    said = []

    def write(text, file):
        if "no batch for" in text:  # and not what is said of reading
            said.append(text)
        if len(said) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loading.tqdm, "write", write)
    began = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM at step 3 of 60"):
        pretrain.pretrain(config)
    assert "SIGTERM saves and ends the run" in said[0]
    assert time.monotonic() - began > 5 * 0.5  # not said every second
    assert load_checkpoint(config.out)["step"] == 3
    assert not multiprocessing.active_children()


def test_a_slow_loader_is_only_waited_for(pretrain_config, monkeypatch, tmp_path):
    original = TwoSubjects.__getitem__
    monkeypatch.setattr(loading, "POLL", 0.1)
    straight = pretrain_config(out=tmp_path / "straight", log_every=1)
    pretrain.pretrain(straight)

    def slow(self, index):
        time.sleep(0.5)
        return original(self, index)

    monkeypatch.setattr(TwoSubjects, "__getitem__", slow)
    config = pretrain_config(workers=1, log_every=1)
    pretrain.pretrain(config)
    assert read_metrics(config.out) == read_metrics(straight.out)


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A current folder full of modules that leave a trace when they are imported."""
    folder, trace = tmp_path / "current", tmp_path / "trace"
    folder.mkdir()
    names = ["yaml", "nibabel", "monai", "jsonargparse", "scipy", "matplotlib", "safetensors"]
    names += ["torch", "numpy", "dataclasses", "inspect"]
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(folder)
    yield folder
    assert not trace.exists(), f"imported from the current folder: {trace.read_text()}"


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize(
    "words",
    [
        ("-m", "salkernels.training.run"),
        ("-m", "salkernels.training.data.manifest"),
        ("-m", "salkernels"),
        ("-um", "salkernels.training.run"),
        ("-msalkernels.training.run",),
    ],
    ids=" ".join,
)
def test_python_m_imports_nothing_of_the_current_folder(words):
    done = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_of_others_keeps_the_current_folder(tmp_path):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("import salkernels\n")
    (tmp_path / "tool" / "__main__.py").write_text("import beside\n")
    (tmp_path / "beside.py").write_text("print('beside')\n")
    command = [sys.executable, "-m", "tool", "salkernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "beside\n", done.stderr


def test_children_run_the_package_of_their_parent_and_nothing_of_the_current_folder(
    traps, cells, tmp_path
):
    """Whatever lies there: other modules, an unbuilt clone; with or without an install."""
    for name in ("salkernels", "salkernels/training", "torch", "numpy", "json"):
        (traps / name).mkdir(exist_ok=True)
        (traps / name / "__init__.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a')\n")
    cell = next(cell for cell in cells if cell.command == "finetune" and cell.arm == "random")
    (tmp_path / "out" / "logs").mkdir(parents=True)
    process = schedule._start(cell, tmp_path / "out")
    assert process.wait(120) == 0, schedule.log_of(cell, tmp_path / "out").read_text()
    process.stdin.close()
    assert cell.path.exists()


def test_a_child_loads_packages_from_the_given_files(tmp_path):
    """Here another package than the one that is installed."""
    for name in ("salkernels", "salkernels/training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "salkernels" / "training" / "cli.py").write_text(
        "import sys\ndef main():\n    print(__file__, sys.argv)\n    return 5\n"
    )
    packages = {
        name: str(tmp_path / name.replace(".", "/") / "__init__.py")
        for name in ("salkernels", "salkernels.training")
    }
    places = json.dumps({"path": sys.path, "packages": packages})
    with subprocess.Popen(
        [sys.executable, "-I", child.__file__, places, "pretrain", "--x"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        said = process.stdout.read()  # with its standard input open: its parent lives
        assert process.wait(60) == 5
    assert str(tmp_path) in said
    assert "['salkernels-train', 'pretrain', '--x']" in said


def test_the_current_folder_leaves_the_path_and_python_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = str(tmp_path / "other")
    assert without_current_folder(["", str(tmp_path), ".", other]) == [other]
    site = Path(json.__file__).parents[1]  # the standard library
    monkeypatch.chdir(site)
    assert without_current_folder([str(site), other]) == [str(site), other]


def test_a_failed_start_leaves_no_trace_that_matters(pretrain_config, monkeypatch):
    config = pretrain_config(seed=1)

    def fails(*_, **__):
        raise RunError("before the first step")

    monkeypatch.setattr(pretrain, "fit", fails)
    with pytest.raises(RunError, match="before the first step"):
        pretrain.pretrain(config)
    first = (config.out / "encoder_initial.safetensors").read_bytes()
    (config.out / "warnings.txt").write_text("collapse: of the failed start\n")
    monkeypatch.undo()
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)
    pretrain.pretrain(replace(config, seed=2))
    assert (config.out / "encoder_initial.safetensors").read_bytes() != first
    assert not (config.out / "warnings.txt").exists()
    assert has_checkpoint(config.out)
    # What has been trained is not lost to a third command.
    with pytest.raises(RunError, match="already holds a run"):
        pretrain.pretrain(replace(config, seed=3))


@pytest.mark.slow
def test_experiment_says_how_to_go_on(phantom, tmp_path):
    settings = [s for s in TINY if s.split("=")[0] not in ("--preset", "--threads")]
    words = [f"--{stage}.{s[2:]}" for stage in ("pretrain", "finetune") for s in settings]
    command = [
        sys.executable, "-m", "salkernels.training.run", "experiment", "table1",
        "--preset=phantom", "--data", str(phantom), "--out", str(tmp_path / "e"), "--arms",
        "simclr", "--labelled", "1", "--folds", "0", "--threads=1", *words, "--pretrain.slices=8",
        "--pretrain.optim.steps=100000", "--pretrain.log_every=1",
    ]  # fmt: skip
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "e" / "pretrain" / "simclr" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    job.send_signal(signal.SIGHUP)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 128 + signal.SIGHUP
    assert "run it again to go on" in said
    assert "--resume" not in said
    assert load_checkpoint(metrics.parent)["step"] > 0
