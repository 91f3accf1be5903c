"""The loop: exact continuation, schedule, non-finite losses, optimiser groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from salkernels.training import engine, progress
from salkernels.training.checkpoint import load_checkpoint
from salkernels.training.config import OptimConfig
from salkernels.training.errors import RunError, Stopped
from salkernels.training.finetune import finetune
from salkernels.training.optimiser import learning_rate, make_optimiser
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import read_metrics


def weights(out):
    return load_checkpoint(out)["module"]


def stop_after(monkeypatch, steps):
    """Makes the loop see a SIGTERM once `steps` batches have been trained on."""
    import signal

    original = engine.step_generator

    def counting(seed, step, device, part=0):
        if step == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, step, device, part)

    monkeypatch.setattr(engine, "step_generator", counting)
    return lambda: monkeypatch.setattr(engine, "step_generator", original)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_interrupted_equals_uninterrupted(
    pretrain_config, tmp_path, monkeypatch, precision, optimiser
):
    optim = OptimConfig(name=optimiser, lr=0.01, steps=7)
    straight = pretrain_config(out=tmp_path / "straight", precision=precision, optim=optim)
    pretrain(straight)
    broken = pretrain_config(out=tmp_path / "broken", precision=precision, optim=optim)
    undo = stop_after(monkeypatch, 5)  # between two checkpoints and within a line of metrics
    with pytest.raises(Stopped, match="SIGTERM at step 5 of 7") as stopped:
        pretrain(broken)
    assert stopped.value.code == 143
    undo()
    assert not (broken.out / "encoder.safetensors").exists()
    pretrain(pretrain_config(out=broken.out, precision=precision, optim=optim, resume=True))
    expected, got = weights(straight.out), weights(broken.out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert read_metrics(straight.out) == read_metrics(broken.out)
    exported = (straight.out / "encoder.safetensors").read_bytes()
    assert exported == (broken.out / "encoder.safetensors").read_bytes()


def test_finetuning_resumes_exactly_too(finetune_config, tmp_path, monkeypatch):
    straight = finetune(finetune_config(out=tmp_path / "straight"))
    undo = stop_after(monkeypatch, 2)
    with pytest.raises(Stopped):
        finetune(finetune_config(out=tmp_path / "broken"))
    undo()
    broken = finetune(finetune_config(out=tmp_path / "broken", resume=True))
    assert broken.rows == straight.rows


def test_a_compiled_run_has_the_same_keys_and_goes_on_uncompiled(
    pretrain_config, finetune_config, tmp_path, monkeypatch
):
    compiled, original = [], nn.Module.compile

    def traced(self):
        compiled.append(type(self).__name__)
        original(self, backend="eager")  # traces, but generates no code: that takes a minute

    monkeypatch.setattr(nn.Module, "compile", traced)
    straight = pretrain_config(out=tmp_path / "straight", precision="fp32")
    pretrain(straight)
    broken = pretrain_config(out=tmp_path / "broken", precision="fp32", compile=True)
    undo = stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        pretrain(broken)
    undo()
    assert compiled == ["Encoder"]
    pretrain(pretrain_config(out=broken.out, precision="fp32", resume=True))
    expected, got = weights(straight.out), weights(broken.out)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)
    finetune(finetune_config(encoder=broken.out, compile=True))
    assert compiled == ["Encoder", "UNet"]


def test_accumulated_batches_of_finetuning_are_a_mean(finetune_config, tmp_path, monkeypatch):
    """Of the losses of batches of half the size, with their own augmentation."""
    config = finetune_config(optim=OptimConfig(steps=2, accumulate=2), batch_size=2, log_every=1)
    halves, original = [], engine.Task

    def spy(prepare, loss):
        def spied(given):
            value, terms = loss(given)
            halves.append((value.item(), given[0]))
            return value, terms

        return original(prepare, spied)

    monkeypatch.setattr("salkernels.training.finetune.Task", spy)
    finetune(config)
    # The first step looks for contrasts between batches, finds none, and does so no more.
    assert len(halves) == 1 + 4
    (_, probe), (a, first), (b, second), *_ = halves
    assert torch.equal(probe, first)
    assert not torch.equal(first, second)
    assert read_metrics(config.out)[0]["loss"] == pytest.approx((a + b) / 2)


def test_a_run_killed_between_checkpoints_goes_on_from_the_last(
    pretrain_config, tmp_path, monkeypatch
):
    config = pretrain_config(checkpoint_every=2, optim=OptimConfig(steps=6))
    original = engine.step_generator

    def killed(seed, step, device, part=0):
        if step == 5:
            raise KeyboardInterrupt  # stands for a kill: no checkpoint at step 5
        return original(seed, step, device, part)

    monkeypatch.setattr(engine, "step_generator", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert load_checkpoint(config.out)["step"] == 4
    monkeypatch.setattr(engine, "step_generator", original)
    resumed = pretrain_config(checkpoint_every=2, optim=OptimConfig(steps=6), resume=True)
    pretrain(resumed)
    steps = [row["step"] for row in read_metrics(config.out)]
    assert steps == sorted(set(steps))


def test_non_finite_loss_names_the_batch_and_keeps_the_last_good_state(
    pretrain_config, monkeypatch
):
    from salkernels.training.methods import SAL

    config = pretrain_config(checkpoint_every=1)
    original = SAL.forward

    def poisoned(self, views):
        outcome = original(self, views)
        poisoned.calls += 1
        if poisoned.calls == 3:
            outcome.loss = outcome.loss * math.nan
        return outcome

    poisoned.calls = 0
    monkeypatch.setattr(SAL, "forward", poisoned)
    with pytest.raises(RunError, match=r"nan at step 3 .*patient\d+_frame\d+ \[\d"):
        pretrain(config)
    state = load_checkpoint(config.out)
    assert state["step"] == 2
    assert all(torch.isfinite(v).all() for v in state["module"].values())


def test_non_finite_gradient_stops_before_it_reaches_the_weights(pretrain_config, monkeypatch):
    from salkernels.training.methods import SAL

    config = pretrain_config(checkpoint_every=1)
    original = SAL.forward

    def poisoned(self, views):
        outcome = original(self, views)
        poisoned.calls += 1
        if poisoned.calls == 3:  # finite itself, but its slope is 0 · inf
            outcome.loss = outcome.loss + (0 * next(self.parameters())).sum().sqrt()
        return outcome

    poisoned.calls = 0
    monkeypatch.setattr(SAL, "forward", poisoned)
    with pytest.raises(RunError, match=r"gradient's norm became nan at step 3 .*patient\d+"):
        pretrain(config)
    state = load_checkpoint(config.out)
    assert state["step"] == 2
    assert all(torch.isfinite(v).all() for v in state["module"].values())


def test_a_signal_in_the_last_step_is_obeyed_too(pretrain_config, monkeypatch):
    config = pretrain_config()
    undo = stop_after(monkeypatch, config.optim.steps)
    with pytest.raises(Stopped, match="step 6 of 6"):
        pretrain(config)
    undo()
    assert not (config.out / "encoder.safetensors").exists()
    pretrain(pretrain_config(resume=True))
    assert (config.out / "encoder.safetensors").exists()


def test_collapse_is_watched_from_the_first_step_to_the_last(pretrain_config):
    config = pretrain_config()  # looks every 4 of 6 steps
    pretrain(config)
    assert [row["step"] for row in read_metrics(config.out) if "la_control" in row] == [1, 4, 6]


def test_a_log_gets_lines_and_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.Rhythm, "due", lambda _: True)
    with engine.Progress("run", 10, 12) as bar:
        bar.update({"loss": 0.5})
        bar.update({"loss": 0.25})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("run: step 11 of 12, loss 0.5, ")
    assert "step/s, ETA 00:0" in first
    assert second.startswith("run: step 12 of 12, loss 0.25, ")


def test_learning_rate_warms_up_and_falls_to_its_end():
    optim = OptimConfig(steps=100, warmup=0.1, final_lr=0.2)
    rates = [learning_rate(step, optim) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert 0 < rates[0] < 0.11
    assert rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(0.6)


def test_weight_decay_spares_vectors_and_groups_scale_the_rate():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    head = nn.Linear(2, 2)
    groups = [
        {"params": list(module.parameters()), "scale": 0.1},
        {"params": list(head.parameters())},
    ]
    optimiser = make_optimiser(groups, OptimConfig(lr=1.0, weight_decay=0.01))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.01 if parameter.dim() > 1 else 0)
            in_head = any(parameter is p for p in head.parameters())
            assert group["lr"] == pytest.approx(1.0 if in_head else 0.1)
