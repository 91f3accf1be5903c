"""Here `backend` is the CUDA kernels compiled for the host, in place of each installed backend."""

from __future__ import annotations

import importlib
import shutil

import pytest
import targets
import torch

from tools.host_cuda import kernels
from tools.ptx import cuda_kernels

# What a fixture needs that a machine may lack: asked once, and told once.
OBSTACLES = {
    "host_kernels": kernels.obstacle,
    "compiled": cuda_kernels.obstacle,
    "resources": lambda: None if shutil.which("nvcc") else "nvcc is not on the PATH",
}


def pytest_collection_modifyitems(config, items):
    found = {fixture: ask() for fixture, ask in OBSTACLES.items()}
    targets.leave_out(
        config,
        items,
        lambda item: next(
            (
                (found[fixture], "CUDA kernels without a GPU")
                for fixture in getattr(item, "fixturenames", ())
                if found.get(fixture) is not None
            ),
            None,
        ),
    )


@pytest.fixture(scope="session")
def host_kernels():
    return kernels.HostKernels()


@pytest.fixture
def backend(monkeypatch, host_kernels):
    registry = importlib.import_module("salkernels.backends")
    name = "cuda on the host"
    monkeypatch.setattr(registry, "BACKENDS", {name: host_kernels, **registry.BACKENDS})
    return name


@pytest.fixture
def device():
    return torch.device("cpu")
