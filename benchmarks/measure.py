"""One provider on one case: a first trial (right? how much memory?), then interleaved rounds."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import verify
from .cases import Case, Problem
from .isolate import describe_error, proc_kib
from .machine import Rates, measure_rates, synchronise
from .provider import Provider
from .providers import providers

UNKNOWN = verify.Errors(float("nan"), float("nan"))
MODES = ("forward", "both")  # "backward" is timed inside "both", not by subtraction


class Job(NamedTuple):
    provider: str
    mode: str


@dataclass(frozen=True)
class Trial:
    """What the first run of a job showed.

    Args:
        status: "ok", "wrong", "out of memory", "too slow", "unsupported" or "failed".
        reason: one line, "" if ok.
        seconds: of the measured run, a first estimate.
        peak: bytes beyond the input and, for "both", the gradient.
        errors: against the truth; NaN unless it ran.
    """

    status: str
    reason: str = ""
    seconds: float = float("nan")
    peak: float = float("nan")
    errors: verify.Errors = UNKNOWN


class Settings(NamedTuple):
    """How to measure."""

    device: str
    threads: int
    budget: float  # seconds of rounds per job
    max_rounds: int
    quick: bool


def run_once(provider: Provider, problem: Problem, mode: str) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient for "both"."""
    if mode == "forward":
        with torch.no_grad():
            return provider.run(problem), None
    loss = provider.run(problem)
    return loss, problem.gradient(loss)


def save_truth(case: Case, settings: Settings, path: str) -> Iterator[float]:
    """Writes the truth of a case to a file; yields the seconds that it took."""
    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    expected = verify.truth(case, settings.device)
    torch.save([tensor.cpu() for tensor in expected], path)
    yield time.perf_counter() - start


def try_jobs(jobs: list[Job], case: Case, settings: Settings, truth: str) -> Iterator[Trial]:
    """The first trial of each job, in order."""
    torch.set_num_threads(settings.threads)
    for job in jobs:
        yield try_job(job, case, settings.device, truth)


def try_job(job: Job, case: Case, device: str, truth: str) -> Trial:
    provider = providers()[job.provider]
    try:
        # Eager code warms up on a tiny case, so that the first real call shows every allocation,
        # kept buffers included; what is compiled for a shape can only warm up on that shape.
        tiny = Case(8, case.channels, 2 * case.window, 2 * case.window, case.window, case.dtype)
        if case.window > 8:
            tiny = replace(tiny, height=8, width=8, window=4)
        run_once(provider, (case if provider.builds else tiny).problem(device), job.mode)
        problem = case.problem(device)
        memory = PeakMemory(device)
        start = time.perf_counter()
        loss, grad = run_once(provider, problem, job.mode)
        synchronise(device)
        seconds = time.perf_counter() - start
        peak = memory.growth() - (0 if grad is None else grad.numel() * grad.element_size())
        expected = verify.Truth(*torch.load(Path(truth)))
        found = verify.errors(expected, loss, grad)
    except Exception as error:  # whatever a provider raises is its result
        return Trial(_status(error), describe_error(error))
    reason = verify.complaint(found, case.dtype)
    return Trial("ok" if reason is None else "wrong", reason or "", seconds, max(0, peak), found)


def _status(error: Exception) -> str:
    text = str(error)
    full = ("can't allocate memory", "bad_alloc", "out of memory", "Cannot allocate memory")
    if isinstance(error, MemoryError) or any(words in text for words in full):
        return "out of memory"
    return "unsupported" if isinstance(error, NotImplementedError) else "failed"


class PeakMemory:
    """Growth of the peak from here on: the CUDA allocator's, or the resident set on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        # Give freed heap back, or what is taken next would not show.
        ctypes.CDLL(None).malloc_trim(0)
        self.base = proc_kib("/proc/self/status", "VmRSS") << 10
        # "5" resets the peak (proc(5)); later allocations raise it again.
        Path("/proc/self/clear_refs").write_text("5")

    def growth(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.base
        return (proc_kib("/proc/self/status", "VmHWM") << 10) - self.base


def rounds_for(seconds: float, settings: Settings) -> int:
    """As many as the budget allows, but a few at least: the fewer, the slower the provider."""
    least = 5 if seconds < 1.5 else 3 if seconds < 5 else 2
    return int(min(max(settings.budget / max(seconds, 1e-9), least), settings.max_rounds))


def time_jobs(
    jobs: dict[Job, float], case: Case, settings: Settings
) -> Iterator[Rates | Job | tuple[Job, dict[str, list[float]]]]:
    """Interleaved rounds of all jobs, so that drift of the machine hits all alike.

    Args:
        jobs: each with the seconds that a run is expected to take.
        case: what to run.
        settings: how.

    Yields:
        The machine's rates, the job about to run (a sign of life), and at the end, per job, the
        seconds of each round by pass; a job that raised has none.
    """
    torch.set_num_threads(settings.threads)
    yield measure_rates(settings.device, case.torch_dtype, settings.quick)
    problem = case.problem(settings.device)
    found = providers()
    times: dict[Job, dict[str, list[float]]] = {job: {} for job in jobs}
    alive = dict.fromkeys(jobs, True)
    for job, seconds in jobs.items():
        yield job
        if seconds < 1 or found[job.provider].builds:
            run_once(found[job.provider], problem, job.mode)
    planned = {job: rounds_for(seconds, settings) for job, seconds in jobs.items()}
    total = max(planned.values(), default=0)
    order = random.Random(0)
    for index in range(total):
        # Few rounds are spread over the whole time, not bunched at its start.
        due = [job for job, n in planned.items() if (index + 1) * n // total > index * n // total]
        order.shuffle(due)
        for job in (job for job in due if alive[job]):
            yield job
            try:
                for name, seconds in timed(found[job.provider], problem, job.mode).items():
                    times[job].setdefault(name, []).append(seconds)
            except Exception:  # it did run once: memory has become short, most likely
                alive[job] = False
                times[job].clear()
    yield from times.items()


def timed(provider: Provider, problem: Problem, mode: str) -> dict[str, float]:
    """Seconds of one run: {"forward"}, or {"backward", "both"}."""
    clock = Clock(problem.features.device.type == "cuda")
    if mode == "forward":
        with torch.no_grad():
            clock.mark()
            provider.run(problem)
            clock.mark()
        return {"forward": clock.seconds()[0]}
    clock.mark()
    loss = provider.run(problem)
    clock.mark()
    grad = problem.gradient(loss)
    clock.mark()
    forward, backward = clock.seconds()
    del grad
    return {"backward": backward, "both": forward + backward}


class Clock:
    """Marks in time: CUDA events on a GPU, which do not hold up the host, else its clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[float] = []
        self.events: list[torch.cuda.Event] = []
        if cuda:
            torch.cuda.synchronize()

    def mark(self) -> None:
        if self.cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between neighbouring marks."""
        if self.cuda:
            torch.cuda.synchronize()
            pairs = zip(self.events, self.events[1:], strict=False)
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
