"""The Triton kernels in the traffic table: the PTX that Triton gives for sm_80."""

from __future__ import annotations

from functools import cache

from . import triton_emulation
from .cases import Case
from .traffic import Row, measure

PROVIDER = "triton"
obstacle = triton_emulation.obstacle


@cache
def emulator() -> triton_emulation.Emulator:
    return triton_emulation.Emulator()


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
