"""The gradient of one step from k batches on each of W processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data.sampling import SliceBatch
from .distributed import gather_rows, rank, total
from .replay import Replay

Input = TypeVar("Input")


@dataclass
class Task(Generic[Input]):
    """What a run learns.

    Args:
        prepare: a batch and its random numbers -> the input of `loss`; called once per batch.
        loss: the input -> the loss and the named terms to log. With several batches per step it
            may be called twice for each, with the same random numbers.
    """

    prepare: Callable[[SliceBatch, torch.Generator], Input]
    loss: Callable[[Input], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class StepResult:
    """Of all processes: mean of the terms, signals heard; `bad` is this process's loss and batch
    where the loss is not finite, `any_bad` whether it is so anywhere."""

    terms: dict[str, float]
    signals: list[int]
    bad: tuple[float, SliceBatch] | None
    any_bad: bool


class Gradients(Generic[Input]):
    """Adds the gradient of a step's mean loss to the parameters."""

    def __init__(
        self,
        module: nn.Module,
        task: Task[Input],
        scaler: torch.amp.GradScaler,
        generator: Callable[[SliceBatch], torch.Generator],
    ) -> None:
        self.module, self.task, self.scaler, self.generator = module, task, scaler, generator
        self.separable = False  # found in the first step: the loss is a mean over batches

    def __call__(
        self, batches: Sequence[SliceBatch], signals: Callable[[], list[int]]
    ) -> StepResult:
        """signals: how often each kind was heard in this process, asked when all is computed."""
        generators = [self.generator(batch) for batch in batches]
        inputs = [self.task.prepare(*pair) for pair in zip(batches, generators, strict=True)]
        replay = self.record(inputs, generators) if len(batches) > 1 else None
        start = self.memories() if replay else []
        sums: dict[str, float] = {}
        bad = None
        for place, (batch, given) in enumerate(zip(batches, inputs, strict=True)):
            restore(start)
            with replay.live(place) if replay else nullcontext(), self.alone(place, batches):
                loss, terms = self.task.loss(given)
                number = loss.item()
                if bad is None and not math.isfinite(number):
                    bad = number, batch
                self.scaler.scale(loss / len(batches)).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item()
        means = [value / len(batches) for value in sums.values()]
        heard = signals()
        agreed = total([float(bad is not None), *map(float, heard), *means, 1.0])
        any_bad, *rest, processes = agreed
        return StepResult(
            terms=dict(zip(sums, (v / processes for v in rest[len(heard) :]), strict=True)),
            signals=[round(count) for count in rest[: len(heard)]],
            bad=bad,
            any_bad=any_bad > 0,
        )

    def record(self, inputs: Sequence[Input], generators: Sequence[torch.Generator]) -> Any:
        """The rows that the batches hand to `gather`; None where they hand it nothing."""
        if self.separable:
            return None
        states = [generator.get_state() for generator in generators]
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        replay = Replay(rank(), gather_rows)
        for given in inputs:
            with replay.record(), self.alone(0, inputs):
                self.task.loss(given)
            restore(buffers)
            self.separable = not replay.kept[0]
            if self.separable:
                break
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return None if self.separable else replay

    def memories(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of what a method remembers of the samples: all batches of a step meet the same,
        and what the last one leaves comes from all of them by `gather`."""
        norms = nn.modules.batchnorm._NormBase
        return [
            (buffer, buffer.clone())
            for part in self.module.modules()
            if not isinstance(part, norms)
            for buffer in part.buffers(recurse=False)
        ]

    def alone(self, place: int, batches: Sequence[Any]) -> AbstractContextManager[Any]:
        """Gradients wait for the last batch before they are averaged over processes."""
        if isinstance(self.module, DistributedDataParallel) and place < len(batches) - 1:
            no_sync: AbstractContextManager[Any] = self.module.no_sync()
            return no_sync
        return nullcontext()


def restore(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Puts (tensor, content) back."""
    with torch.no_grad():
        for tensor, content in copies:
            tensor.copy_(content)
