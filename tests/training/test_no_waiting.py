"""No step of any method waits for the device, and what it came to is read one step late."""

from __future__ import annotations

import math

import pytest
import torch
from no_waiting import Waited, no_waiting

from salkernels.training import engine, finetune, late
from salkernels.training.augment import AugmentConfig
from salkernels.training.config import OptimConfig
from salkernels.training.engine import RunState
from salkernels.training.methods import METHODS, SALConfig
from salkernels.training.models import UNetConfig
from salkernels.training.pretrain import pretrain
from salkernels.training.transfer import to_device

TRAINED = [name for name, kind in METHODS.items() if kind.trains]
STRONG = AugmentConfig(elastic=0.02, flip=0.5)  # every branch of the augmentation
FRAME = SALConfig(scale=3, common_frame=True, embedding="none")
CASES = {
    **{name: {"method": name, "augment": STRONG} for name in TRAINED},
    "frame": {"sal": FRAME, "augment": AugmentConfig(geometry="independent", flip=0.5)},
    "roll": {"sal": SALConfig(scale=3, roll=True, stop_gradient=True)},
    "contrast": {"sal": SALConfig(scale=3, loss="contrast")},
    "two pairs": {"method": "pcl", "pairs": 2},
    "accumulated": {"method": "sal", "optim": OptimConfig(steps=3, accumulate=2)},
    "resident": {"method": "sal", "cache_on": "device"},
}


@pytest.fixture
def steps_on_a_device(monkeypatch):
    """Steps are taken on a CPU that plays a device; gives how many were."""
    taken = []
    advance = RunState.advance

    def watched(self, gradients, module, batches, clip):
        with no_waiting(module) as fake:
            for state in self.parts["optimiser"].state.values():
                fake.put([v for name, v in state.items() if name != "step"])
            taken.append(self.step)
            return advance(self, gradients, module, batches, clip)

    monkeypatch.setattr(RunState, "advance", watched)
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    monkeypatch.setattr(finetune, "finetuning_figures", lambda *_: None)
    return taken


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(steps_on_a_device, pretrain_config, case, precision):
    base = {
        "model": UNetConfig(width=4, depth=3), "sal": SALConfig(scale=3), "slices": 4,
        "optim": OptimConfig(steps=3), "precision": precision,
    }  # fmt: skip
    config = pretrain_config(**{**base, **CASES[case]})
    config.ccrop.updates = 0  # finding boxes waits, a few times in a run
    pretrain(config)
    assert len(steps_on_a_device) == 3


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_step_of_fine_tuning_does_not_wait_either(steps_on_a_device, finetune_config, optimiser):
    finetune.finetune(finetune_config(optim=OptimConfig(name=optimiser, lr=1e-3, steps=3)))
    assert len(steps_on_a_device) == 3


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: torch.linalg.inv(x),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.new_tensor(3),
        lambda x: torch.tensor([1.0], device=torch.device("cpu")),
        lambda x: torch.rand(3, generator=torch.Generator()).sum().item(),
        lambda x: torch.zeros(3).to(torch.device("cpu")),
    ],
)
def test_the_played_device_notices_waits(wait):
    module = torch.nn.Linear(3, 3)
    with no_waiting(module), pytest.raises(Waited):
        wait(module.weight * 2)


def test_the_played_device_lets_pass_what_does_not_wait():
    module = torch.nn.Linear(3, 3)
    with no_waiting(module) as fake:
        rows = torch.tensor([0, 2])
        assert rows.unique().tolist() == [0, 2]  # on the CPU
        assert not fake.holds(rows.to("cpu"))
        there = to_device(rows, torch.device("cpu"))
        assert fake.holds(there)
        picked = module.weight[there]
        assert fake.holds(picked)
        back = picked.to("cpu", non_blocking=True)
        assert not fake.holds(back)
        assert len(back.tolist()) == 2


def test_a_step_is_read_when_the_next_one_is_queued(pretrain_config, monkeypatch):
    order = []
    values, advance = late.Travelling.values, RunState.advance

    def queued(self, *arguments):
        result = advance(self, *arguments)
        order.append(f"queue {self.step}")
        result.numbers.step = self.step
        return result

    def read(self):
        order.append(f"read {self.step}")
        return values(self)

    monkeypatch.setattr(RunState, "advance", queued)
    monkeypatch.setattr(late.Travelling, "values", read)
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    # A line after step 4, besides the look after the first and the end.
    settings = {"log_every": 4, "checkpoint_every": 9, "monitor_every": 9}
    pretrain(pretrain_config(optim=OptimConfig(steps=6), **settings))
    assert " ".join(order) == (
        "queue 1 read 1 queue 2 queue 3 read 2 queue 4 read 3 read 4 queue 5 queue 6 read 5 read 6"
    )


def test_a_loss_that_is_not_finite_stops_the_run_one_step_late(pretrain_config, monkeypatch):
    from salkernels.training.methods import SAL

    original, calls = SAL.forward, []

    def poisoned(self, views):
        outcome = original(self, views)
        calls.append(None)
        if len(calls) == 3:
            outcome.loss = outcome.loss * math.nan
        return outcome

    monkeypatch.setattr(SAL, "forward", poisoned)
    config = pretrain_config(log_every=100, checkpoint_every=100, monitor_every=100)
    with pytest.raises(engine.RunError, match=r"loss became nan at step 3 .*patient\d+_frame"):
        pretrain(config)
    assert len(calls) == 4  # and not until the next line or checkpoint
