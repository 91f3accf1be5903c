"""One provider on one case: a first trial (right? how much memory?), then interleaved rounds."""

from __future__ import annotations

import ctypes
import functools
import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import verify
from .cases import Case, Problem
from .clock import HostQueue, Mark, Queue, Round, Stopwatch, queue_for, replay_seconds
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
        first: seconds of the first call, compilation included: of the case itself for what compiles
            for a shape, of a tiny one else.
    """

    status: str
    reason: str = ""
    seconds: float = float("nan")
    peak: float = float("nan")
    errors: verify.Errors = UNKNOWN
    first: float = float("nan")


@dataclass
class Times:
    """The rounds of a job.

    Args:
        passes: seconds of each round on the device, by pass.
        host: seconds that the host took to queue each, by pass; empty on a CPU.
        queued: whether each round's work was in the device's queue before it began.
        graph: seconds of the captured call, NaN where it was not captured.
        obstacle: why it was not captured.
    """

    passes: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    queued: bool = True
    graph: float = float("nan")
    obstacle: str = ""


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
        first = first_call(provider, (case if provider.builds else tiny).problem(device), job.mode)
        expected = verify.Truth(*torch.load(Path(truth)))
        found = trial(provider, case.problem(device), job.mode, expected)
    except Exception as error:  # whatever a provider raises is its result
        return Trial(_status(error), describe_error(error))
    return replace(found, first=first)


def first_call(provider: Provider, problem: Problem, mode: str) -> float:
    """Seconds of the first call, before any warm-up."""
    return _seconds(functools.partial(run_once, provider, problem, mode), problem.features.device)


def trial(provider: Provider, problem: Problem, mode: str, expected: verify.Truth) -> Trial:
    """One call after the warm-up: whether it is right, and its memory."""
    device = problem.features.device.type
    memory = PeakMemory(device)
    start = time.perf_counter()
    loss, grad = run_once(provider, problem, mode)
    synchronise(device)
    seconds = time.perf_counter() - start
    peak = memory.growth() - (0 if grad is None else grad.numel() * grad.element_size())
    found = verify.errors(expected, loss, grad)
    reason = verify.complaint(found, str(problem.features.dtype).removeprefix("torch."))
    status = "ok" if reason is None else "wrong"
    return Trial(status, reason or "", seconds, max(0, peak), found)


def _seconds(run: Callable[[], object], device: str | torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronise(str(device))
    start = time.perf_counter()
    run()
    synchronise(str(device))
    return time.perf_counter() - start


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
    """As many as the budget allows, but at least a few; slow providers get fewer."""
    least = 5 if seconds < 1.5 else 3 if seconds < 5 else 2
    return int(min(max(settings.budget / max(seconds, 1e-9), least), settings.max_rounds))


def time_jobs(
    jobs: dict[Job, float], case: Case, settings: Settings
) -> Iterator[Rates | Job | tuple[Job, Times]]:
    """Interleaved rounds of all jobs, so that drift of the machine affects all equally.

    Args:
        jobs: each with the seconds that a run is expected to take.
        case: what to run.
        settings: how.

    Yields:
        The machine's rates, the job about to run (a sign of life), and at the end, per job, its
        times; a job that raised has none. On a GPU each job comes a second time once its graph has
        been replayed.
    """
    torch.set_num_threads(settings.threads)
    yield measure_rates(settings.device, case.torch_dtype, settings.quick)
    yield from interleaved(jobs, case.problem(settings.device), settings)


def interleaved(
    jobs: dict[Job, float], problem: Problem, settings: Settings, graphs: bool = True
) -> Iterator[Job | tuple[Job, Times]]:
    """The rounds of `time_jobs` on existing features; `graphs`: also time their replay."""
    found = providers()
    queue = queue_for(settings.device)
    times = {job: Times() for job in jobs}
    watches = {job: Stopwatch(queue) for job in jobs}
    alive = dict.fromkeys(jobs, True)
    planned: dict[Job, int] = {}
    for job, seconds in jobs.items():
        yield job
        # The first call in a process never counts: who says "builds" has compiled in another, and
        # who does not say so may do so nevertheless.
        run = functools.partial(run_once, found[job.provider], problem, job.mode)
        planned[job] = rounds_for(min(seconds, _seconds(run, settings.device)), settings)
    total = max(planned.values(), default=0)
    order = random.Random(0)
    for index in range(total):
        # Few rounds are spread over the whole time, not bunched at its start.
        due = [job for job, n in planned.items() if (index + 1) * n // total > index * n // total]
        order.shuffle(due)
        for job in (job for job in due if alive[job]):
            yield job
            try:
                timed(found[job.provider], problem, job.mode, watches[job], times[job])
            except Exception:  # it did run once: memory has become short, most likely
                alive[job] = False
                times[job] = Times()
    yield from times.items()
    if graphs and settings.device.startswith("cuda"):
        yield from replayed(times, problem, queue)


def timed(provider: Provider, problem: Problem, mode: str, watch: Stopwatch, times: Times) -> Round:
    """Adds one run to the times: the pass "forward", or the passes "backward" and "both"."""

    def run(mark: Mark) -> object:
        if mode == "forward":
            with torch.no_grad():
                return provider.run(problem)
        loss = provider.run(problem)
        mark()
        return problem.gradient(loss)

    found = watch.time(run)
    apart = isinstance(watch.queue, HostQueue)  # on a CPU the host is the device
    for into, parts in ((times.passes, found.device), (times.host, [] if apart else found.host)):
        if mode == "forward":
            named = dict(zip(("forward",), parts, strict=False))
        else:
            named = {"backward": parts[1], "both": sum(parts)} if parts else {}
        for name, seconds in named.items():
            into.setdefault(name, []).append(seconds)
    times.queued = not watch.waits
    return found


def replayed(
    times: dict[Job, Times], problem: Problem, queue: Queue
) -> Iterator[Job | tuple[Job, Times]]:
    """The jobs again, with the time of their graph or why there is none.

    Last of all: a capture that fails can leave the device's context in a state that fails, too.
    """
    for job, measured in times.items():
        if not measured.passes:
            continue
        yield job
        run = functools.partial(run_once, providers()[job.provider], problem, job.mode)
        try:
            measured.graph = replay_seconds(queue, run)
        except Exception as error:  # whatever a provider raises is its result
            measured.obstacle = describe_error(error)
        yield job, measured
