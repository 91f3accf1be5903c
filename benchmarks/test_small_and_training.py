"""pytest-benchmark: the overhead of small calls, and a step of pre-training per loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salkernels import backends

from .machine import synchronise
from .measure import Settings
from .overhead import small_calls
from .providers import providers
from .test_losses import DEVICE, ROUNDS
from .training import EXTRA, SHAPES, Step

WINDOW = 2
SMALL, CALLS = small_calls(DEVICE)
AVAILABLE = [f"salkernels-{status.name}" for status in backends() if status.available]


@pytest.mark.parametrize("what", ["forward", "both"])
@pytest.mark.parametrize("name", CALLS)
def test_overhead(benchmark: Any, name: str, what: str) -> None:
    benchmark.group = f"overhead, {what}"

    def run() -> None:
        if what == "forward":
            with torch.no_grad():
                CALLS[name](SMALL)
        else:
            torch.autograd.grad(CALLS[name](SMALL), SMALL)
        synchronise(DEVICE)

    benchmark(run)


@pytest.mark.parametrize("name", [*EXTRA, *AVAILABLE])
def test_training_step(benchmark: Any, name: str) -> None:
    pytest.importorskip("salkernels.training.methods", reason="the training extra is not installed")
    benchmark.group = "step of pre-training"
    settings = Settings(DEVICE, torch.get_num_threads(), 0, ROUNDS, False)
    step = Step(providers()[name], settings, WINDOW, SHAPES["desk"])

    def run() -> None:
        step()
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
