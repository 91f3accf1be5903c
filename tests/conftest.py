"""Fixtures of all tests: backends with their own skip reasons, devices, poisoned memory, seeds."""

from __future__ import annotations

import pytest
import torch
from compare import DEVICES
from hypothesis import settings

from salkernels.backends import BACKENDS

# Derandomised: a red run is the same run for everyone, and hypothesis keeps no database.
settings.register_profile(
    "salkernels", derandomize=True, deadline=None, max_examples=40, database=None
)
settings.load_profile("salkernels")


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    """The name of every backend in turn; one that cannot run here skips and says why."""
    reason = BACKENDS[request.param].status()
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def _of_the_core(request) -> bool:
    """The tests of salkernels.training choose their own seeds and deterministic mode."""
    return "training" not in request.path.parts


@pytest.fixture(autouse=True)
def seed(request):
    if _of_the_core(request):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(request):
    """Uninitialised memory holds NaN, or the largest integer, so that an unwritten element shows.

    torch does this itself in deterministic mode, also for what C++ allocates with at::empty.
    """
    if not _of_the_core(request):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
