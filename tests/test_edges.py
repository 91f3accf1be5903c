"""Where implementations go wrong: nothing at all, dead vectors, and numbers that are not numbers.

Windows, masks, layouts and sizes are rows of the table in cases.py.
"""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64, MASKS, lay_out
from compare import assert_gradient, tolerance_for
from targets import of_dtype

import salkernels

NAN, INF = float("nan"), float("inf")


def maps(*shape, device="cpu", dtype=F32):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_empty_batch(dtype, backend, device):
    x, y = (maps(0, 3, 4, 5, dtype=dtype, device=device) for _ in range(2))
    wide = F64 if dtype == F64 else F32
    assert salkernels.wla_loss(x, y, 2, reduction="none", backend=backend).shape == (0,)
    loss = salkernels.wla_loss(x, y, 2, backend=backend)
    assert loss.item() == 0
    assert loss.dtype == wide
    loss.backward()
    assert x.grad.shape == y.grad.shape == x.shape
    max_sim, argmax = salkernels.align(x, y, 2, backend=backend)
    assert max_sim.shape == argmax.shape == (0, 4, 5)


def test_empty_set(backend, device):
    features = maps(0, 3, 4, 5, device=device)
    for pairs in (torch.ones(0, 0, dtype=torch.bool), torch.ones(0, 0)):
        loss = salkernels.wla_set_loss(features, pairs.to(device), 2, backend=backend)
        assert loss.item() == 0
        loss.backward()
        assert features.grad.shape == features.shape
    by_pair = salkernels.wla_set_loss(
        features, pairs.to(device), 2, reduction="none", backend=backend
    )
    assert by_pair.shape == (0, 0)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_pair_gives_zero_with_zero_gradient(samples, weighted, backend, device):
    features = maps(samples, 3, 4, 5, device=device)
    pairs = MASKS["none"](samples).to(device)
    pairs = pairs.float() if weighted else pairs
    loss = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_tiny_weights_still_make_a_mean(backend, device):
    """Weights are relative; an fp64 weight below the smallest fp32 is still a weight."""
    features = maps(3, 3, 4, 5, device=device)
    pairs = MASKS["others"](3).to(device)
    expected = salkernels.wla_set_loss(features, pairs, 2, backend=backend)
    for size in (1e-30, 1e-60):
        loss = salkernels.wla_set_loss(features, pairs.double() * size, 2, backend=backend)
        torch.testing.assert_close(loss, expected)


def test_one_channel_has_no_gradient(backend, device):
    """A number has a sign and no direction: similarities are 1 or -1 whatever its size."""
    x, y = maps(2, 1, 5, 7, device=device), maps(2, 1, 5, 7, device=device)
    loss = salkernels.wla_loss(x, y, (2, 3), reduction="none", backend=backend)
    max_sim, _ = salkernels.align(x, y, (2, 3), backend=backend)
    torch.testing.assert_close(max_sim.abs(), torch.ones_like(max_sim))
    torch.testing.assert_close(loss, (1 - max_sim).mean(dim=(1, 2)))
    loss.sum().backward()
    for z in (x, y):  # rounding of x̂ at most, over |x|
        assert (z.grad * z).abs().max() < 1e-6


@of_dtype(F64)
def test_pair_of_a_sample_with_itself(backend, device):
    features = maps(3, 3, 4, 5, device=device, dtype=F64)
    loss = salkernels.wla_set_loss(features, MASKS["diagonal"](3).to(device), 2, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert features.grad.abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16, torch.float16])
def test_dead_vectors_get_no_gradient(dtype, backend, device):
    """F.normalize would send 1 / eps into them."""
    x, y = (maps(2, 3, 4, 6, dtype=dtype, device=device) for _ in range(2))
    dead = torch.rand(2, 1, 4, 6, device=device) < 0.4
    x, y = ((z * ~dead).detach().requires_grad_() for z in (x, y))
    loss = salkernels.wla_loss(x, y, (2, 3), backend=backend)
    loss.backward()
    assert 0 < loss.item() < 2
    for z in (x, y):
        assert (z.grad[dead.expand_as(z)] == 0).all()
        assert z.grad.isfinite().all()
        assert z.grad.abs().max() > 0


def test_all_dead(backend, device):
    x = torch.zeros(2, 3, 4, 6, device=device).requires_grad_()
    loss = salkernels.wla_loss(x, x, (2, 3), backend=backend)
    loss.backward()
    assert loss.item() == 1  # nothing is similar to nothing
    assert (x.grad == 0).all()


