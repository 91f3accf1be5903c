"""The Triton kernels in the traffic table: the PTX that Triton gives for sm_80."""

from __future__ import annotations

from functools import cache

import torch

from salkernels import reference

from . import triton_emulation
from .cases import LAYOUTS, Case
from .traffic import Row, row_of

PROVIDER = "triton"
obstacle = triton_emulation.obstacle


@cache
def emulator() -> triton_emulation.Emulator:
    return triton_emulation.Emulator()


def run(case: Case) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.samples, case.channels, case.height, case.width)
    features = torch.randn(shape, generator=generator).to(case.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[case.layout])[None]
    mask, window = case.pairs[None], (case.window, case.window)
    arguments = (features, None, mask, window, triton_emulation.EPS, case.num_pairs)
    size = features.numel() * features.element_size()

    emulator().stats.clear()
    outputs = emulator().forward(features, None, mask, window)
    expected = reference.pair_losses_forward(*arguments)
    error = max(float((outputs[i] - expected[i]).abs().max()) for i in (0, 2))
    written = sum(t.numel() * t.element_size() for t in outputs)
    rows = [row_of(PROVIDER, case, "forward", emulator().stats, size, written, error)]

    emulator().stats.clear()
    grad = torch.randn(outputs[0].shape, generator=generator)
    actual = emulator().backward(grad, features, None, mask, window, outputs)[0].double()
    saved = (expected[1], expected[2], window, triton_emulation.EPS)
    wanted = reference.pair_losses_backward(grad, features, None, mask, *saved)[0].double()
    error = float((actual - wanted).norm() / wanted.norm())
    rows.append(row_of(PROVIDER, case, "backward", emulator().stats, size, size, error))
    return rows
