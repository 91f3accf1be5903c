"""The training loop that pre-training and fine-tuning share."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from .checkpoint import RunError, has_checkpoint, load_checkpoint, save_checkpoint, stop_on_signal
from .config import OptimConfig, Precision, RunConfig
from .data.sampling import SliceBatch, batches
from .runlog import RunLog, precision_before

# One step: the batch and the step's random numbers -> the loss and the named terms to log.
StepFunction = Callable[[SliceBatch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
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
        precision = config.precision
        if precision == "auto" and config.resume:
            precision = precision_before(config.out)  # or the rest of the run would be another
        return cls(device, _dtype(precision, device))

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
    step_function: StepFunction,
    dataset: Dataset[SliceBatch],
    config: RunConfig,
    log: RunLog,
    device: Device,
    hook: Hook | None = None,
) -> None:
    """Runs `config.optim.steps` steps, with metrics, checkpoints and exact continuation.

    A checkpoint holds all that the rest of the run depends on: weights, optimiser, scaler, step and
    the sums of the metrics in progress. Batches and augmentation depend on (seed, step) alone.

    Raises:
        Stopped: after SIGINT or SIGTERM; the state is saved.
        RunError: loss or gradient is not finite; the message names the batch, nothing is
            overwritten.
    """
    optim = config.optim
    optimiser = make_optimiser(groups, optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, optim))
    scaler = torch.amp.GradScaler(device.device.type, enabled=device.dtype == torch.float16)
    parts = {"module": module, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    step, count = 0, 0
    sums: dict[str, float] = {}
    if config.resume and has_checkpoint(config.out):
        state = load_checkpoint(config.out)
        for name, part in parts.items():
            part.load_state_dict(state[name])  # type: ignore[attr-defined]
        step, sums, count = state["step"], state["sums"], state["count"]
    log.start_at(step)

    def save() -> None:
        states = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        save_checkpoint(config.out, {**states, "step": step, "sums": sums, "count": count})

    module.train()
    loader = batches(dataset, step, optim.steps, config.workers)
    bar = Progress(config.out.name, step, optim.steps)
    with stop_on_signal() as stop, bar:
        for batch in loader:
            generator = step_generator(config.seed, step, device.device)
            loss, terms = step_function(batch, generator)
            _require_finite("loss", loss, step, batch)
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            norm = nn.utils.clip_grad_norm_(module.parameters(), optim.clip or math.inf)
            if not scaler.is_enabled():  # a scaler skips such steps itself, and lowers its scale
                _require_finite("gradient's norm", norm, step, batch)
            rate = float(schedule.get_last_lr()[0])
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
            step += 1
            count += 1
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item()
            extra = hook(step) if hook is not None else {}
            bar.update({name: total / count for name, total in sums.items()})
            if step % config.log_every == 0 or step == optim.steps or extra:
                means = {name: total / count for name, total in sums.items()}
                log.write(step, {**means, "lr": rate, **extra})
                sums, count = {}, 0
            if step % config.checkpoint_every == 0 or step == optim.steps or stop.signal:
                save()
            if stop.signal:
                log.close()
                raise Stopped(
                    f"stopped by {stop.signal.name} at step {step} of {optim.steps}",
                    128 + stop.signal.value,
                )


def _require_finite(what: str, value: Tensor, step: int, batch: SliceBatch) -> None:
    number = value.item()
    if not math.isfinite(number):
        raise RunError(
            f"the {what} became {number} at step {step + 1} on the batch {batch.describe()}; "
            f"nothing of this step was kept. Lower optim.lr, or look at these slices"
        )


class Progress:
    """How far a run is, with loss, rate and ETA: a bar on a terminal, now and then a line in a log.

    A batch system's log would be filled by a bar that rewrites itself, and empty without any.
    """

    LINE_EVERY = 30.0  # seconds

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.step, self.steps = name, step, steps
        self.first, self.began = step, time.monotonic()
        self.said = self.began
        self.bar = tqdm(
            total=steps, initial=step, desc=name, unit="step", mininterval=1.0, disable=None,
            file=sys.stderr,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, terms: dict[str, float]) -> None:
        self.step += 1
        shown = {name: f"{value:.3g}" for name, value in terms.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        now = time.monotonic()
        last = self.step == self.steps
        if self.bar.disable and (now - self.said >= self.LINE_EVERY or last):
            self.said = now
            rate = (self.step - self.first) / max(now - self.began, 1e-9)
            left = tqdm.format_interval((self.steps - self.step) / rate)
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(
                f"{self.name}: step {self.step} of {self.steps}, {values}, {rate:.2f} step/s, "
                f"ETA {left}",
                file=sys.stderr,
                flush=True,
            )


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Factor on the rate of step `step` (from 0): linear warm-up, then half a cosine."""
    warmup = round(optim.warmup * optim.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, optim.steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_lr + (1 - optim.final_lr) * cosine


def make_optimiser(groups: Iterable[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over parameter groups, each with a factor `scale` on the learning rate.

    Weight decay acts on matrices and kernels, not on biases and norms.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        lr = optim.lr * group.get("scale", 1.0)
        for decay in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decay]
            if chosen:
                weight_decay = optim.weight_decay if decay else 0.0
                split.append({"params": chosen, "lr": lr, "weight_decay": weight_decay})
    if optim.name == "sgd":
        nesterov = optim.momentum > 0
        return torch.optim.SGD(split, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov)
    return torch.optim.AdamW(split, lr=optim.lr)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step, independent of all other steps."""
    generator = torch.Generator(device)
    # An odd multiplier spreads neighbouring steps and seeds over the 64 bits.
    return generator.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)


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
