"""The Triton kernels in the traffic table: the PTX that Triton gives for sm_80."""

from __future__ import annotations

from functools import cache

from benchmarks.cases import Case
from tools.ptx import triton_kernels

from .passes import Passes
from .table import Row, measure

PROVIDER = "triton"
obstacle = triton_kernels.obstacle


@cache
def emulator() -> triton_kernels.Emulator:
    return triton_kernels.Emulator()


def passes() -> Passes:
    """Both passes of the operator, on its PTX."""
    kernels = emulator()
    return Passes(
        kernels.stats,
        lambda features, pairs, window: kernels.forward(features, None, pairs, None, window),
        lambda grad_sim, features, pairs, window, outputs: kernels.backward(
            grad_sim, features, None, pairs, None, window, outputs
        )[0],
    )


def run(case: Case) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    return measure(PROVIDER, case, passes())
