"""What a call costs when there is almost nothing to compute: 2 x 16 x 6 x 6, window 2, in µs.

The yardstick is an empty operator registered in the same way, which only makes its result: what is
above it is spent on checks, selection of a backend, masks and the kernel itself.
"""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import salkernels
from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import markdown_table

from .cases import Problem
from .machine import conditions, describe, synchronise
from .measure import Settings
from .provider import Run
from .providers import providers
from .report import MACHINE, Results, Row, number
from .verify import BOUNDS

SHAPE = (2, 16, 6, 6)
WINDOW = 2
COLUMNS = ("call", "pass", "status", "median_us", "p20_us", "p80_us", "above_empty_us", *MACHINE)
Call = Callable[[Tensor], Tensor]
EMPTY = "empty operator"


@functools.cache
def empty_operator() -> Call:
    """`salkernels_benchmarks::empty`: (S, C, H, W) -> scalar 0, and zeros as its gradient."""
    library = torch.library.Library("salkernels_benchmarks", "FRAGMENT")
    library.define("empty(Tensor x) -> Tensor")
    library.impl("empty", lambda x: x.new_zeros(()), "CompositeExplicitAutograd")

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])

    torch.library.register_autograd(
        "salkernels_benchmarks::empty", backward, setup_context=setup, lib=library
    )
    # The registration ends with the library object: the operator keeps it.
    operator = torch.ops.salkernels_benchmarks.empty.default
    return functools.partial(_keeping, operator, library)


def _keeping(operator: Call, library: object, x: Tensor) -> Tensor:
    return operator(x)


def small_calls(device: str) -> tuple[Tensor, dict[str, Call]]:
    """The features and every call on them, by name."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(SHAPE, generator=generator).to(device)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    partner = features.detach().flip(0)
    pairs = ~torch.eye(2, dtype=torch.bool)
    query, key = (index.to(device) for index in pairs.nonzero(as_tuple=True))
    calls: dict[str, Call] = {EMPTY: empty_operator()}
    for name in ("naive", "gram"):
        rest = (pairs, query, key, WINDOW)
        calls[name] = functools.partial(_provider_loss, run=providers()[name].run, rest=rest)
    for status in salkernels.backends():
        if not status.available:
            continue
        name = status.name
        calls[f"wla_set_loss, {name}"] = functools.partial(_set_loss, pairs=pairs, name=name)
        calls[f"wla_loss, {name}"] = functools.partial(_pair_loss, partner=partner, name=name)
    return features, calls


def _provider_loss(x: Tensor, run: Run, rest: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
    return run(Problem(x, *rest))


def _set_loss(x: Tensor, pairs: Tensor, name: str) -> Tensor:
    return salkernels.wla_set_loss(x, pairs, WINDOW, backend=name)


def _pair_loss(x: Tensor, partner: Tensor, name: str) -> Tensor:
    return salkernels.wla_loss(x, partner, WINDOW, backend=name)


def measure_overhead(label: str, settings: Settings, folder: Path) -> str:
    """Writes `<label>-overhead.csv` and returns the table."""
    torch.set_num_threads(settings.threads)
    features, calls = small_calls(settings.device)
    pairs = ~torch.eye(2, dtype=torch.bool)
    expected = salkernels.wla_set_loss(
        features.detach().double(), pairs, WINDOW, backend="reference"
    )
    rounds, repeats = (3, 20) if settings.quick else (40, 100)
    times: dict[tuple[str, str], list[float]] = {}
    wrong: set[str] = set()
    for name, call in calls.items():
        for what in ("forward", "both"):
            _repeat(call, features, what, repeats, settings.device)  # warm-up
            times[name, what] = []
        # Both pairs, so the pairwise form on (x, x flipped) has the mean of the set form.
        error = (call(features).detach().double() - expected).abs() / expected
        if name != EMPTY and not float(error) <= BOUNDS["float32"].loss:
            wrong.add(name)
    order = list(times)
    gc.disable()  # a collection in between would be charged to whoever runs then
    try:
        for _ in range(rounds):
            random.Random(len(times[order[0]])).shuffle(order)
            for name, what in order:
                seconds = _repeat(calls[name], features, what, repeats, settings.device)
                times[name, what].append(seconds)
    finally:
        gc.enable()
    machine = describe(settings.device, settings.threads)
    empty = {what: float(np.median(times[EMPTY, what])) for what in ("forward", "both")}
    rows = [
        _row(name, what, seconds, empty[what], name in wrong, machine)
        for (name, what), seconds in times.items()
    ]
    results = Results(folder / f"{label}-overhead.csv", COLUMNS, ("call", "pass"))
    results.add(rows)
    table = _table(rows)
    write_atomically(results.path.with_suffix(".md"), table)
    return table


def _repeat(call: Call, features: Tensor, what: str, repeats: int, device: str) -> float:
    """Seconds per call, over enough calls that the clock does not matter."""
    synchronise(device)
    start = time.perf_counter()
    if what == "forward":
        with torch.no_grad():
            for _ in range(repeats):
                call(features)
    else:
        for _ in range(repeats):
            torch.autograd.grad(call(features), features)
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def _row(
    name: str, what: str, seconds: list[float], empty: float, wrong: bool, machine: Row
) -> Row:
    row = {**machine, "call": name, "pass": what, "status": "wrong" if wrong else "ok"}
    if wrong:
        return row
    low, middle, high = (float(q) * 1e6 for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    return {
        **row,
        "median_us": number(middle),
        "p20_us": number(low),
        "p80_us": number(high),
        "above_empty_us": number(middle - empty * 1e6),
    }


def _table(rows: list[Row]) -> str:
    shape = " x ".join(map(str, SHAPE))
    heading = ["call", "pass", "µs (20–80 %)", "above the empty operator"]
    cells = [
        [row["call"], row["pass"], f"{row['median_us']} ({row['p20_us']}–{row['p80_us']})",
         row["above_empty_us"]]
        if row["status"] == "ok"
        else [row["call"], row["pass"], row["status"], ""]
        for row in rows
    ]  # fmt: skip
    return (
        f"One call on {shape}, window {WINDOW}, fp32; {conditions(rows[0])}\n\n"
        f"{markdown_table([heading, *cells], 'llrr')}\n"
    )
