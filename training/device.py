"""Where and in which precision a run computes, and its random numbers there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .config import Precision, RunConfig
from .distributed import first, own_gpu, world
from .errors import RunError
from .runlog import precision_before

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Device:
    """Where and in which precision a run computes.

    tf32: whether a GPU may round the factors of fp32 products to 10 bits, as torch lets it in
        convolutions by default.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool = True

    @classmethod
    def of(cls, config: RunConfig) -> Device:
        """The device that a configuration asks for.

        Raises:
            RunError: there is no such device, or it does not compute in that precision.
        """
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

        return cls(device, first(chosen))  # one for all: GPUs of other machines may be older

    def exact(self) -> Device:
        """The same in fp32 without TF32: label maps should not depend on what is fast where."""
        return replace(self, dtype=torch.float32, tf32=False)

    def describe(self) -> dict[str, str]:
        """What was chosen, for the run folder."""
        return {"device": str(self.device), "precision": NAMES[self.dtype]}

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within the block networks compute in this precision."""
        reduced = self.dtype != torch.float32
        with (
            torch.autocast(self.device.type, self.dtype) if reduced else nullcontext(),
            nullcontext() if self.tf32 else without_tf32(),
        ):
            yield

    def to(self, module: nn.Module) -> nn.Module:
        """On the device, in the layout that convolutions and the alignment loss like best."""
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within the block products of fp32 on a GPU keep all their bits."""
    # torch's newer switches, which tell operators apart; reading its older ones would raise here.
    switches: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


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
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {name: dtype for dtype, name in NAMES.items()}[precision]
