"""Backends whose kernels do nothing, on a CPU that plays a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from salkernels import _kept
from salkernels.backends import cuda, triton

CAPABILITY = 90


def _put(where: Any, **what: Any) -> None:
    for name, value in what.items():
        setattr(where, name, value)


def _why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    return None if query.is_cpu else "the stub takes tensors of the CPU"


def play_gpu() -> None:
    """Tensors of the CPU are taken for those of a GPU, on stream 0, by all that asks for one."""
    _put(_kept, _has_streams=lambda device: True, stream_of=lambda device: 0)
    _put(torch.cuda, is_current_stream_capturing=lambda: False, current_device=lambda: 0)


def stub_cuda() -> None:
    """The registration for GPUs, compiled for the host; its launches end at once."""
    from tools.host_cuda.kernels import SHARED_BYTES, load

    emulator, _ = load()
    take = ctypes.cast(emulator.emulator_no_launch, ctypes.c_void_p)
    emulator.emulator_set.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    emulator.emulator_set(SHARED_BYTES[CAPABILITY], 0, take)
    for name in ("match", "match_backward", "mean_match", "mean_match_backward"):
        operator = getattr(torch.ops.salkernels_emulator, f"native_{name}").default
        wrapped = isinstance(getattr(cuda, f"_{name}"), torch._ops.OpOverload)
        setattr(cuda, f"_{name}", operator if wrapped else operator._op)
    _put(cuda, why_not=_why_not)


def stub_triton() -> None:
    """Kernels compiled for a GPU that is not there; a launch ends at the driver."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from salkernels.triton_kernels import launch, offline

    from .driver import triton_utilities

    device = offline.AbsentDevice(CAPABILITY)
    _put(device, utils=triton_utilities(), allocate_default_profile_scratch=None)
    driver.set_active(device)
    _put(launch, capability=lambda x: CAPABILITY)
    _put(triton, why_not=_why_not)
    plain = JITFunction.run

    def run(self: Any, *words: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = plain(self, *words, grid=grid, warmup=True, **options)
        compiled.module, compiled.function = 0, 1
        compiled._run = CudaLauncher(compiled.src, compiled.metadata)
        return compiled

    _put(JITFunction, run=run)
