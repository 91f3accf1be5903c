"""What the tests run on: backends, devices and dtypes, and which of them this machine has.

A test that takes the fixtures `backend` and `device` is written once and runs on every target. The
table below says which targets exist; the machine says which of them can run here. A test of a
target that does not exist is never made. A test of one that cannot run here is deselected, and the
end of the run names the reason once, with the number of tests. A test that is selected calls its
backend by name, so a backend that refuses an input it should take fails and is not skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

# The devices of each backend. On the CPU, Triton's kernels run in its interpreter. This is not read
# from the backends: one that loses a device or a dtype by mistake must fail here.
DEVICES_OF = {
    "cuda": ("cuda",),
    "triton": ("cuda", "cpu"),
    "cpu": ("cpu",),
    "reference": ("cpu", "cuda"),
}
DEVICES = ("cpu", "cuda")
NO_FLOAT64 = ("triton",)
NO_GPU = "torch sees no GPU"

# Marks: of one target without fixtures, of the dtype of a test that has no parameter for it, and of
# what takes too long in Triton's interpreter.
runs_on = pytest.mark.runs_on
of_dtype = pytest.mark.of_dtype
slow_in_the_interpreter = pytest.mark.slow_in_the_interpreter


@dataclass(frozen=True)
class Machine:
    """What decides which targets can run."""

    gpu: bool
    interpreted: bool  # Triton's kernels belong to its interpreter
    missing: Mapping[str, str] = field(default_factory=dict)  # backend -> why it cannot run at all

    def obstacle(self, backend: str | None, device: str | None) -> str | None:
        """Why a target cannot run here; None if it can. None for a part: any will do."""
        if device == "cuda" and not self.gpu:
            return NO_GPU
        if backend == "triton" and device is not None:
            if device == "cpu" and not self.interpreted:
                return "Triton is not in interpreter mode (TRITON_INTERPRET=1)"
            if device == "cuda" and self.interpreted:
                return "Triton is in interpreter mode (TRITON_INTERPRET=1)"
        return None if backend is None else self.missing.get(backend)


def here() -> Machine:
    """This machine."""
    from salkernels.backends import BACKENDS, triton

    reasons = {name: backend.status() for name, backend in BACKENDS.items()}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return Machine(torch.cuda.is_available(), triton.INTERPRETED, missing)


@dataclass(frozen=True)
class Target:
    """What one test needs."""

    backend: str | None
    device: str | None
    dtype: torch.dtype | None
    slow_in_the_interpreter: bool

    @classmethod
    def of(cls, item: pytest.Item) -> Target:
        """From the parameters and the marks of a test."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        mark = item.get_closest_marker("runs_on")
        backend, device = (*mark.args, None)[:2] if mark else (None, None)
        dtype = params.get("dtype", getattr(params.get("case"), "dtype", None))
        if mark := item.get_closest_marker("of_dtype"):
            (dtype,) = mark.args
        slow = item.get_closest_marker("slow_in_the_interpreter") is not None
        return cls(params.get("backend", backend), params.get("device", device), dtype, slow)

    def exists(self) -> bool:
        """Whether the package promises this at all."""
        if self.backend not in DEVICES_OF:
            return True
        if self.device is not None and self.device not in DEVICES_OF[self.backend]:
            return False
        if self.dtype == torch.float64 and self.backend in NO_FLOAT64:
            return False
        interpreted = (self.backend, self.device) == ("triton", "cpu")
        return not (interpreted and self.slow_in_the_interpreter)

    def __str__(self) -> str:
        if self.backend is None:
            return "GPU" if self.device == "cuda" else "other"
        elsewhere = self.device is not None and len(DEVICES_OF[self.backend]) > 1
        return f"{self.backend} on {self.device}" if elsewhere else self.backend


class LeftOut:
    """Tests that do not run here, counted by reason and target."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, reason: str, what: str) -> None:
        self.counts.setdefault(reason, Counter())[what] += 1

    def lines(self) -> list[str]:
        """One line for each reason."""
        return [
            f"{reason}: {sum(counts.values())} tests ("
            + ", ".join(f"{count} of {what}" for what, count in counts.items())
            + ")"
            for reason, counts in self.counts.items()
        ]


LEFT_OUT = pytest.StashKey[LeftOut]()


def leave_out(
    config: pytest.Config,
    items: list[pytest.Item],
    obstacle: Callable[[pytest.Item], tuple[str, str] | None],
) -> None:
    """Deselects the tests that have an obstacle, (reason, what they test), and counts them."""
    chosen, others = [], []
    left_out = config.stash.setdefault(LEFT_OUT, LeftOut())
    for item in items:
        if (found := obstacle(item)) is None:
            chosen.append(item)
        else:
            left_out.add(*found)
            others.append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def select(config: pytest.Config, items: list[pytest.Item], machine: Machine) -> None:
    """Keeps the tests whose targets exist and run on this machine."""

    def obstacle(item: pytest.Item) -> tuple[str, str] | None:
        target = Target.of(item)
        reason = machine.obstacle(target.backend, target.device)
        return None if reason is None else (reason, str(target))

    items[:] = [item for item in items if Target.of(item).exists()]
    leave_out(config, items, obstacle)
