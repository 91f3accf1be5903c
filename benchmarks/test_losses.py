"""pytest-benchmark: every provider on the suites' cases, forward, backward and both.

    pytest benchmarks --benchmark-only -k "paper and forward and (cpu or gram)"

Each test verifies its provider first; the runner (`python -m benchmarks`) is what published numbers
come from, since it interleaves providers and measures memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from . import verify
from .cases import SUITES, Case, Problem
from .machine import synchronise
from .measure import run_once
from .provider import Provider
from .providers import names_for, providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5


def parameters() -> Iterator[Any]:
    """(case, provider), each case once, named by suite, provider and case for `-k`."""
    seen: set[str] = set()
    for suite, cases in SUITES.items():
        for case in cases:
            if case.key in seen:
                continue
            seen.add(case.key)
            for name in names_for(suite, case is cases[0], DEVICE):
                yield pytest.param(case, name, id=f"{suite}-{name}-{case.key}")


@functools.lru_cache(maxsize=1)
def truth(case: Case) -> verify.Truth:
    return verify.truth(case, DEVICE)


@pytest.fixture
def job(case: Case, name: str, request: pytest.FixtureRequest) -> tuple[Provider, Problem]:
    """A provider that gave the right answer on the problem, or a skip with the reason."""
    provider = providers()[name]
    forward_only = "forward" in request.node.originalname
    reason = provider.refuses(case)
    if reason is None and not forward_only and not provider.has_backward:
        reason = "it has no backward"
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    problem = case.problem(DEVICE)
    try:
        loss, grad = run_once(provider, problem, "forward" if forward_only else "both")
    except Exception as error:
        pytest.skip(f"{name}: {type(error).__name__}: {error}")
    complaint = verify.complaint(verify.errors(truth(case), loss, grad), case.dtype)
    if complaint is not None:
        pytest.fail(f"{name}: {complaint}")
    return provider, problem


@pytest.mark.parametrize(("case", "name"), parameters())
def test_forward(benchmark: Any, job: tuple[Provider, Problem], case: Case) -> None:
    provider, problem = job
    benchmark.group = f"forward {case.key}"

    def run() -> None:
        run_once(provider, problem, "forward")
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=ROUNDS)


@pytest.mark.parametrize(("case", "name"), parameters())
def test_backward(benchmark: Any, job: tuple[Provider, Problem], case: Case) -> None:
    provider, problem = job
    benchmark.group = f"backward {case.key}"

    def setup() -> tuple[tuple[Tensor], dict[str, Any]]:
        loss = provider.run(problem)
        synchronise(DEVICE)
        return (loss,), {}

    def run(loss: Tensor) -> None:
        problem.gradient(loss)
        synchronise(DEVICE)

    benchmark.pedantic(run, setup=setup, rounds=ROUNDS)


@pytest.mark.parametrize(("case", "name"), parameters())
def test_both(benchmark: Any, job: tuple[Provider, Problem], case: Case) -> None:
    provider, problem = job
    benchmark.group = f"both {case.key}"

    def run() -> None:
        run_once(provider, problem, "both")
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=ROUNDS)
