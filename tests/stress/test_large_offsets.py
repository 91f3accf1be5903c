"""Elements that lie more than 2^31 elements from the first: a 32-bit offset would wrap around.

Only the stride has to be large, not what is stored: memory that is never touched costs no memory.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compare import is_interpreted

import salkernels
from salkernels.backends import triton

FAR = 2**30 + 1  # times three is past 2^31, times two is past it in bytes of any dtype
AXES = ("samples", "channels", "rows", "columns")


@pytest.fixture
def poison():
    """Not here: filling fresh memory would touch all of it."""


def available_memory() -> float:
    """Bytes that can be had without swapping, the page cache included; 0 where nobody says."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0
    return 1024.0 * int(re.search(r"MemAvailable: +(\d+)", text)[1])


def device_of(backend: str) -> str:
    on_gpu = backend == "cuda" or (backend == "triton" and not triton.INTERPRETED)
    return "cuda" if on_gpu else "cpu"


def empty(elements: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError as error:
        pytest.skip(f"no address space for {elements} elements: {error}")


def assert_same(far: torch.Tensor, near: torch.Tensor, backend: str) -> None:
    """Losses and gradients of far, which has the values of near, by the definition."""
    pairs = ~torch.eye(len(near), dtype=torch.bool, device=near.device)

    def run(features: torch.Tensor, backend: str) -> list[torch.Tensor]:
        features = features.detach().requires_grad_()
        loss = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
        results = [loss, *torch.autograd.grad(loss, features)]
        if not is_interpreted(backend, features.device):  # seconds a call
            x, y = features[:2], features[2:]
            loss = salkernels.wla_loss(x, y, (2, 1), reduction="none", backend=backend)
            results += [loss, *torch.autograd.grad(loss.sum(), features)]
        return results

    for ours, theirs in zip(run(far, backend), run(near, "reference"), strict=False):
        torch.testing.assert_close(ours.contiguous(), theirs, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("axis", range(4), ids=AXES)
def test_far_apart_along_one_axis(axis, backend):
    device, dtype = device_of(backend), torch.bfloat16
    near = torch.randn(4, 4, 4, 4).to(device, dtype)
    memory = empty(3 * FAR + 256, dtype, device)
    strides = [64, 16, 4, 1]
    strides[axis] = FAR
    far = memory.as_strided(near.shape, strides).copy_(near)
    assert_same(far, near, backend)


def test_far_from_the_start_of_the_storage(backend):
    device = device_of(backend)
    near = torch.randn(4, 5, 4, 6, device=device)
    memory = empty(2**31 + 5 + near.numel(), near.dtype, device)
    far = memory[2**31 + 5 :].view(near.shape).copy_(near)
    assert_same(far, near, backend)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_more_than_2_to_the_31_elements(layout):
    """2.15e9 bf16 features, nearly all zero: those pixels have loss 1 and no gradient."""
    shape, window, edge = (2, 32, 5800, 5800), 4, 8
    free = available_memory()
    if free < 12e9:
        pytest.skip(f"needs 12 GB of free memory, {free / 1e9:.1f} GB are free")
    samples, channels, height, width = shape
    if layout == "channels_last":
        features = torch.zeros(samples, height, width, channels, dtype=torch.bfloat16)
        features = features.movedim(-1, 1)
    else:
        features = torch.zeros(shape, dtype=torch.bfloat16)
    corner = torch.randn(samples, channels, edge, edge).bfloat16()
    features[..., -edge:, -edge:] = corner
    features.requires_grad_()
    pairs = torch.tensor([[False, False], [True, False]])
    loss = salkernels.wla_set_loss(features, pairs, window, backend="cpu")
    share = edge * edge / (height * width)
    corner.requires_grad_()
    of_corner = salkernels.wla_set_loss(corner, pairs, window, backend="cpu")
    assert loss.item() == pytest.approx(1 - share + share * of_corner.item(), abs=1e-6)
    (grad,) = torch.autograd.grad(loss / share, features)
    (expected,) = torch.autograd.grad(of_corner, corner)
    torch.testing.assert_close(grad[..., -edge:, -edge:], expected, rtol=2**-7, atol=1e-6)
    assert grad[..., :edge, :edge].count_nonzero() == 0
