"""Several processes and accumulated batches: the same run as one process with the same step."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tolerances import TRAINING_LOSS, TRAINING_WEIGHT

from salkernels.training import cli, pretrain
from salkernels.training.checkpoint import PREVIOUS, load_checkpoint
from salkernels.training.config import OptimConfig
from salkernels.training.data.sampling import LabelledSlices, Shard, TwoSubjects
from salkernels.training.errors import RunError
from salkernels.training.inputs import open_dataset
from salkernels.training.models import UNetConfig
from salkernels.training.runlog import read_metrics, to_plain

WORKER = Path(__file__).with_name("distributed_worker.py")
METHODS = ("rotation", "pirl", "simclr", "gcl", "pcl", "ccrop", "sal", "densecl")
POSITIONAL = ("simclr", "gcl", "pcl", "sal", "densecl")  # draw nothing themselves
INSTANCE = UNetConfig(width=4, depth=4, norm="instance")


def torchrun(
    *arguments: str, restarts: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Two processes of the worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(WORKER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def small(make, method: str, **changes):
    """A run of four steps; norms that look at one sample, unless changed."""
    settings = {
        "method": method, "threads": 1, "precision": "fp32", "log_every": 1,
        "optim": OptimConfig(steps=4), "model": INSTANCE, **changes,
    }  # fmt: skip
    if method == "pirl":  # 32 pixels cut in three leave 10: less than the stride of four levels
        settings["model"] = replace(settings["model"], depth=3)
    return make(**settings)


@pytest.fixture(scope="module")
def pairs_of_runs(tmp_path_factory, phantom, cache_folder, common):
    """name -> configuration of a run of two processes; one start for all, which takes longest."""
    folder = tmp_path_factory.mktemp("two")

    def make(**changes):
        out = folder / str(len(jobs))
        base = {"data": phantom, "out": out, "cache": cache_folder, "slices": 8, **common}
        return pretrain.PretrainConfig(**{**base, "monitor_every": 4, **changes})

    jobs: dict[str, tuple[str, pretrain.PretrainConfig]] = {}
    for method in METHODS:
        jobs[method] = "plain", small(make, method)
    twice = OptimConfig(steps=4, accumulate=2)
    jobs["accumulated"] = "plain", small(make, "sal", optim=twice)
    batch = {"model": UNetConfig(width=4, depth=4)}
    # Two steps: with batch norms, weights that differ in the last bit alone choose other maxima
    # here and there, and in one process too the fourth loss differs by 7e-5, its LA by 2e-4.
    few = {"optim": OptimConfig(steps=2), **batch}
    jobs["synchronised"] = "plain", small(make, "sal", sync_batchnorm=True, **few)
    eight = {"optim": OptimConfig(steps=8), **batch}
    jobs["straight"] = "plain", small(make, "sal", **eight)
    jobs["terminated"] = "terminated", small(make, "sal", checkpoint_every=8, **eight)
    unaligned = small(make, "sal")
    unaligned.sal.lambda_ = 0.0
    jobs["unaligned"] = "plain", unaligned
    jobs["poisoned"] = "finite_on_process_0_alone", small(make, "sal", checkpoint_every=1)
    two = OptimConfig(steps=2, accumulate=2)
    jobs["scaled"] = "scaled", small(make, "pcl", optim=two, checkpoint_every=1)
    listed = folder / "jobs"
    listed.write_bytes(pickle.dumps(list(jobs.values())))
    done = torchrun("runs", str(listed))
    assert done.returncode == 0, done.stderr[-5000:]
    return {name: config for name, (_, config) in jobs.items()}


def one_process(config, out: Path, **changes):
    """The same run in this process, with other settings of the batch."""
    alone = replace(config, out=out, **changes)
    pretrain.pretrain(alone)
    return alone.out


def require_same(
    one: Path, two: Path, loss: float = TRAINING_LOSS, weight: float = TRAINING_WEIGHT
) -> None:
    """Metrics and weights agree to rounding: terms relatively, weights absolutely."""
    first, second = read_metrics(one), read_metrics(two)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for a, b in zip(first, second, strict=True):
        for name in {
            "loss",
            "gp",
            "la",
            "slice",
            "jigsaw",
            "accuracy",
            "global",
            "dense",
        } & a.keys():
            assert a[name] == pytest.approx(b[name], rel=loss), (name, a["step"])
    expected, got = load_checkpoint(one)["module"], load_checkpoint(two)["module"]
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        error = (got[name].double() - value.double()).abs().max().item()
        assert error <= weight, f"{name}: {error}"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """No figures, and the threads of the other tests afterwards."""
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_two_accumulated_batches(method, pairs_of_runs, tmp_path):
    config = pairs_of_runs[method]
    accumulated = replace(config.optim, accumulate=2)
    require_same(one_process(config, tmp_path / "one", optim=accumulated), config.out)


@pytest.mark.parametrize("method", POSITIONAL)
def test_two_processes_are_one_with_a_batch_of_two_pairs(method, pairs_of_runs, tmp_path):
    config = pairs_of_runs[method]
    require_same(one_process(config, tmp_path / "one", pairs=2), config.out)


def test_accumulation_on_two_processes(pairs_of_runs, tmp_path):
    config = pairs_of_runs["accumulated"]
    four = replace(config.optim, accumulate=4)
    require_same(one_process(config, tmp_path / "one", optim=four), config.out)


def test_synchronised_batch_norm_is_that_of_one_large_batch(pairs_of_runs, tmp_path):
    config = pairs_of_runs["synchronised"]
    # The norms sum in another order: on a CPU with AVX2 weights differ by 1.3e-5 after the first
    # step and by 1.9e-4 after the second, whose LA differs by 1.4e-5.
    one = one_process(config, tmp_path / "one", pairs=2)
    require_same(one, config.out, loss=1e-4, weight=5e-4)


def test_without_alignment_some_weights_get_no_gradient(pairs_of_runs, tmp_path):
    config = pairs_of_runs["unaligned"]
    require_same(one_process(config, tmp_path / "one", pairs=2), config.out)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(pairs_of_runs):
    config = pairs_of_runs["poisoned"]
    assert load_checkpoint(config.out)["step"] == 1
    elsewhere, here = ((config.out / f"error{rank}.txt").read_text() for rank in (0, 1))
    assert "another process" in elsewhere
    assert "nan at step 2 on the batch patient" in here


def test_all_processes_skip_the_step_whose_gradient_overflowed_in_one(pairs_of_runs):
    config = pairs_of_runs["scaled"]
    assert (config.out / "same.txt").read_text() == "True"
    before = torch.load(config.out / PREVIOUS, weights_only=True)
    after = load_checkpoint(config.out)
    assert (before["step"], after["step"]) == (1, 2)
    assert after["scaler"]["scale"] == before["scaler"]["scale"] / 2
    for name, value in before["module"].items():
        assert torch.equal(after["module"][name], value), name


def require_equal(one: Path, two: Path) -> None:
    """Metrics and weights agree to the last bit."""
    assert read_metrics(one) == read_metrics(two)
    expected, got = load_checkpoint(one)["module"], load_checkpoint(two)["module"]
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_a_signal_to_one_process_stops_all_at_the_same_step(pairs_of_runs):
    config = pairs_of_runs["terminated"]
    for process in (0, 1):
        stopped = (config.out / f"stopped{process}.txt").read_text()
        assert stopped == "stopped by SIGTERM at step 3 of 8"
    require_equal(pairs_of_runs["straight"].out, config.out)  # it went on


def test_torchrun_restarts_a_run_that_lost_a_process(pairs_of_runs, tmp_path):
    config = pairs_of_runs["straight"]
    settings = to_plain(replace(config, out=tmp_path / "run", resume=True, checkpoint_every=2))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    arguments = ("cli", "pretrain", f"--config={tmp_path / 'settings.yaml'}")
    done = torchrun(*arguments, restarts=1)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "exitcode: -9" in done.stderr
    assert done.stdout.count("encoder: ") == 1
    require_equal(config.out, tmp_path / "run")
    assert list((tmp_path / "run" / "figures").iterdir())


def test_a_run_goes_on_where_processes_times_batches_are_as_before(pairs_of_runs):
    config = pairs_of_runs["sal"]
    assert yaml.safe_load((config.out / "environment.json").read_text())["processes"] == 2
    with pytest.raises(RunError, match="takes 2 batches per step, which 1 processes times"):
        pretrain.pretrain(replace(config, resume=True))
    pretrain.pretrain(replace(config, resume=True, optim=replace(config.optim, accumulate=2)))
    synchronised = pairs_of_runs["synchronised"]
    optim = replace(synchronised.optim, accumulate=2)
    with pytest.raises(RunError, match="batch norms over 2 processes, got 1"):
        pretrain.pretrain(replace(synchronised, resume=True, optim=optim))


def test_other_commands_are_for_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["finetune", f"--out={tmp_path}"]) == 2
    assert "finetune runs in one process, but torchrun started 2" in capsys.readouterr().err


def test_processes_share_a_step_without_overlap(pretrain_config):
    cache = open_dataset(pretrain_config())
    for step in range(10):
        whole = TwoSubjects(cache, cache.subjects, 8, 0, pairs=3)[step]
        parts = [TwoSubjects(cache, cache.subjects, 8, 0, 1, Shard(r, 3))[step] for r in range(3)]
        assert [part.part for part in parts] == [0, 1, 2]
        assert torch.equal(torch.cat([part.sample for part in parts]), whole.sample)
        assert len({name.split("_")[0] for name in whole.names}) == 6  # of six subjects
    later = TwoSubjects(cache, cache.subjects, 8, 0, 1, Shard(1, 2, 2))
    assert [(later[i].step, later[i].part) for i in range(4)] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    many = TwoSubjects(cache, cache.subjects[:3], 8, 0, pairs=4)[0]
    for pair in many.volume.view(4, 8):  # more pairs than subjects, but never one with itself
        assert len({cache.volumes[int(volume)].subject for volume in pair}) == 2
    drawn = [
        LabelledSlices(cache, cache.subjects[:2], 3, 0, Shard(0, 1, 2))[i].sample for i in (0, 1)
    ]
    assert torch.equal(torch.cat(drawn), LabelledSlices(cache, cache.subjects[:2], 6, 0)[0].sample)
