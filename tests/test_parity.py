"""Every backend that can run, on one table of cases, against the slow float64 oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import CASES, F64, Case, oracle
from compare import (
    assert_gradient,
    assert_values,
    clear_pixels,
    tolerance_for,
    upstream,
)
from targets import slow_in_the_interpreter

import salkernels


@cache
def pairwise_oracle(case: Case):
    """(B,) losses, both gradients for `upstream`, and (B, H, W) max_sim, argmax and margin."""
    x, y = case.features().double().detach(), case.features(stream=1).double().detach()
    x.requires_grad_()
    y.requires_grad_()
    rows = [oracle(x[b], y[b], case.window, case.eps) for b in range(case.samples)]
    loss = torch.stack([row.loss for row in rows])
    grads = torch.autograd.grad(loss, (x, y), upstream(loss.shape, case.height, case.width))
    stacks = [torch.stack([row[i] for row in rows]) for i in (1, 2, 3)]
    return loss.detach(), grads, *stacks


@cache
def set_oracle(case: Case):
    """(S, S) losses, the gradient for `upstream`, and (P, H, W) margin of the pairs."""
    features = case.features().double().detach().requires_grad_()
    pairs = case.pairs()
    loss = torch.zeros(pairs.shape, dtype=F64)
    margins = [torch.full((1, case.height, case.width), torch.inf, dtype=F64)]
    for i, j in pairs.nonzero().tolist():
        row = oracle(features[i], features[j], case.window, case.eps)
        loss = torch.index_put(loss, (torch.tensor(i), torch.tensor(j)), row.loss)
        margins.append(row.margin[None])
    weights = upstream(loss.shape, case.height, case.width)
    total = (loss * weights).sum() + 0 * features.sum()  # without a pair: a gradient of zeros
    return loss.detach(), torch.autograd.grad(total, features)[0], torch.cat(margins)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairwise(case, backend, device):
    x, y = case.features(device), case.features(device, stream=1)
    tolerance = tolerance_for(case.dtype)
    settings = {"eps": case.eps, "backend": backend}
    loss = salkernels.wla_loss(x, y, case.window, reduction="none", **settings)
    expected, expected_grads, expected_sim, expected_argmax, margin = pairwise_oracle(case)
    assert loss.dtype == (F64 if case.dtype == F64 else torch.float32)
    assert_values(loss, expected, tolerance.value, "loss")

    weights = upstream(loss.shape, case.height, case.width).to(loss)
    grads = torch.autograd.grad(loss, (x, y), weights)
    clear = clear_pixels(margin, case.window, tolerance.margin)
    for name, actual, wanted in zip("xy", grads, expected_grads, strict=True):
        assert actual.dtype == case.dtype
        assert_gradient(actual.cpu()[..., clear], wanted[..., clear], tolerance, f"grad of {name}")

    max_sim, argmax = salkernels.align(x, y, case.window, **settings)
    assert_values(max_sim, expected_sim, tolerance.similarity, "max_sim")
    assert_values(argmax.cpu()[:, clear], expected_argmax[:, clear], 0, "argmax")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_set(case, backend, device):
    features, pairs = case.features(device), case.pairs(device)
    tolerance = tolerance_for(case.dtype)
    loss = salkernels.wla_set_loss(
        features, pairs, case.window, reduction="none", eps=case.eps, backend=backend
    )
    expected, expected_grad, margin = set_oracle(case)
    assert loss.dtype == (F64 if case.dtype == F64 else torch.float32)
    assert_values(loss, expected, tolerance.value, "loss")
    assert (loss[~pairs] == 0).all()

    weights = upstream(loss.shape, case.height, case.width).to(loss)
    (grad,) = torch.autograd.grad(loss, features, weights)
    assert grad.dtype == case.dtype
    clear = clear_pixels(margin, case.window, tolerance.margin)
    assert_gradient(grad.cpu()[..., clear], expected_grad[..., clear], tolerance, "grad")


def valid_pixels(case: Case) -> torch.Tensor:
    """(S, H, W) bool: holes everywhere, one window without a pixel, one sample without any."""
    generator = torch.Generator().manual_seed(len(case.name) + 1)
    valid = torch.rand(case.samples, case.height, case.width, generator=generator) < 0.7
    valid[0, : case.window[0], : case.window[1]] = False
    if case.samples > 3:
        valid[3] = False
    return valid


@cache
def valid_oracle(case: Case):
    """For the pairs of a set, in order: losses, max_sim, argmax, margin, and the gradient of
    Σ `upstream` · max_sim."""
    features, valid = case.features().double().detach().requires_grad_(), valid_pixels(case)
    rows = [
        oracle(features[i], features[j], case.window, case.eps, (valid[i], valid[j]))
        for i, j in case.pairs().nonzero().tolist()
    ]
    stacks = [torch.stack([row[i] for row in rows]) for i in range(4)]
    total = (stacks[1] * upstream(stacks[1].shape, 1, 1)).sum() + 0 * features.sum()
    return *(x.detach() for x in stacks), torch.autograd.grad(total, features)[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.mask != "none"], ids=str)
def test_set_of_valid_pixels_with_any_penalty(case, backend, device):
    """`align_set` and its gradient, where pixels that are not valid hold NaN."""
    valid, pairs = valid_pixels(case).to(device), case.pairs(device)
    features = case.features(device)
    if case.layout != "expanded":  # there all samples are one
        with torch.no_grad():
            features.masked_fill_(~valid[:, None], torch.nan)
    tolerance = tolerance_for(case.dtype)
    settings = {"valid": valid, "eps": case.eps, "backend": backend}
    max_sim, argmax = salkernels.align_set(features, pairs, case.window, **settings)
    losses, expected_sim, expected_argmax, margin, expected_grad = valid_oracle(case)
    assert_values(max_sim, expected_sim, tolerance.similarity, "max_sim")
    clear = clear_pixels(margin, case.window, tolerance.margin)
    assert_values(argmax.cpu()[:, clear], expected_argmax[:, clear], 0, "argmax")
    assert torch.equal(argmax.cpu() < 0, expected_argmax < 0)

    weights = upstream(max_sim.shape, 1, 1).to(max_sim)
    (grad,) = torch.autograd.grad(max_sim, features, weights)
    assert_gradient(grad.cpu()[..., clear], expected_grad[..., clear], tolerance, "grad")
    if case.layout != "expanded":
        assert (grad[(~valid)[:, None].expand_as(grad)] == 0).all()

    loss = salkernels.wla_set_loss(features, pairs, case.window, **settings)
    counts = (expected_argmax >= 0).flatten(1).any(dim=1)
    assert_values(loss, losses[counts].sum() / max(1, int(counts.sum())), tolerance.value, "loss")


# The reductions are torch's for every backend: two cases are enough for the interpreter.
MEANS = [
    case
    if case.name in ("work shape, small", "a band")
    else pytest.param(case, marks=slow_in_the_interpreter)
    for case in CASES
    if case.mask != "none"
]


@pytest.mark.parametrize("case", MEANS, ids=str)
def test_means(case, backend, device):
    """The two reductions over pairs, bool and weighted, against the oracle's losses."""
    x, y = case.features(device), case.features(device, stream=1)
    atol = tolerance_for(case.dtype).value
    settings = {"eps": case.eps, "backend": backend}
    mean = salkernels.wla_loss(x, y, case.window, **settings)
    assert_values(mean, pairwise_oracle(case)[0].mean(), atol, "pairwise mean")

    losses, pairs = set_oracle(case)[0], case.pairs()
    mean = salkernels.wla_set_loss(x, pairs.to(device), case.window, **settings)
    assert_values(mean, losses[pairs].mean(), atol, "set mean")
    weights = torch.rand(pairs.shape, dtype=F64) * pairs
    mean = salkernels.wla_set_loss(x, weights.to(device), case.window, **settings)
    assert_values(mean, (weights * losses).sum() / weights.sum(), atol, "weighted mean")
