"""The Triton kernels in the traffic table: the PTX that Triton gives for sm_80."""

from __future__ import annotations

from functools import cache

from benchmarks.cases import Case
from tools.ptx import triton_kernels

from .table import Row, measure

PROVIDER = "triton"
obstacle = triton_kernels.obstacle


@cache
def emulator() -> triton_kernels.Emulator:
    return triton_kernels.Emulator()


def run(case: Case) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    kernels = emulator()
    return measure(
        PROVIDER,
        case,
        kernels.stats,
        lambda features, pairs, window: kernels.forward(features, None, pairs, None, window),
        lambda grad_sim, features, pairs, window, outputs: kernels.backward(
            grad_sim, features, None, pairs, None, window, outputs
        )[0],
    )
