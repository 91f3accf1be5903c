"""The gradient of one step from k batches on each of W processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data.sampling import SliceBatch
from .distributed import gather_rows, rank
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


class StepResult(NamedTuple):
    """What a step came to in this process, on the device: nobody has waited for it."""

    losses: Tensor  # (k,) of each batch
    terms: dict[str, Tensor]  # (k,) each


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

    def __call__(self, batches: Sequence[SliceBatch]) -> StepResult:
        generators = [self.generator(batch) for batch in batches]
        inputs = [self.task.prepare(*pair) for pair in zip(batches, generators, strict=True)]
        replay = self.record(inputs, generators) if len(batches) > 1 else None
        start = self.memories() if replay else []
        losses: list[Tensor] = []
        terms: dict[str, list[Tensor]] = {}
        for place, given in enumerate(inputs):
            restore(start)
            with replay.live(place) if replay else nullcontext(), self.alone(place, batches):
                loss, named = self.task.loss(given)
                self.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
            for name, term in named.items():
                terms.setdefault(name, []).append(term.detach())
        named_terms = {name: torch.stack(values) for name, values in terms.items()}
        return StepResult(torch.stack(losses), named_terms)

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
