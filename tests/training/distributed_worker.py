"""What each process of tests/training/test_distributed.py runs; torchrun starts it.

`distributed_worker.py runs FILE` takes a pickled list of (kind, configuration), a kind being one of
the functions here; `... cli ARGUMENTS` is the command line, of which process 1 is killed once.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from salkernels.training import cli, engine, pretrain
from salkernels.training.distributed import first, gather_rows, processes, rank
from salkernels.training.errors import RunError

TERMINATED, KILLED = 3, 6  # steps at which process 1 is


def plain(config):
    pretrain.pretrain(config)


def finite_on_process_0_alone(config):
    """Process 1's loss is NaN in the second step; the error of each process goes to a file."""
    original = pretrain.Pretraining.loss

    def poisoned(self, views):
        loss, terms = original(self, views)
        return (loss * torch.nan if rank() == 1 and self.step == 1 else loss), terms

    pretrain.Pretraining.loss = poisoned
    try:
        pretrain.pretrain(config)
    except RunError as error:
        (config.out / f"error{rank()}.txt").write_text(str(error))
    finally:
        pretrain.Pretraining.loss = original


def scaled(config):
    """fp16 with a gradient that is NaN in process 1 alone, in the first batch of the second step;
    whether the weights are the same in both afterwards goes to a file."""
    original_loss, original_of = pretrain.Pretraining.loss, engine.Device.of
    calls = []

    def poisoned(self, views):
        loss, terms = original_loss(self, views)
        calls.append(self.module)
        if rank() == 1 and self.step == 1 and torch.is_grad_enabled() and not poisoned.done:
            poisoned.done = True
            loss = loss + (loss - loss.detach()).abs().sqrt()  # value unchanged, slope NaN
        return loss, terms

    poisoned.done = False
    pretrain.Pretraining.loss = poisoned
    engine.Device.of = classmethod(lambda cls, _: cls(torch.device("cpu"), torch.float16))
    try:
        pretrain.pretrain(config)
    finally:
        pretrain.Pretraining.loss, engine.Device.of = original_loss, original_of
    same = all(same_everywhere(value) for value in calls[-1].parameters())
    first(lambda: (config.out / "same.txt").write_text(str(same)))


def same_everywhere(value: Tensor) -> bool:
    rows = gather_rows(value.detach())
    return all(torch.equal(rows[0], row) for row in rows)


def at_step(step: int, action) -> None:
    """Does something in process 1 before it draws the random numbers of a step, once."""
    original = engine.step_generator

    def acting(seed, now, device, part=0):
        if rank() == 1 and now == step - 1:
            engine.step_generator = original
            action()
        return original(seed, now, device, part)

    engine.step_generator = acting


def terminated(config):
    """Process 1 hears SIGTERM; what each process says goes to a file, and the run goes on."""
    at_step(TERMINATED, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        pretrain.pretrain(config)
    except engine.Stopped as stopped:
        (config.out / f"stopped{rank()}.txt").write_text(str(stopped))
    pretrain.pretrain(replace(config, resume=True))


def killed_cli(arguments: list[str]) -> int:
    """The command line; process 1 is killed in the first attempt."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at_step(KILLED, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return cli.main(arguments)


def main() -> int:
    torch.set_num_threads(1)
    mode, *arguments = sys.argv[1:]
    if mode == "cli":
        return killed_cli(arguments)
    pretrain.pretraining_figures = lambda *_: None  # drawn in the other mode
    with processes("cpu"):
        for kind, config in pickle.loads(Path(arguments[0]).read_bytes()):
            globals()[kind](config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
