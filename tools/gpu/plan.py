"""The steps, in order of worth: what comes first is there when time runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from .record import Context

TOTAL = 470  # seconds: with the start of Python and the summary, less than eight minutes
REHEARSAL = 900  # seconds in all on a CPU, where a minute or two are enough unless it is busy
RESERVE = 12  # seconds at the end, for the summary


@dataclass(frozen=True)
class Step:
    """A function of this package, run in a process of its own.

    Args:
        name: of the step and of the function.
        module: where the function is.
        limit: seconds on a GPU.
        what: one line, for the log.
    """

    name: str
    module: str
    limit: float
    what: str

    def limit_on(self, device: str) -> float:
        """A CPU may be as slow as it likes, as long as it ends."""
        return self.limit if device == "cuda" else max(180.0, self.limit)

    def function(self) -> Callable[[Context], None]:
        found: Callable[[Context], None] = getattr(
            import_module(f"{__package__}.{self.module}"), self.name
        )
        return found


PLAN = (
    Step("report", "report", 30, "machine, versions, backends"),
    Step("smoke", "smoke", 60, "small inputs of every form against float64"),
    Step("checks", "checks", 100, "GPU tests, memcheck, racecheck, synccheck side by side"),
    Step("time", "timing", 150, "our backends and all peers, shape by shape"),
    Step("kernels", "kernels", 30, "time by kernel"),
    Step("numerics", "smoke", 25, "nearly aligned features"),
    Step("train", "train", 75, "training steps of the presets"),
    Step("ncu", "kernels", 75, "Nsight Compute on the main kernels"),
    Step("graph", "graph", 40, "graphs, streams, compile, repeats bit for bit"),
    Step("ddp", "ddp", 30, "NCCL with one rank"),
)
# Run by other steps, under a tool that watches them.
TARGETS = (
    Step("sanitized", "checks", 90, "what compute-sanitizer looks at"),
    Step("inspected", "kernels", 60, "what ncu looks at"),
)


def find(name: str) -> Step:
    for step in (*PLAN, *TARGETS):
        if step.name == name:
            return step
    raise ValueError(f"no step {name!r}; expected one of {', '.join(s.name for s in PLAN)}")
