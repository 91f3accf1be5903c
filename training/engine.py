"""The training loop that pre-training and fine-tuning share."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .checkpoint import STOPPING, has_checkpoint, load_checkpoint, save_checkpoint, stop_on_signal
from .config import RunConfig
from .data.sampling import SliceBatch
from .device import Device, step_generator
from .distributed import bare, first, is_main, total
from .errors import RunError, Stopped
from .identity import Identity
from .late import Ledger, Meter, Queued
from .loading import loaders_explained, steps_of
from .optimiser import learning_rate, make_optimiser
from .progress import Progress
from .runlog import RunLog
from .steps import Gradients, Task


class Look(NamedTuple):
    """More figures to log, now and then.

    due: whether there is a look after this step; the same in all processes.
    figures: what is seen then, in the process that writes.
    """

    due: Callable[[int], bool]
    figures: Callable[[int], dict[str, float]]


def fit(
    module: nn.Module,
    groups: Iterable[dict[str, Any]],
    task: Task[Any],
    dataset: Dataset[SliceBatch],
    config: RunConfig,
    log: RunLog,
    device: Device,
    look: Look | None = None,
) -> None:
    """Runs `config.optim.steps` steps, with metrics, checkpoints and exact continuation.

    A checkpoint holds all that the rest of the run depends on: weights, optimiser, scaler, step and
    the sums of the metrics in progress. Batches and augmentation depend on (seed, step, number of
    the batch in the step) alone. Of many processes the first writes; all take the same steps, stop
    at the same one, and go on from the same checkpoint.

    A step does not wait for the device: what it came to is checked and logged when the next one is
    queued, or before something is written.

    Raises:
        Stopped: after a signal that asks for it, to any process; the state is saved.
        RunError: loss or gradient is not finite, which the message follows to the batch, or a
            loader died; nothing is overwritten.
    """
    optim = config.optim
    state = RunState.of(module, groups, config, device)
    if config.resume:
        state.load(log)
    log.start_at(state.step)
    meter, ledger = state.meter, Ledger(state.meter)
    gradients = Gradients(
        module,
        task,
        state.parts["scaler"],
        lambda b: step_generator(config.seed, b.step, device.device, b.part),
    )
    module.train()
    bar = Progress(config.out.name, state.step, optim.steps)
    with (
        loaders_explained(),
        stop_on_signal() as stop,
        bar,
        closing(steps_of(dataset, state.step, config, lambda: bool(stop.signal))) as all_batches,
    ):
        for batches in all_batches:
            rate = state.rate
            ledger.add(state.advance(gradients, module, batches, optim.clip))
            step, last = state.step, state.step == optim.steps
            heard = heard_anywhere(stop.signal)
            looked = look is not None and look.due(step)
            line = looked or last or step % config.log_every == 0
            save = last or step % config.checkpoint_every == 0
            if line or save or heard:
                ledger.settle()
            bar.update(meter.means())
            if line:
                extra = look.figures(step) if look and looked and is_main() else {}
                log.write(step, {**meter.means(), "lr": rate, **extra})
                meter.clear()
            if heard:
                state.stop(log, heard, optim.steps)
            if save:
                state.save(log)
        if state.step < optim.steps and stop.signal:  # while it waited for a stuck loader
            ledger.settle(together=False)  # the others may wait for this one's gradient
            state.stop(log, stop.signal, optim.steps)


def heard_anywhere(heard: signal.Signals | None) -> signal.Signals | None:
    """The signal to stop that some process has heard, the same in all of them."""
    counts = total([float(heard is kind) for kind in STOPPING])
    return next((kind for kind, count in zip(STOPPING, counts, strict=True) if count), None)


@dataclass
class RunState:
    """Everything that a checkpoint holds."""

    parts: dict[str, Any]  # with state_dict and load_state_dict
    meter: Meter
    step: int = 0

    @classmethod
    def of(
        cls,
        module: nn.Module,
        groups: Iterable[dict[str, Any]],
        config: RunConfig,
        device: Device,
    ) -> RunState:
        """The state of a run that has taken no step."""
        optim = config.optim
        optimiser = make_optimiser(groups, optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate(step, optim)
        )
        # The scaler skips steps by the averaged gradient: the same decision in all processes.
        scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
        parts = {"optimiser": optimiser, "schedule": schedule, "scaler": scaler}
        return cls({"module": bare(module), **parts}, Meter())

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.parts["schedule"].get_last_lr()[0])

    def load(self, log: RunLog) -> None:
        """Goes on from the last checkpoint, if there is one: all processes from the same.

        Raises:
            RunError: it is of other data, another split or encoder than the run now has.
        """
        out = log.out
        saved = first(lambda: load_checkpoint(out) if has_checkpoint(out) else None)
        if saved is None:
            return
        try:
            log.require_same(Identity.of(saved["identity"]))
        except (KeyError, ValueError) as error:
            raise RunError(f"the checkpoint in {out} does not say of which data it is") from error
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]
        self.meter.sums, self.meter.count = saved["sums"], saved["count"]

    def advance(
        self,
        gradients: Gradients[Any],
        module: nn.Module,
        batches: Sequence[SliceBatch],
        clip: float,
    ) -> Queued:
        """Queues a step along the gradient of these batches; nothing here waits for a GPU.

        But fp16 does: its scaler reads whether the gradient overflowed before it takes the step.
        """
        optimiser, scaler, schedule = (self.parts[n] for n in ("optimiser", "scaler", "schedule"))
        optimiser.zero_grad(set_to_none=True)
        result = gradients(batches)
        scaler.unscale_(optimiser)
        norm: Tensor = nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
        scaler.step(optimiser)
        scaler.update()
        schedule.step()
        self.step += 1
        # A scaler skips steps that are not finite itself, and lowers its scale.
        return Queued.of(self.step, batches, result, norm, skips=scaler.is_enabled())

    def save(self, log: RunLog) -> None:
        if not is_main():
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        meter = {"sums": self.meter.sums, "count": self.meter.count}
        about = {"step": self.step, "identity": log.identity.plain()}
        save_checkpoint(log.out, {**states, **about, **meter})

    def stop(self, log: RunLog, kind: signal.Signals, steps: int) -> NoReturn:
        """Saves the state and ends the run."""
        self.save(log)
        log.close()
        raise Stopped(f"stopped by {kind.name} at step {self.step} of {steps}", 128 + kind.value)