@pytest.mark.parametrize(
    ("size", "alive"), [(0.5, False), (0.25, False), (0.50001, True), (1.0, True)]
)
@pytest.mark.parametrize("form", ["query", "key", "set"])
def test_a_vector_at_eps_is_dead_and_one_above_is_alive(size, alive, form, backend, device):
    features = torch.ones(2, 2, 1, 2, device=device)
    features[0, :, 0, 0] = torch.tensor([size, 0.0])
    features[0, :, 0, 1] = torch.tensor([-1.0, -1.0])  # never the match
    features.requires_grad_()
    x, y = features[:1], features[1:]
    settings = {"eps": 0.5, "backend": backend}
    if form == "set":
        loss = salkernels.wla_set_loss(features, MASKS["others"](2).to(device), (1, 2), **settings)
    else:
        loss = salkernels.wla_loss(*((x, y) if form == "query" else (y, x)), (1, 2), **settings)
    loss.backward()
    assert bool(features.grad[0, :, 0, 0].any()) is alive
    assert features.grad[1].any()


def test_default_eps_lets_small_features_through(backend, device):
    x, y = maps(2, 3, 4, 6, device=device), maps(2, 3, 4, 6, device=device)
    small = (x * 1e-9).detach().requires_grad_()
    loss = salkernels.wla_loss(small, y, (2, 3), backend=backend)
    torch.testing.assert_close(loss, salkernels.wla_loss(x, y, (2, 3), backend=backend))
    loss.backward()
    salkernels.wla_loss(x, y, (2, 3), backend=backend).backward()
    assert_gradient(small.grad * 1e-9 * 48, x.grad * 48, tolerance_for(F32))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_reaches_its_pairs_and_no_other(bad, backend, device):
    """One bad number in sample 1: pairs 0-1 and 1-2 are lost, pair 2-3 and sample 4 are not."""
    clean = maps(5, 3, 4, 6, device=device)
    features = clean.detach().clone()
    features[1, 2, 3, 4] = bad  # in the window of rows 2-3 and columns 3-5
    features.requires_grad_()
    pairs = torch.zeros(5, 5, dtype=torch.bool, device=device)
    pairs[[0, 1, 2, 3], [1, 2, 3, 2]] = True

    settings = {"reduction": "none", "backend": backend}
    expected = salkernels.wla_set_loss(clean, pairs, (2, 3), **settings)
    loss = salkernels.wla_set_loss(features, pairs, (2, 3), **settings)
    touched = torch.zeros_like(pairs)
    touched[[0, 1], [1, 2]] = True
    assert torch.equal(loss.isnan(), touched)
    assert torch.equal(loss[~touched], expected[~touched])

    expected.sum().backward()
    loss.sum().backward()
    lost = features.grad.isnan()
    assert lost[1, :, 3, 4].all()
    assert lost[0, :, 2:, 3:].all(), "as queries, all pixels of the window see the NaN"
    lost[:3, :, 2:, 3:] = False  # inside the window of the pairs touched, NaN is right
    assert not lost.any(), "NaN has spread to another window or another pair"
    outside = torch.ones_like(lost)
    outside[:3, :, 2:, 3:] = False
    assert torch.equal(features.grad[outside], clean.grad[outside])


def test_nan_in_a_sample_without_a_pair_reaches_nothing(backend, device):
    features = maps(3, 3, 4, 6, device=device).detach()
    features[2] = NAN
    features.requires_grad_()
    pairs = MASKS["none"](3).to(device)
    pairs[0, 1] = True
    loss = salkernels.wla_set_loss(features, pairs, (2, 3), backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert features.grad[:2].isfinite().all()
    assert (features.grad[2] == 0).all(), "no pair: zero gradient"


@pytest.mark.parametrize("side", ["x", "y"])
def test_nan_in_one_pair_of_a_batch(side, backend, device):
    x, y = maps(3, 3, 4, 6, device=device), maps(3, 3, 4, 6, device=device)
    with torch.no_grad():
        (x if side == "x" else y)[1, 0, 1, 1] = NAN
    loss = salkernels.wla_loss(x, y, (4, 6), reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    for z in (x, y):
        assert z.grad[1].isnan().any()
        assert z.grad[[0, 2]].isfinite().all()
    assert salkernels.wla_loss(x, y, (4, 6), backend=backend).isnan()


def test_gradient_of_an_expanded_map_is_summed_over_its_copies(backend, device):
    base, y = maps(1, 3, 4, 6, device=device), maps(5, 3, 4, 6, device=device)
    salkernels.wla_loss(lay_out(base.expand(5, 3, 4, 6), "expanded"), y, 2).backward()
    copies = base.detach().repeat(5, 1, 1, 1).requires_grad_()
    salkernels.wla_loss(copies, y, 2, backend=backend).backward()
    torch.testing.assert_close(base.grad, copies.grad.sum(dim=0, keepdim=True))
