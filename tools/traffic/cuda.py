"""The CUDA kernels in the traffic table: the PTX that nvcc gives for sm_80."""

from __future__ import annotations

from functools import cache

from benchmarks.cases import Case
from tools.ptx import cuda_kernels

from .passes import EPS, Passes
from .table import Row, measure

PROVIDER = "cuda"


def obstacle() -> str | None:
    return cuda_kernels.obstacle()


@cache
def kernels() -> cuda_kernels.CompiledKernels:
    return cuda_kernels.CompiledKernels()


def passes() -> Passes:
    """Both passes of the operator, on its PTX."""
    compiled = kernels()
    return Passes(
        compiled.stats,
        lambda features, pairs, window: compiled.match(features, None, pairs, None, window, EPS),
        lambda grad_sim, features, pairs, window, outputs: compiled.match_backward(
            grad_sim, features, None, pairs, None, *outputs[1:], window, EPS
        )[0],
    )


def run(case: Case) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    return measure(PROVIDER, case, passes())
