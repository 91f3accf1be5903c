"""Dtypes: fp32 inside whatever comes in, fp64 stays fp64, the gradient comes in the input's."""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64, MASKS
from compare import assert_gradient, assert_values, tolerance_for

import salkernels

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, F32, F64]


def maps(dtype, device, *shape):
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_what_comes_out(dtype, backend, device):
    x, y = maps(dtype, device, 3, 5, 4, 6), maps(dtype, device, 3, 5, 4, 6)
    wide = F64 if dtype == F64 else F32
    pairs = MASKS["others"](3).to(device)
    losses = [
        salkernels.wla_loss(x, y, 2, backend=backend),
        salkernels.wla_loss(x, y, 2, reduction="none", backend=backend),
        salkernels.la_loss(x, y, backend=backend),
        salkernels.wla_set_loss(x, pairs, 2, backend=backend),
        salkernels.wla_set_loss(x, pairs, 2, reduction="none", backend=backend),
        # weights of any width do not change the dtype
        *(salkernels.wla_set_loss(x, pairs.to(d), 2, backend=backend) for d in (*HALVES, F32, F64)),
    ]
    assert {loss.dtype for loss in losses} == {wide}
    sum(loss.sum() for loss in losses).backward()
    assert x.grad.dtype == y.grad.dtype == dtype
    max_sim, argmax = salkernels.align(x, y, 2, backend=backend)
    assert max_sim.dtype == wide
    assert argmax.dtype == torch.int64


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("window", [(2, 2), (4, 6), (3, 4)])
def test_half_precision_is_fp32_math_on_the_same_values(dtype, window, backend, device):
    narrow = maps(dtype, device, 4, 33, 4, 6)
    wide = narrow.detach().float().requires_grad_()
    pairs = MASKS["others"](4).to(device)
    settings = {"reduction": "none", "backend": backend}
    loss, expected = (salkernels.wla_set_loss(f, pairs, window, **settings) for f in (narrow, wide))
    assert_values(loss, expected, 2e-7, "loss")
    (grad,) = torch.autograd.grad(24 * loss.sum(), narrow)
    (expected_grad,) = torch.autograd.grad(24 * expected.sum(), wide)
    # One rounding at the very end. Not compared with the rounded gradient of fp32: where that lies
    # between two numbers, another order of sums may choose the other one.
    assert_gradient(grad, expected_grad, tolerance_for(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_large_half_precision_values_do_not_overflow(dtype, backend, device):
    """Squares of 3e4 are beyond fp16, and a sum of 4096 ones stalls in bf16."""
    x, y = (maps(dtype, device, 1, 4096, 2, 2).detach().sign() * 3e4 for _ in range(2))
    loss = salkernels.wla_loss(x, y, 2, backend=backend)
    assert_values(loss, salkernels.wla_loss(x.double(), y.double(), 2), 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_promotes_mixed_dtypes_and_keeps_the_loss_wide(dtype, backend, device):
    x, y = maps(dtype, device, 3, 5, 4, 6), maps(F32, device, 3, 5, 4, 6)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = salkernels.wla_loss(x, y, 2, backend=backend)
    assert loss.dtype == F32
    loss.backward()
    assert x.grad.dtype == dtype
    assert y.grad.dtype == F32
    wide, partner = x.detach().float().requires_grad_(), y.detach().requires_grad_()
    expected = salkernels.wla_loss(wide, partner, 2, backend=backend)
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, wide.grad.to(dtype))
    assert torch.equal(y.grad, partner.grad)


def test_autocast_changes_nothing_for_fp32(backend, device):
    """Not rounded to bf16 on the way, in forward or in a backward that runs under autocast."""
    x, y = maps(F32, device, 3, 33, 4, 6), maps(F32, device, 3, 33, 4, 6)
    expected = salkernels.wla_loss(x, y, 2, backend=backend)
    expected_grads = torch.autograd.grad(expected, (x, y))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = salkernels.wla_loss(x, y, 2, backend=backend)
        grads = torch.autograd.grad(loss, (x, y))
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_autocast_of_the_whole_objective(device):
    features, embeddings = torch.randn(4, 5, 4, 6), torch.randn(4, 8)
    ids = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 1, 2]), torch.tensor([9, 9, 9, 9])
    args = [z.to(device) for z in (features, embeddings, *ids)]
    expected = salkernels.sal_loss(*args, 2)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        terms = salkernels.sal_loss(*args, 2)
    for name, actual, wanted in zip(terms._fields, terms, expected, strict=True):
        assert actual.dtype == F32, name
        assert torch.equal(actual, wanted), name
