"""Numbers of a step that are read once the next one is queued, so that nobody waits for the device.

`loss.item()` makes the CPU wait until the GPU has done all that was queued, which then has nothing
to do while the CPU prepares the next step. Here the numbers travel behind the step's own work, and
are read when they have long arrived.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.sampling import SliceBatch
from .distributed import total
from .errors import RunError
from .steps import StepResult
from .transfer import Travelling


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
class Queued:
    """A step whose work is queued.

    Args:
        step: number of the step, from 1.
        batches: that it was taken on.
        names: of the terms.
        numbers: losses of the batches, the gradient's norm, and of each term that of each batch.
        skips: whether a step with a gradient that is not finite is skipped, and not an error.
    """

    step: int
    batches: Sequence[SliceBatch]
    names: Sequence[str]
    numbers: Travelling
    skips: bool

    @classmethod
    def of(
        cls,
        step: int,
        batches: Sequence[SliceBatch],
        result: StepResult,
        norm: Tensor,
        *,
        skips: bool,
    ) -> Queued:
        parts = [result.losses, norm[None], *result.terms.values()]
        numbers = torch.cat([part.float() for part in parts])
        return cls(step, batches, [*result.terms], Travelling(numbers), skips)

    def values(self) -> tuple[list[float], float, dict[str, float]]:
        """Losses of the batches, the gradient's norm, and the terms as means over the batches."""
        numbers, count = self.numbers.values(), len(self.batches)
        terms = {
            name: sum(numbers[start : start + count]) / count
            for name, start in zip(self.names, range(count + 1, len(numbers), count), strict=True)
        }
        return numbers[:count], numbers[count], terms


class Ledger:
    """Checks that steps are finite and adds their terms to a meter, one step late.

    Under several processes all must call `add` and `settle` alike: they tell each other.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.open: Queued | None = None

    def add(self, queued: Queued) -> None:
        """Takes a step that was just queued, and reads the one before.

        Raises:
            RunError: that one was not finite, here or in another process.
        """
        self.settle()
        self.open = queued

    def settle(self, *, together: bool = True) -> None:
        """Reads what is open, before anything is written; waits for the device.

        together: as all processes do; else this one goes by itself.

        Raises:
            RunError: as `add`.
        """
        queued, self.open = self.open, None
        if queued is None:
            return
        losses, norm, terms = queued.values()
        bad = [
            pair for pair in zip(losses, queued.batches, strict=True) if not math.isfinite(pair[0])
        ]
        told = [float(len(bad)), *terms.values(), 1.0]
        any_bad, *sums, processes = total(told) if together else told
        if bad:
            raise _not_finite("loss", bad[0][0], queued.step, [bad[0][1]])
        if any_bad:
            raise RunError(f"the loss of another process is not finite at step {queued.step}")
        # After the losses: the norm is that of all processes, whoever's batch is to blame.
        if not math.isfinite(norm) and not queued.skips:
            raise _not_finite("gradient's norm", norm, queued.step, queued.batches)
        means = (value / processes for value in sums)
        self.meter.add(dict(zip(terms, means, strict=True)))


def _not_finite(what: str, number: float, step: int, batches: Sequence[SliceBatch]) -> RunError:
    slices = "; ".join(batch.describe() for batch in batches)
    return RunError(
        f"the {what} became {number} at step {step} on the batch {slices}; nothing was written "
        f"since, and the last checkpoint is intact. Lower optim.lr, or look at these slices"
    )
