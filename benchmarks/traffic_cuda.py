"""The CUDA kernels in the traffic table: the PTX that nvcc gives for sm_80."""

from __future__ import annotations

from functools import cache

import torch

from salkernels import reference

from . import cuda_emulation
from .cases import LAYOUTS, Case
from .traffic import Row, row_of

EPS = 1e-12
PROVIDER = "cuda"


def obstacle() -> str | None:
    return cuda_emulation.ptx_obstacle()


@cache
def kernels() -> cuda_emulation.CompiledKernels:
    return cuda_emulation.CompiledKernels()


def run(case: Case) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.samples, case.channels, case.height, case.width)
    features = torch.randn(shape, generator=generator).to(case.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[case.layout])[None]
    mask, window = case.pairs[None], (case.window, case.window)
    arguments = (features, None, mask, window, EPS, case.num_pairs)
    size = features.numel() * features.element_size()

    compiled = kernels()
    compiled.stats.clear()
    loss, argmax, max_sim = compiled.pair_losses_forward(*arguments)
    expected = reference.pair_losses_forward(*arguments)
    error = max(float((loss - expected[0]).abs().max()), float((max_sim - expected[2]).abs().max()))
    output = sum(t.numel() * t.element_size() for t in (loss, argmax, max_sim))
    rows = [row_of(PROVIDER, case, "forward", compiled.stats, size, output, error)]

    compiled.stats.clear()
    grad = torch.randn(loss.shape, generator=generator)
    saved = (grad, *arguments[:3], argmax, max_sim, window, EPS)
    actual = compiled.pair_losses_backward(*saved)[0].double()
    wanted = reference.pair_losses_backward(*saved)[0].double()
    error = float((actual - wanted).norm() / wanted.norm())
    rows.append(row_of(PROVIDER, case, "backward", compiled.stats, size, size, error))
    return rows
