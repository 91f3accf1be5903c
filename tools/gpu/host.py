"""What a call costs the host: many of them back to back, while the device is busy with other work.

The times of the step `time` are of single calls after the device was waited for, with caches cold;
a training loop queues call after call, and that is what is measured here.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import salkernels
from benchmarks.cases import DESK, PAPER, QUICK, Case
from benchmarks.clock import queue_for
from benchmarks.providers import gram

from .record import Context
from .timing import wanted

ROUNDS = 9
CALLS, OF_MANY, OF_ONE = 25, 8, 100  # of a round: a thousand launches fill the device's queue
LEAD = 1.5  # times what the host takes: so long the device is kept busy
PROFILED, TOP = 200, 25  # calls under cProfile, and the functions that are told
Call = Callable[[], object]


class Trivial(torch.autograd.Function):
    """The least that a function of one's own costs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        return grads[0]


def host(context: Context) -> None:
    """Yardsticks, our backends and `gram`: µs per call; then where our own time goes."""
    for name, call in yardsticks(context.device).items():
        _measure(context, name, call, OF_ONE)
    first, *others = cases(context)
    _measure_case(context, first)
    calls = calls_of(first, context)
    for name in context.backends:
        label = f"profile {name}"
        if label in context.finished:
            continue
        context.need(2, label)
        with context.measuring(label, backend=name) as row:
            text, row["us"] = profiled(context, calls[f"{name} both"])
            print(text, flush=True)
    for case in others:
        _measure_case(context, case)


def _measure_case(context: Context, case: Case) -> None:
    for name, call in calls_of(case, context).items():
        count = OF_MANY if name.startswith("gram") else CALLS
        _measure(context, f"{case.key} {name}", call, count)


def cases(context: Context) -> list[Case]:
    if not context.on_gpu:
        return [QUICK]
    both = [replace(PAPER, dtype="bfloat16"), DESK]
    return [case for case in both if wanted(case, context.cases)] or both[:1]


def yardsticks(device: str) -> dict[str, Call]:
    x = torch.ones(8, device=device)
    leaf = torch.ones(8, device=device, requires_grad=True)

    def trivial() -> object:
        return torch.autograd.grad(Trivial.apply(leaf), leaf, x)

    return {"torch.mul": lambda: torch.mul(x, x), "trivial autograd.Function": trivial}


def calls_of(case: Case, context: Context) -> dict[str, Call]:
    """Forward without gradients, and both passes, of each backend and of `gram`."""
    problem = case.problem(context.device)
    plain = problem._replace(features=problem.features.detach())
    found: dict[str, Call] = {}

    def add(name: str, loss: Callable[[Tensor], Tensor]) -> None:
        def forward() -> object:
            with torch.no_grad():
                return loss(plain.features)

        found[f"{name} forward"] = forward
        found[f"{name} both"] = lambda: problem.gradient(loss(problem.features))

    for name in context.backends:
        add(
            name,
            lambda x, name=name: salkernels.wla_set_loss(  # type: ignore[misc]
                x, problem.pairs, problem.window, backend=name
            ),
        )
    add("gram", lambda x: gram(problem._replace(features=x)))
    return found


def _measure(context: Context, label: str, call: Call, count: int) -> None:
    if label in context.finished:
        return
    context.need(1, label)
    with context.measuring(label) as row:
        row.update(microseconds(context, call, count))


def microseconds(context: Context, call: Call, count: int = CALLS) -> dict[str, object]:
    """Of a call, the median of rounds; and whether the device was busy all along."""
    queue = queue_for(context.device)
    rounds = ROUNDS if context.on_gpu else 3
    found, busy = [], True
    for _ in range(3):
        call()
    # The first round is as long as it is; it says how long the device has to be busy.
    lead = 0.05
    for number in range(rounds + 1):
        queue.synchronise()
        queue.spin(lead)
        start, mark = time.perf_counter(), queue.mark()
        for _ in range(count):
            call()
        seconds = time.perf_counter() - start
        waited = mark.reached()
        queue.synchronise()
        lead = min(0.5, LEAD * seconds)
        if number:
            found.append(seconds / count * 1e6)
            busy = busy and not waited
    return {"us": statistics.median(found), "least_us": min(found), "busy": busy}


def profiled(context: Context, call: Call) -> tuple[str, float]:
    """The functions that take the most time by themselves, and µs per call under the profiler."""
    for _ in range(3):
        call()
    context.synchronise()
    profile = cProfile.Profile()
    count = PROFILED if context.on_gpu else 5
    start = time.perf_counter()
    for _ in range(count // CALLS or 1):
        context.synchronise()
        # On a thread of its own the backward would not be seen.
        with torch.autograd.set_multithreading_enabled(False):
            profile.enable()
            for _ in range(min(CALLS, count)):
                call()
            profile.disable()
    seconds = time.perf_counter() - start
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(TOP)
    return text.getvalue(), seconds / count * 1e6
