"""What machines do to runs: loaders that die, disks that are full, checkpoints cut short."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import pytest

from salkernels.training import engine, pretrain
from salkernels.training.checkpoint import LAST, PREVIOUS, load_checkpoint
from salkernels.training.config import OptimConfig
from salkernels.training.data.sampling import TwoSubjects
from salkernels.training.errors import RunError

FIRST = 3  # step of the first checkpoint; the last step is 6


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)


def at_step(monkeypatch, step: int, action) -> None:
    """Does something before the step's random numbers are drawn, once."""
    original = engine.step_generator

    def acting(seed, now, device, part=0):
        if now == step - 1:
            monkeypatch.setattr(engine, "step_generator", original)
            action()
        return original(seed, now, device, part)

    monkeypatch.setattr(engine, "step_generator", acting)


def require_same_weights(one, two) -> None:
    expected, got = load_checkpoint(one)["module"], load_checkpoint(two)["module"]
    assert all(got[name].equal(value) for name, value in expected.items())


@pytest.fixture
def straight(pretrain_config, tmp_path):
    """A run without trouble."""
    config = pretrain_config(out=tmp_path / "straight")
    pretrain.pretrain(config)
    return config.out


def test_a_killed_loader_is_named_and_the_last_state_kept(pretrain_config, monkeypatch):
    def kill() -> None:
        for loader in multiprocessing.active_children():
            os.kill(loader.pid, signal.SIGKILL)

    # Far from the end, so that the dead loader is missed.
    at_step(monkeypatch, 5, kill)
    config = pretrain_config(workers=1, optim=OptimConfig(steps=60))
    with pytest.raises(RunError, match=r"(?s)loads slices ended: .*--resume"):
        pretrain.pretrain(config)
    assert load_checkpoint(config.out)["step"] % FIRST == 0


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), EOFError()])
@pytest.mark.parametrize("signalled", [False, True], ids=["pipe", "pipe then signal"])
def test_the_pipe_from_a_killed_loader_may_break_before_the_signal(
    error, signalled, pretrain_config, monkeypatch
):
    """What the kill above shows depends on who is faster: here are the two other orders."""

    def reading():
        raise error

    at_step(monkeypatch, 5, reading)
    if signalled:
        close = engine.Progress.__exit__

        def handler(*args):
            close(*args)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

        monkeypatch.setattr(engine.Progress, "__exit__", handler)
    config = pretrain_config()
    with pytest.raises(RunError, match=r"loads slices ended: .*--resume"):
        pretrain.pretrain(config)
    assert load_checkpoint(config.out)["step"] == FIRST


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_living_loader_raises_is_not_called_a_killed_process(
    workers, pretrain_config, monkeypatch
):
    def broken(*_):
        raise RuntimeError("these slices are broken")

    monkeypatch.setattr(TwoSubjects, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="these slices are broken") as caught:
        pretrain.pretrain(pretrain_config(workers=workers))
    assert "loads slices ended" not in str(caught.value)
    assert not multiprocessing.active_children()  # though `caught` holds the traceback


def test_loaders_end_with_a_loop_that_fails(pretrain_config, monkeypatch):
    """They ignore SIGTERM: one that is left would be waited for when Python ends."""

    def fail():
        raise ValueError("in the loop")

    at_step(monkeypatch, 5, fail)
    with pytest.raises(ValueError, match="in the loop") as caught:
        pretrain.pretrain(pretrain_config(workers=1, optim=OptimConfig(steps=60)))
    assert not multiprocessing.active_children()
    del caught


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_a_disk_that_is_full_at_a_checkpoint(pretrain_config, monkeypatch, straight):
    import resource

    config = pretrain_config()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (straight / LAST).stat().st_size
    at_step(
        monkeypatch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    )
    try:
        with pytest.raises(RunError, match=r"could not be written.*intact.*--resume"):
            pretrain.pretrain(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(config.out)["step"] == FIRST
    assert not list((config.out / LAST).parent.glob(".*"))  # no litter
    pretrain.pretrain(pretrain_config(resume=True))
    require_same_weights(straight, config.out)


def test_a_run_goes_on_from_the_checkpoint_before_one_that_was_cut_short(straight, pretrain_config):
    last = straight / LAST
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert load_checkpoint(straight)["step"] == FIRST
    config = pretrain_config(out=straight, resume=True)
    pretrain.pretrain(config)
    again = load_checkpoint(straight)
    assert again["step"] == 6
    last.write_bytes(content)
    expected = load_checkpoint(straight)
    assert all(again["module"][n].equal(value) for n, value in expected["module"].items())
    assert (straight / PREVIOUS).is_file()
