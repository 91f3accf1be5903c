"""λ and τ as tensors: the same loss as numbers, with the derivative of the formula."""

from __future__ import annotations

import pytest
import torch
from cases import EPS, F64
from test_contrast import NEGATIVES, POSITIVES, formula, mean
from torch import nn
from torch.autograd import forward_ad, gradcheck

import salkernels

EMBEDDINGS = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 5], [9, 9, 8, 8]]).unbind()


def learnt(value, dtype=F64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_gp():
    positives = ~torch.eye(4, dtype=torch.bool)
    embeddings, tau = EMBEDDINGS.clone().requires_grad_(), learnt(0.3)
    loss = salkernels.gp_loss(embeddings, positives, tau)
    assert torch.equal(loss, salkernels.gp_loss(embeddings, positives, 0.3))
    assert gradcheck(lambda e, t: salkernels.gp_loss(e, positives, t), (embeddings, tau))


def test_the_whole_loss():
    x = torch.randn(4, 6, 4, 5, dtype=F64)
    lambda_, tau = learnt(0.5), learnt(0.2)
    terms = salkernels.sal_loss(x, EMBEDDINGS, *IDS, 2, lambda_=lambda_, temperature=tau)
    numbers = salkernels.sal_loss(x, EMBEDDINGS, *IDS, 2, lambda_=0.5, temperature=0.2)
    assert terms == numbers
    terms.loss.backward()
    assert lambda_.grad == terms.la
    assert tau.grad != 0


def test_a_tensor_of_zero_is_no_reason_to_leave_the_term_out():
    lambda_ = learnt(0.0)
    salkernels.sal_loss(torch.randn(4, 6, 4, 5), EMBEDDINGS, *IDS, 2, lambda_=lambda_)[0].backward()
    assert lambda_.grad > 0


@pytest.mark.parametrize("eps", [EPS, 1.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["set", "keys"])
def test_contrast_against_the_formula(form, masked, eps, backend, device):
    dtype = torch.float32 if backend == "triton" else F64
    x, y = (torch.randn(4, 5, 5, 6, dtype=dtype).requires_grad_() for _ in range(2))
    tau = learnt(0.2)
    valid = [torch.rand(4, 5, 6) < 0.8 for _ in range(2)] if masked else None
    if form == "set":
        y, valid = x, None if valid is None else [valid[0]] * 2
    leaves = (x,) if form == "set" else (x, y)

    def by_formula(tau):
        wide = x.double(), y.double()
        return mean(*formula(*wide, POSITIVES, NEGATIVES, (2, 4), tau, valid, eps)[:2])

    expected = by_formula(0.2)
    how = {"eps": eps, "backend": backend}
    if form == "keys":
        how["keys"] = y.to(device)
    if masked:
        masks = tuple(v.to(device) for v in valid)
        how["valid"] = masks if form == "keys" else masks[0]
    tables = POSITIVES.to(device), NEGATIVES.to(device)
    loss = salkernels.wla_contrast(x.to(device), *tables, (2, 4), tau.to(device), **how)
    tight = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-9, "rtol": 1e-8}
    torch.testing.assert_close(loss.cpu().double(), expected, **tight)
    *grads, along = torch.autograd.grad(loss, (*leaves, tau))
    for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, **tight)
    # The formula has no derivative in τ that torch would know: its absent terms are −∞ / τ.
    slope = (by_formula(0.2 + 1e-5) - by_formula(0.2 - 1e-5)) / 2e-5
    torch.testing.assert_close(along, slope, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrast_is_that_of_the_number(dtype):
    x = torch.randn(4, 16, 6, 6).to(dtype).requires_grad_()
    for tau in (0.02, 0.1, 5.0):
        given = learnt(tau, torch.float32)
        losses = [salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, t) for t in (tau, given)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)
        grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
        assert grads[1].dtype == dtype
        torch.testing.assert_close(*grads, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_contrast_gradcheck_and_compile():
    x = torch.randn(4, 3, 4, 5, dtype=F64).requires_grad_()
    tau = learnt(0.3)

    def loss(x, tau):
        return salkernels.wla_contrast(x, POSITIVES, NEGATIVES, (2, 3), tau)

    assert gradcheck(loss, (x, tau))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, tau), loss(x, tau))


def test_nan_is_not_lost_beside_a_learnt_temperature():
    x = torch.randn(4, 3, 4, 5)
    x[2, 1, 0, 0] = torch.nan
    found = [
        salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, tau, reduction="none").isnan()
        for tau in (0.1, learnt(0.1))
    ]
    assert torch.equal(*found)
    assert found[0].any()


def test_a_parameter_of_a_module_is_learnt():
    module = salkernels.SALLoss(
        2, lambda_=nn.Parameter(torch.tensor([0.5])), temperature=nn.Parameter(torch.tensor(0.1))
    )
    assert {name for name, _ in module.named_parameters()} == {"lambda_", "temperature"}
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    module(torch.randn(4, 6, 4, 5), EMBEDDINGS.float(), *IDS).loss.backward()
    optimiser.step()
    assert module.temperature.item() != pytest.approx(0.1, abs=1e-7)
    assert "temperature=0." in repr(module)
    gp = salkernels.GPLoss(nn.Parameter(torch.tensor(0.2)))
    gp(EMBEDDINGS, POSITIVES | POSITIVES.T).backward()
    assert gp.temperature.grad != 0


def test_forward_mode_over_a_learnt_temperature_is_refused():
    features = torch.randn(3, 4, 4, 4, dtype=torch.double)
    positives = torch.eye(3, dtype=torch.bool).roll(1, 0)
    negatives = ~(positives | torch.eye(3, dtype=torch.bool))

    def loss(temperature):
        return salkernels.wla_contrast(features, positives, negatives, 2, temperature)

    tau = torch.tensor(0.3, dtype=torch.double)
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(loss, (tau,), (torch.ones_like(tau),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        loss(forward_ad.make_dual(tau, torch.ones_like(tau)))
