"""Pixels that take no part, in every function that takes `valid`. Parity: see test_parity."""

from __future__ import annotations

import pytest
import torch
from cases import F64, MASKS

import salkernels

NAN = float("nan")


def maps(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def some(*shape, device="cpu", share=0.6):
    return (torch.rand(*shape) < share).to(device)


def cosine_loss(x, y, valid_x, valid_y, window):
    """A pair (C, H, W) by plain loops over windows, as the mean over what takes part; or None."""
    height, width = x.shape[1:]
    terms = []
    for top in range(0, height, window):
        for left in range(0, width, window):
            block = (slice(top, top + window), slice(left, left + window))
            rows, columns = x[(slice(None), *block)], y[(slice(None), *block)]
            rows, columns = rows[:, valid_x[block]], columns[:, valid_y[block]]
            if columns.shape[1]:
                sims = torch.cosine_similarity(rows[:, :, None], columns[:, None], dim=0)
                terms.append((1 - sims.amax(dim=1)).abs())
    terms = torch.cat(terms) if terms else x.new_empty(0)
    return terms.mean() if len(terms) else None


@pytest.mark.parametrize("form", ["both", "pair", "only x", "only y"])
def test_pairwise(form, backend, device):
    x, y = maps(4, 8, 6, 7, device=device), maps(4, 8, 6, 7, device=device)
    everything = torch.ones(4, 6, 7, dtype=torch.bool, device=device)
    masks = [some(4, 6, 7, device=device), some(4, 6, 7, device=device)]
    masks[1][2] = False  # pair 2 has no key
    valid = {
        "both": masks[0],
        "pair": tuple(masks),
        "only x": (masks[0], None),
        "only y": [None, masks[1]],
    }[form]
    if form == "both":
        masks = [masks[0], masks[0]]
    masks = [everything if form == f"only {z}" else m for z, m in zip("yx", masks, strict=True)]
    rows = [cosine_loss(x[b], y[b], masks[0][b], masks[1][b], 2) for b in range(4)]
    losses = salkernels.wla_loss(x, y, 2, valid=valid, reduction="none", backend=backend)
    expected = torch.stack([x.new_zeros(()) if row is None else row for row in rows])
    torch.testing.assert_close(losses, expected)
    mean = salkernels.wla_loss(x, y, 2, valid=valid, backend=backend)
    expected = torch.stack([row for row in rows if row is not None]).mean()
    torch.testing.assert_close(mean, expected)
    for ours, theirs in zip(
        torch.autograd.grad(mean, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_pair_without_a_pixel_carries_no_weight(weighted, backend, device):
    features = maps(4, 8, 6, 6, device=device)
    valid = torch.ones(4, 6, 6, dtype=torch.bool, device=device)
    valid[1] = False
    valid[2, :, 3:] = valid[3, :, :3] = False  # 2 and 3 never meet
    pairs = MASKS["others"](4).to(device)
    given = pairs * (torch.rand(4, 4, device=device) + 0.1) if weighted else pairs
    settings = {"valid": valid, "backend": backend}
    losses = salkernels.wla_set_loss(features, given, 3, reduction="none", **settings)
    alive = torch.zeros_like(pairs)
    alive[0, 2] = alive[2, 0] = alive[0, 3] = alive[3, 0] = True
    assert torch.equal(losses > 0, alive)
    weights = given * alive
    expected = (weights * losses).sum() / weights.sum()
    mean = salkernels.wla_set_loss(features, given, 3, **settings)
    torch.testing.assert_close(mean, expected)


def test_nobody_takes_part(backend, device):
    features = maps(3, 8, 4, 4, device=device)
    valid = torch.zeros(3, 4, 4, dtype=torch.bool, device=device)
    pairs = MASKS["others"](3).to(device)
    loss = salkernels.wla_set_loss(features, pairs, 2, valid=valid, backend=backend)
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()


def test_all_valid_is_as_without(backend, device):
    features = maps(4, 8, 6, 7, device=device)
    pairs = MASKS["others"](4).to(device)
    valid = torch.ones(4, 6, 7, dtype=torch.bool, device=device)
    losses = [
        salkernels.wla_set_loss(features, pairs, 2, valid=v, backend=backend) for v in (None, valid)
    ]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, features)[0] for loss in losses]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bad", [NAN, float("inf"), 1e30])
def test_what_an_invalid_pixel_holds_reaches_nobody(bad, backend, device):
    features = maps(4, 8, 6, 6, device=device)
    valid, pairs = some(4, 6, 6, device=device), MASKS["others"](4).to(device)
    spoilt = features.detach().masked_fill(~valid[:, None], bad).requires_grad_()
    results = []
    for x in (features, spoilt):
        found = salkernels.align_set(x, pairs, 2, valid=valid, backend=backend)
        # A gradient for pixels that take no part is not theirs to have.
        (grad,) = torch.autograd.grad(found.max_sim.square().sum(), x)
        results.append((*found, grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert (grad[(~valid)[:, None].expand_as(grad)] == 0).all()


def test_any_mask_on_its_way_to_a_bool_counts(backend, device):
    """A view of bytes may hold other values than 0 and 1."""
    features = maps(3, 8, 6, 6, device=device)
    valid, pairs = some(3, 6, 6, device=device), MASKS["others"](3).to(device)
    odd = (valid.byte() * 2).view(torch.bool)
    strided = torch.stack([valid, ~valid], dim=-1)[..., 0]
    expected = salkernels.wla_set_loss(features, pairs, 2, valid=valid, backend=backend)
    for other in (odd, strided):
        loss = salkernels.wla_set_loss(features, pairs, 2, valid=other, backend=backend)
        assert torch.equal(loss, expected)


def test_la_sal_and_the_modules_hand_it_on():
    x, y, embeddings = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6), torch.randn(4, 5)
    ids = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 1], [9, 9, 8, 8]]).unbind()
    valid = some(4, 6, 6)
    expected = salkernels.wla_loss(x, y, 2, valid=valid)
    assert salkernels.WLALoss(2)(x, y, valid) == expected
    whole = salkernels.wla_loss(x, y, (6, 6), valid=(valid, None))
    assert salkernels.la_loss(x, y, valid=(valid, None)) == whole
    pairs = salkernels.slice_pairs(*ids, 0.35)
    la = salkernels.wla_set_loss(x, pairs, 2, valid=valid)
    assert la != salkernels.wla_set_loss(x, pairs, 2)
    assert salkernels.sal_loss(x, embeddings, *ids, 2, valid=valid).la == la
    assert salkernels.SALLoss(2)(x, embeddings, *ids, valid).la == la


def test_large_maps_count_their_pixels_exactly():
    """Beyond 2²⁴ pixels an fp32 count would stand still."""
    side = 4100
    x = torch.ones(1, 1, 1, 1, dtype=F64).expand(1, 1, side, side)
    valid = torch.ones(1, side, side, dtype=torch.bool)
    valid[0, 0, :7] = False
    y = torch.where(torch.arange(side) < 1, -1.0, 1.0).to(F64).expand(1, 1, side, side)
    loss = salkernels.wla_loss(x, y, 1, valid=valid)
    assert loss.item() == pytest.approx(2 * (side - 1) / (side * side - 7), rel=1e-9)
