"""Here `backend` is the CUDA kernels compiled for the host, in place of each installed backend."""

from __future__ import annotations

import importlib

import pytest
import torch

from tools.host_cuda import kernels


@pytest.fixture(scope="session")
def host_kernels():
    reason = kernels.obstacle()
    if reason is not None:
        pytest.skip(f"the CUDA kernels cannot be compiled for the host: {reason}")
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
