"""The training loop that pre-training and fine-tuning share."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .checkpoint import (
    STOPPING,
    RunError,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
    stop_on_signal,
)
from .config import Precision, RunConfig
from .data.sampling import SliceBatch
from .distributed import bare, first, is_main, own_gpu, world
from .identity import Identity
from .loading import loaders_explained, steps_of
from .optimiser import learning_rate, make_optimiser
from .progress import Progress
from .runlog import RunLog, precision_before
from .steps import Gradients, StepResult, Task

# Called after every step; where a look is due it returns more figures to log.
Hook = Callable[[int], dict[str, float]]


class Stopped(Exception):
    """A signal ended the run after its state was saved; `code` is the shell's exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Device:
    """Where and in which precision a run computes."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, config: RunConfig) -> Device:
        if config.threads:
            torch.set_num_threads(config.threads)
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RunError(
                f"device {name!r} is none that torch knows; expected auto, cpu, cuda or cuda:N"
            ) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RunError(f"device {name!r} was asked for, but torch sees no GPU; use cpu or auto")
        if world() > 1 and device.type == "cuda":
            device = own_gpu(name)

        def chosen() -> torch.dtype:
            precision = config.precision
            if precision == "auto" and config.resume:
                precision = precision_before(config.out)  # or the rest of the run would be another
            return _dtype(precision, device)

        return cls(device, first(chosen))  # a measurement may come out otherwise elsewhere

    def exact(self) -> Device:
        """The same in fp32: label maps should not depend on what a machine is fast at."""
        return replace(self, dtype=torch.float32)

    def describe(self) -> dict[str, str]:
        """What was chosen, for the run folder."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return {"device": str(self.device), "precision": names[self.dtype]}

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def to(self, module: nn.Module) -> nn.Module:
        """On the device, in the layout that convolutions and the alignment loss like best."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit(
    module: nn.Module,
    groups: Iterable[dict[str, Any]],
    task: Task[Any],
    dataset: Dataset[SliceBatch],
    config: RunConfig,
    log: RunLog,
    device: Device,
    hook: Hook | None = None,
) -> None:
    """Runs `config.optim.steps` steps, with metrics, checkpoints and exact continuation.

    A checkpoint holds all that the rest of the run depends on: weights, optimiser, scaler, step and
    the sums of the metrics in progress. Batches and augmentation depend on (seed, step, number of
    the batch in the step) alone. Of many processes the first writes; all take the same steps, stop
    at the same one, and go on from the same checkpoint.

    Raises:
        Stopped: after a signal that asks for it, to any process; the state is saved.
        RunError: loss or gradient is not finite, which the message follows to the batch, or a
            loader died; nothing is overwritten.
    """
    optim = config.optim
    optimiser = make_optimiser(groups, optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, optim))
    # The scaler skips steps by the averaged gradient: the same decision in all processes.
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
    meter = Meter()
    state = RunState(
        {"module": bare(module), "optimiser": optimiser, "schedule": schedule, "scaler": scaler},
        meter,
    )
    if config.resume:
        state.load(log)
    log.start_at(state.step)
    gradients = Gradients(
        module, task, scaler, lambda b: step_generator(config.seed, b.step, device.device, b.part)
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
            optimiser.zero_grad(set_to_none=True)
            result = gradients(batches, lambda: [int(stop.signal is kind) for kind in STOPPING])
            _require_finite_loss(result, state.step)
            rate = state.update(module, optim.clip, batches)
            step, last = state.step, state.step == optim.steps
            meter.add(result.terms)
            extra = hook(step) if hook is not None else {}
            bar.update(meter.means())
            if step % config.log_every == 0 or last or extra:
                log.write(step, {**meter.means(), "lr": rate, **extra})
                meter.clear()
            heard = [kind for kind, count in zip(STOPPING, result.signals, strict=True) if count]
            if heard:
                state.stop(log, heard[0], optim.steps)
            if step % config.checkpoint_every == 0 or last:
                state.save(log)
        if state.step < optim.steps and stop.signal:  # while it waited for a stuck loader
            state.stop(log, stop.signal, optim.steps)


class Meter:
    """Means of the terms since the last line of metrics."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, terms: dict[str, float]) -> None:
        self.count += 1
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + term

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums, self.count = {}, 0


@dataclass
class RunState:
    """Everything that a checkpoint holds."""

    parts: dict[str, Any]  # with state_dict and load_state_dict
    meter: Meter
    step: int = 0

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

    def update(self, module: nn.Module, clip: float, batches: Sequence[SliceBatch]) -> float:
        """Takes the step along the gradient; returns the learning rate that it took."""
        optimiser, scaler, schedule = (self.parts[n] for n in ("optimiser", "scaler", "schedule"))
        scaler.unscale_(optimiser)
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip or math.inf)
        if not scaler.is_enabled():  # a scaler skips such steps itself, and lowers its scale
            _require_finite("gradient's norm", norm.item(), self.step, batches)
        rate = float(schedule.get_last_lr()[0])
        scaler.step(optimiser)
        scaler.update()
        schedule.step()
        self.step += 1
        return rate

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


def _require_finite_loss(result: StepResult, step: int) -> None:
    if result.bad:
        number, batch = result.bad
        _require_finite("loss", number, step, [batch])
    if result.any_bad:
        raise RunError(f"the loss of another process is not finite at step {step + 1}")


def _require_finite(what: str, number: float, step: int, batches: Sequence[SliceBatch]) -> None:
    if not math.isfinite(number):
        slices = "; ".join(batch.describe() for batch in batches)
        raise RunError(
            f"the {what} became {number} at step {step + 1} on the batch {slices}; "
            f"nothing of this step was kept. Lower optim.lr, or look at these slices"
        )


def step_generator(seed: int, step: int, device: torch.device, part: int = 0) -> torch.Generator:
    """Random numbers of one batch of one step, independent of all others.

    part: number of the batch, or of the pair of subjects, in the step.
    """
    generator = torch.Generator(device)
    # Odd multipliers spread neighbouring steps, parts and seeds over the 64 bits.
    mixed = seed * 0x9E3779B97F4A7C15 + part * 0xBF58476D1CE4E5B9 + step
    return generator.manual_seed(mixed % 2**63)


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "fp16" and device.type == "cpu":
        raise RunError("fp16 is for GPUs; use precision bf16 or fp32 on a CPU")
    if precision == "auto":
        return torch.bfloat16 if _bf16_helps(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _bf16_helps(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    plain, half = (_convolution_time(dtype) for dtype in (torch.float32, torch.bfloat16))
    return half < 0.8 * plain  # a clear gain, so that a busy machine does not decide


@functools.cache
def _convolution_time(dtype: torch.dtype) -> float:
    """Seconds of a convolution of the kind U-Nets are made of, forward and backward.

    No flag tells whether bf16 is faster: AMX and recent AMD gain a factor of 4 over fp32, while
    AVX512-BF16 without AMX (Intel, torch 2.14) takes 1.4 times as long as fp32.
    """
    x = torch.ones(8, 32, 48, 48).to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight = torch.ones(32, 32, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
    times = []
    for _ in range(6):
        began = time.perf_counter()
        F.conv2d(x, weight, padding=1).sum().backward()
        times.append(time.perf_counter() - began)
    return min(times[1:])
