"""The mean of the losses and its gradient, which CUDA computes along with the matches."""

from __future__ import annotations

import pytest
import torch
from against_reference import (
    EPS,
    SHAPE_NAMES,
    SHAPES,
    compare_mean,
    features,
    flat,
    some_pairs,
)

import salkernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def call_of(shape, dtype=torch.float32, left_over=1):
    query, key, window = features(shape, dtype=dtype)
    return query, key, some_pairs(query, key, 0.6, left_over), window


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_all_ways_through_the_kernels(shape, host_kernels):
    compare_mean(host_kernels, *call_of(shape))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 2, 4, 8)], ids=str)
def test_all_dtypes(shape, dtype, host_kernels):
    compare_mean(host_kernels, *call_of(shape, dtype))


def late(x):
    """The same maps, which do not begin where their storage does."""
    return None if x is None else torch.cat((torch.full_like(x, torch.nan), x))[len(x) :]


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_maps_that_begin_in_the_middle_of_their_storage(shape, host_kernels):
    query, key, pairs, window = call_of(shape)
    compare_mean(host_kernels, late(query), late(key), pairs, window)


def test_more_pairs_than_threads(host_kernels):
    query = torch.randn(1, 24, 4, 2, 2)
    compare_mean(host_kernels, query, None, None, (2, 2))


def test_equal_maps_have_no_gradient_and_nan_spreads(host_kernels):
    x = torch.ones(1, 2, 4, 2, 2)
    compare_mean(host_kernels, x, None, None, (2, 2))
    x[0, 1, 2, 1, 1] = torch.nan
    mean, *kept = host_kernels.mean_match(flat(x), None, None, 1, (2, 2), EPS)
    assert mean.isnan()
    grad, _ = host_kernels.mean_match_backward(
        torch.tensor(1.0), flat(x), None, None, 1, *kept, (2, 2), EPS
    )
    assert grad[1, :, 1, 1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 2}, "groups must divide"),
        ({"grad": torch.ones(2)}, "one number"),
        ({"grad": torch.ones((), dtype=torch.float64)}, "dtype of the loss"),
        ({"max_sim": torch.ones(3, 2, 2)}, "must be \\(pairs, H, W\\)"),
        ({"x": torch.ones(1, 3, 4, 2, 2)}, "must be \\(S, C, H, W\\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, host_kernels):
    x = torch.randn(3, 4, 2, 2)
    _, max_sim, argmax, norm = host_kernels.mean_match(x, None, None, 1, (2, 2), EPS)
    given = {"grad": torch.ones(()), "x": x, "y": None, "pairs": None, "groups": 1}
    given |= {"max_sim": max_sim, "argmax": argmax, "norm": norm, "window": (2, 2), "eps": EPS}
    with pytest.raises(RuntimeError, match=message):
        host_kernels.mean_match_backward(**given | change)


def test_without_a_pair_there_is_no_mean(host_kernels):
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no mean"):
        host_kernels.mean_match(torch.randn(2, 4, 2, 2), None, none, 1, (2, 2), EPS)


@pytest.mark.parametrize("form", ["set", "pairs"])
def test_the_public_losses_use_it(form, backend, host_kernels, monkeypatch):
    calls = []
    for name in ("mean_match", "mean_match_backward"):
        plain = getattr(host_kernels, name)
        monkeypatch.setattr(
            host_kernels,
            name,
            lambda *a, name=name, plain=plain: calls.append(name) or plain(*a),
            raising=False,
        )
    x, y = (torch.randn(4, 3, 4, 5, requires_grad=True) for _ in range(2))
    mask = ~torch.eye(4, dtype=torch.bool)

    def loss(backend):
        if form == "set":
            return salkernels.wla_set_loss(x, mask, 2, backend=backend)
        return salkernels.wla_loss(x, y, 2, backend=backend)

    wanted = loss("reference")
    for _ in range(2):
        found = loss(backend)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found, x), torch.autograd.grad(wanted, x, retain_graph=True)
        )
    assert calls == ["mean_match", "mean_match_backward"] * 2
