"""The steps, in order of worth: what comes first is there when time runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
        least: seconds that the steps before it leave to it.
        times: whether it times anything, and waits for what compiles in the background.
        compiles: whether it does so itself, and alone.
    """

    name: str
    module: str
    limit: float
    what: str
    least: float = 0.0
    times: bool = False
    compiles: bool = False

    def limit_on(self, device: str) -> float:
        """A CPU may be as slow as it likes, as long as it ends."""
        return self.limit if device == "cuda" else max(180.0, self.limit)

    def function(self) -> Callable[[Context], None]:
        found: Callable[[Context], None] = getattr(
            import_module(f"{__package__}.{self.module}"), self.name
        )
        return found


PLAN = (
    Step("report", "report", 30, "machine, versions, backends", 20),
    Step("smoke", "smoke", 60, "small inputs of every form against float64", 15),
    Step("checks", "checks", 100, "GPU tests, memcheck, racecheck, synccheck side by side", 40),
    Step("time", "timing", 150, "our backends and all peers, shape by shape", 30, times=True),
    Step("kernels", "kernels", 30, "time by kernel", 15, times=True),
    Step("negatives", "negatives", 25, "wla_contrast: its negatives, and its times", 3, times=True),
    Step("numerics", "smoke", 25, "nearly aligned features", 12),
    Step("host", "host", 20, "what a call costs the host, back to back", 18, times=True),
    Step("train", "train", 60, "training steps of the presets", 25, times=True),
    Step("split", "train", 25, "a training step by part", 10, times=True),
    Step("ncu", "kernels", 75, "Nsight Compute on the main kernels"),
    Step("graph", "graph", 40, "graphs, streams, compile, repeats bit for bit", 20),
    Step("ddp", "ddp", 30, "NCCL with one rank", 15),
)
# In the background from the start on, as long as others run.
BESIDE = Step("warm", "warm", 300, "compiles Triton's kernels that the cache lacks")
# Run when it is named.
ON_DEMAND = (
    Step("tune", "tune", 100, "the table's tiles of Triton kernels and others", 40, compiles=True),
)
# Run by other steps, under a tool that watches them.
TARGETS = (
    Step("sanitized", "checks", 90, "what compute-sanitizer looks at"),
    Step("inspected", "kernels", 60, "what ncu looks at"),
)


def find(text: str) -> Step:
    """The step of a name; `NAME:SECONDS` gives it another limit.

    Raises:
        ValueError: there is none of that name, or the limit is no number of seconds.
    """
    name, _, seconds = text.partition(":")
    for step in (*PLAN, *ON_DEMAND, BESIDE, *TARGETS):
        if step.name == name:
            return replace(step, limit=_limit(text, seconds)) if seconds else step
    known = ", ".join(step.name for step in (*PLAN, *ON_DEMAND, BESIDE))
    raise ValueError(f"no step {name!r}; expected one of {known}")


def _limit(text: str, seconds: str) -> float:
    try:
        limit = float(seconds)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(f"expected STEP:SECONDS, such as time:60, got {text!r}")
    return limit
