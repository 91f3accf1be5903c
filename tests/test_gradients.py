"""Gradients: finite differences in fp64, the upstream gradient, and how autograd may be used.

That gradients are right element by element and as vectors is tested in test_parity.
"""

from __future__ import annotations

import pytest
import torch
from cases import EPS, F64, MASKS
from compare import assert_gradient, tolerance_for
from targets import of_dtype
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import salkernels

pytestmark = of_dtype(F64)
# Full gradcheck moves one number at a time; fast mode a random mixture of all of them at once.
WINDOWS = [((2, 2), False), ((1, 1), True), ((3, 2), True), ((3, 3), True)]


def maps(*shape, device="cpu", dtype=F64):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


@pytest.mark.parametrize(("window", "fast"), WINDOWS)
def test_gradcheck_pairwise(window, fast, backend, device):
    x, y = maps(2, 2, 3, 3, device=device), maps(2, 2, 3, 3, device=device)

    def losses(x, y):
        settings = {"backend": backend}
        return (
            salkernels.wla_loss(x, y, window, **settings),
            salkernels.wla_loss(x, y, window, reduction="none", **settings),
        )

    gradcheck(losses, (x, y), fast_mode=fast)


def test_gradcheck_la(backend, device):
    x, y = maps(2, 2, 3, 3, device=device), maps(2, 2, 3, 3, device=device)
    gradcheck(lambda x, y: salkernels.la_loss(x, y, backend=backend), (x, y))


@pytest.mark.parametrize(("window", "fast"), WINDOWS)
@pytest.mark.parametrize("mask", ["others", "band", "holes", "one"])
def test_gradcheck_set(window, fast, mask, backend, device):
    # Not the diagonal: there the loss is at a kink, |1 - m| at m = 1, and rounding picks a side.
    pairs = (MASKS[mask](3) & MASKS["others"](3)).to(device)
    features = maps(3, 2, 3, 3, device=device)
    gradcheck(
        lambda f: salkernels.wla_set_loss(f, pairs, window, backend=backend),
        (features,),
        fast_mode=fast or mask != "holes",
    )


def test_gradcheck_set_of_features_and_weights(backend, device):
    features = maps(3, 2, 2, 3, device=device)
    weights = torch.rand(3, 3, dtype=F64, device=device) + 0.1
    weights = weights.fill_diagonal_(0.5).requires_grad_()
    off_diagonal = ~torch.eye(3, dtype=torch.bool, device=device)

    def loss(features, weights):
        return salkernels.wla_set_loss(features, weights * off_diagonal, 2, backend=backend)

    gradcheck(loss, (features, weights))


