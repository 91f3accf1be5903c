"""Backends whose kernels do nothing, on a CPU that plays a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from salkernels import _kept, _native, library
from salkernels.backends import cuda, triton

CAPABILITY = 90


def play_gpu() -> None:
    """Tensors of the CPU are taken for those of a GPU, on stream 0, by all that asks for one."""
    _kept._has_streams = lambda device: True
    _kept.stream_of = lambda device: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.current_device = lambda: 0


def _direct(operator: Any) -> Any:
    return getattr(operator, "_op", operator)


def stub_cuda() -> None:
    """The registration for GPUs, compiled for the host; it hands launches to nobody."""
    from tools.host_cuda.kernels import SHARED_BYTES, load

    emulator, _ = load()
    take = ctypes.cast(emulator.emulator_no_launch, ctypes.c_void_p)
    emulator.emulator_set.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    emulator.emulator_set(SHARED_BYTES[CAPABILITY], 0, take)
    operators = torch.ops.salkernels_emulator
    for name in ("match", "match_backward", "mean_match", "mean_match_backward"):
        if hasattr(cuda, f"_{name}"):
            setattr(cuda, f"_{name}", _direct(getattr(operators, f"native_{name}").default))
    cuda.why_not = lambda query, key, window: None if query.is_cpu else "not a CPU"


def stub_triton() -> None:
    """Kernels compiled for a GPU that is not there; a launch ends at the driver."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from salkernels.triton_kernels import launch, offline

    from .driver import triton_utilities

    utilities = triton_utilities()
    device = offline.AbsentDevice(CAPABILITY)
    device.utils = utilities
    device.allocate_default_profile_scratch = None
    driver.set_active(device)
    launch.capability = lambda x: CAPABILITY
    triton.why_not = lambda query, key, window: None if query.is_cpu else "not a CPU"
    plain = JITFunction.run

    def run(self: Any, *words: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = plain(self, *words, grid=grid, warmup=True, **options)
        compiled.module, compiled.function = 0, 1
        compiled._run = CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    JITFunction.run = run
