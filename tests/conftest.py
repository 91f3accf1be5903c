"""Fixtures of all tests: backends, devices, poisoned memory, seeds; and which tests run here."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when kernels are defined: before anything imports salkernels.
    os.environ["TRITON_INTERPRET"] = "1"

import targets
from hypothesis import settings

from salkernels import _kept
from salkernels.backends import triton as triton_backend

# Derandomised: a red run is the same run for everyone, and hypothesis keeps no database.
settings.register_profile(
    "salkernels", derandomize=True, deadline=None, max_examples=40, database=None
)
# For a long search: --hypothesis-profile=nightly, and --hypothesis-seed=N to repeat one.
settings.register_profile(
    "nightly", deadline=None, max_examples=1000, database=None, print_blob=True
)
settings.load_profile("salkernels")


if triton_backend.INTERPRETED and triton_backend.status() is None:
    from triton.runtime.interpreter import InterpretedFunction

    plain_call = InterpretedFunction.__call__

    def quick_call(self, *args, **kwargs):
        """Our device functions find the language patched, by the call of the kernel that they are
        part of; to do it again each time is a third of the interpreter's work."""
        if self.fn.__module__.startswith("salkernels."):
            return self.rewrite()(*args, **kwargs)
        return plain_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = quick_call


def pytest_addoption(parser):
    parser.addoption(
        "--nightly", action="store_true", help="also tests that take minutes or gigabytes"
    )


def pytest_collection_modifyitems(config, items):
    targets.select(config, items, targets.here())
    if not config.getoption("--nightly"):
        reason = "takes minutes or gigabytes; run with --nightly"
        targets.leave_out(
            config,
            items,
            lambda item: (reason, "nightly") if item.get_closest_marker("nightly") else None,
        )


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash.get(targets.LEFT_OUT, None)
    if left_out is not None and left_out.counts:
        terminalreporter.section("not run here")
        for line in left_out.lines():
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """A test that puts other backends in their place finds no call that was made before it."""
    monkeypatch.setattr(_kept, "RECENT", _kept.Recent())


@pytest.fixture(params=list(targets.DEVICES_OF))
def backend(request):
    """The name of every backend in turn: see `targets` for those that run here."""
    return request.param


@pytest.fixture(params=targets.DEVICES)
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