PENALTIES = {
    "squared hinge": lambda m: torch.relu(0.9 - m).square().mean(),
    "log": lambda m: -((1 + m) / 2).clamp_min(1e-6).log().mean(),
    "maxima": lambda m: m,
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize(("window", "fast"), WINDOWS)
def test_gradcheck_of_penalties_on_the_maxima(window, fast, penalty, backend, device):
    x, y = maps(3, 2, 3, 3, device=device), maps(3, 2, 3, 3, device=device)
    pairs = MASKS["holes"](3).to(device)
    valid = torch.rand(3, 3, 3, device=device) < 0.8

    def penalties(x, y):
        pairwise = salkernels.align(x, y, window, valid=(valid, None), backend=backend)
        of_set = salkernels.align_set(x, pairs, window, valid=valid, backend=backend)
        return penalty(pairwise.max_sim), penalty(of_set.max_sim)

    gradcheck(penalties, (x, y), fast_mode=fast)


def test_gradcheck_gp():
    positives = torch.rand(5, 5) > 0.5
    positives[3] = False
    gradcheck(lambda e: salkernels.gp_loss(e, positives, 0.3), (maps(5, 4),))


def test_gradcheck_sal():
    features, embeddings = maps(4, 2, 2, 3), maps(4, 2)
    volume = torch.tensor([0, 0, 1, 1])
    index = torch.tensor([2, 3, 1, 1])
    slices = torch.tensor([9, 9, 7, 7])

    def losses(features, embeddings):
        return tuple(
            salkernels.sal_loss(features, embeddings, volume, index, slices, 2, lambda_=0.7)
        )

    gradcheck(losses, (features, embeddings))


def test_upstream_gradient_scales_each_pair(backend, device):
    x, y = maps(4, 3, 4, 5, device=device), maps(4, 3, 4, 5, device=device)
    loss = salkernels.wla_loss(x, y, 2, reduction="none", backend=backend)
    ones = torch.autograd.grad(loss, (x, y), torch.ones_like(loss), retain_graph=True)
    weights = torch.tensor([3.0, 0.0, -2.0, 1e-3], device=device, dtype=F64)
    scaled = torch.autograd.grad(loss, (x, y), weights)
    for one, actual in zip(ones, scaled, strict=True):
        assert_gradient(actual, one * weights.view(-1, 1, 1, 1), tolerance_for(F64))


@of_dtype(torch.float32)
def test_backward_twice_gives_the_same_and_accumulates(backend, device):
    features = maps(4, 3, 4, 5, device=device, dtype=torch.float32)
    pairs = MASKS["others"](4).to(device)
    loss = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
    loss.backward(retain_graph=True)
    first = features.grad.clone()
    loss.backward()
    assert torch.equal(features.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_one_side_needs_a_gradient(backend, device):
    x, y = maps(2, 3, 4, 5, device=device), maps(2, 3, 4, 5, device=device)
    both = torch.autograd.grad(salkernels.wla_loss(x, y, 2, backend=backend), (x, y))
    only_x = torch.autograd.grad(salkernels.wla_loss(x, y.detach(), 2, backend=backend), x)
    only_y = torch.autograd.grad(salkernels.wla_loss(x.detach(), y, 2, backend=backend), y)
    assert torch.equal(only_x[0], both[0])
    assert torch.equal(only_y[0], both[1])
    assert not salkernels.wla_loss(x.detach(), y.detach(), 2, backend=backend).requires_grad


def test_one_tensor_on_both_sides_gets_the_sum(backend, device):
    x = maps(3, 3, 4, 5, device=device)
    (grad,) = torch.autograd.grad(salkernels.wla_loss(x, x.roll(1, 0), 2, backend=backend), x)
    ring = torch.eye(3, dtype=torch.bool, device=device).roll(-1, 1)  # i queries i - 1
    (expected,) = torch.autograd.grad(salkernels.wla_set_loss(x, ring, 2, backend=backend), x)
    assert_gradient(60 * grad, 60 * expected, tolerance_for(F64))


def test_without_grad_mode_no_graph_is_kept(backend, device):
    x = maps(2, 3, 4, 5, device=device)
    expected = salkernels.wla_loss(x, x.flip(0), 2, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = salkernels.wla_loss(x, x.flip(0), 2, backend=backend)
        assert not loss.requires_grad
        assert torch.equal(loss, expected)


def test_inputs_are_not_changed(backend, device):
    x, y = maps(2, 3, 4, 5, device=device), maps(2, 3, 4, 5, device=device)
    before = x.detach().clone(), y.detach().clone()
    salkernels.wla_loss(x, y, 2, backend=backend).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("changed", ["features", "valid"])
def test_an_input_edited_before_backward_is_an_error(changed, backend, device):
    features, pairs = maps(3, 3, 4, 5, device=device), MASKS["others"](3).to(device)
    hidden, valid = features * 1, torch.ones(3, 4, 5, dtype=torch.bool, device=device)
    loss = salkernels.wla_set_loss(hidden, pairs, 2, valid=valid, backend=backend)
    with torch.no_grad():
        (hidden if changed == "features" else valid).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pairs_edited_after_the_call_change_nothing(backend, device):
    features, pairs = maps(3, 3, 4, 5, device=device), MASKS["others"](3).to(device)
    expected = torch.autograd.grad(
        salkernels.wla_set_loss(features, pairs, 2, backend=backend), features
    )
    loss = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
    pairs.zero_()
    assert torch.equal(torch.autograd.grad(loss, features)[0], expected[0])


def test_saved_tensors_that_come_back_in_other_strides(backend, device):
    x, y = maps(2, 3, 4, 5, device=device), maps(2, 3, 4, 5, device=device)
    valid = torch.rand(2, 4, 5, device=device) < 0.8

    def gradients():
        max_sim, _ = salkernels.align(x, y, 2, valid=valid, backend=backend)
        return torch.autograd.grad(max_sim.square().sum(), (x, y))

    expected = gradients()
    turn = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.mT.contiguous() if t.dim() > 1 else t, lambda t: t.mT if t.dim() > 1 else t
    )
    with turn:
        actual = gradients()
    for ours, theirs in zip(actual, expected, strict=True):
        assert_gradient(ours, theirs, tolerance_for(F64))


def test_activation_checkpointing(backend, device):
    x, y = maps(2, 3, 4, 5, device=device), maps(2, 3, 4, 5, device=device)

    def loss(x, y):
        return salkernels.wla_loss(x, y, 2, backend=backend)

    expected = torch.autograd.grad(loss(x, y), (x, y))
    actual = torch.autograd.grad(checkpoint(loss, x, y, use_reentrant=False), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_second_derivative_is_an_error(backend, device):
    x, y = maps(2, 3, 4, 5, device=device), maps(2, 3, 4, 5, device=device)
    loss = salkernels.wla_loss(x, y, 2, eps=EPS, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (plain,) = torch.autograd.grad(salkernels.wla_loss(x, y, 2, backend=backend), x)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        grad.square().sum().backward()
