"""The definition: worked examples and closed forms, against the oracle of the tests as well."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import F64, oracle

import salkernels


def column(*vectors):
    """Vectors as a (1, C, 1, len) map: one row of pixels."""
    return torch.tensor(vectors, dtype=F64).T[None, :, None, :].clone().requires_grad_()


def example():
    """Two pixels, worked by hand: matches are keys 1 and 0 with similarity 1 and 0.8."""
    return column((2.0, 0.0), (0.0, 1.0)), column((0.6, 0.8), (3.0, 0.0))


def test_worked_example():
    x, y = example()
    loss = salkernels.wla_loss(x, y, (1, 2))
    assert loss.item() == pytest.approx(0.1, abs=1e-15)
    max_sim, argmax = salkernels.align(x, y, (1, 2))
    assert argmax.tolist() == [[[1, 0]]]
    assert max_sim[0, 0].tolist() == pytest.approx([1.0, 0.8])
    loss.backward()
    # Pixel 0 is at its optimum. Pixel 1: -1/2 · (ŷ0 - 0.8 x̂1), and -1/2 · (x̂1 - 0.8 ŷ0) for key 0.
    torch.testing.assert_close(x.grad[0, :, 0].T, torch.tensor([[0, 0], [-0.3, 0]], dtype=F64))
    torch.testing.assert_close(y.grad[0, :, 0].T, torch.tensor([[0.24, -0.18], [0, 0]], dtype=F64))


def test_worked_example_by_the_oracle():
    x, y = example()
    expected = oracle(x[0], y[0], (1, 2))
    assert expected.loss.item() == pytest.approx(0.1, abs=1e-15)
    assert expected.argmax.tolist() == [[1, 0]]
    assert expected.margin[0].tolist() == pytest.approx([0.4, 0.8])
    expected.loss.backward()
    torch.testing.assert_close(x.grad[0, :, 0].T, torch.tensor([[0, 0], [-0.3, 0]], dtype=F64))
    torch.testing.assert_close(y.grad[0, :, 0].T, torch.tensor([[0.24, -0.18], [0, 0]], dtype=F64))


def test_in_the_set_form_a_feature_collects_both_roles():
    x, y = example()
    features = torch.cat((x, y)).detach().requires_grad_()
    both_ways = torch.tensor([[0, 1], [1, 0]], dtype=torch.bool)
    loss = salkernels.wla_set_loss(features, both_ways, (1, 2), reduction="none")
    # y queries x: (0.6, 0.8) matches (0, 1) with 0.8, (1, 0) matches itself.
    torch.testing.assert_close(loss, torch.tensor([[0, 0.1], [0.1, 0]], dtype=F64))
    loss.sum().backward()
    expected = [[[0, 0], [-0.6, 0]], [[0.48, -0.36], [0, 0]]]
    torch.testing.assert_close(
        features.grad[:, :, 0].mT, torch.tensor(expected, dtype=F64), atol=1e-15, rtol=1e-12
    )


def maps(*shape):
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("window", [1, 2, (3, 5), (5, 6)])
def test_equal_maps_give_zero_and_no_gradient(window):
    x = maps(2, 4, 5, 6).requires_grad_()
    loss = salkernels.wla_loss(x, x.detach(), window)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert x.grad.abs().max() < 1e-14


def test_opposite_maps_give_two():
    x = maps(2, 4, 5, 6)
    assert salkernels.wla_loss(x, -x, 1).item() == pytest.approx(2, abs=1e-15)


def test_orthogonal_maps_give_one():
    x, y = torch.zeros(2, 2, 4, 5, 6, dtype=F64)
    x[:, :2], y[:, 2:] = maps(2, 2, 5, 6), maps(2, 2, 5, 6)
    assert salkernels.wla_loss(x, y, 3).item() == pytest.approx(1, abs=1e-15)


def test_windows_of_one_pixel_give_the_mean_cosine_distance():
    x, y = maps(3, 4, 5, 6), maps(3, 4, 5, 6)
    expected = 1 - torch.cosine_similarity(x, y, dim=1).mean()
    torch.testing.assert_close(salkernels.wla_loss(x, y, 1), expected)


def test_la_loss_is_one_matrix_product():
    """Eq. (1) as the paper writes it: MAE(max(X_iᵀ X_j), 1)."""
    x, y = maps(3, 4, 5, 6), maps(3, 4, 5, 6)
    unit_x, unit_y = (torch.nn.functional.normalize(z, dim=1).flatten(2) for z in (x, y))
    expected = (1 - (unit_x.mT @ unit_y).amax(dim=2)).abs().mean()
    torch.testing.assert_close(salkernels.la_loss(x, y), expected)


def test_la_loss_is_wla_loss_with_one_window():
    x, y = maps(2, 4, 5, 6), maps(2, 4, 5, 6)
    for settings in ({}, {"reduction": "none"}, {"eps": 2.0}, {"backend": "reference"}):
        whole = salkernels.la_loss(x, y, **settings)
        assert torch.equal(whole, salkernels.wla_loss(x, y, (5, 6), **settings)), settings


def test_norms_of_the_features_do_not_matter():
    x, y = maps(2, 4, 5, 6), maps(2, 4, 5, 6)
    scale = torch.rand(2, 1, 5, 6, dtype=F64) + 0.1
    torch.testing.assert_close(
        salkernels.wla_loss(scale * x, y, 2), salkernels.wla_loss(x, 7 * y, 2)
    )


def test_gradient_is_orthogonal_to_the_feature():
    x, y = maps(2, 4, 5, 6).requires_grad_(), maps(2, 4, 5, 6).requires_grad_()
    salkernels.wla_loss(x, y, 2).backward()
    for z in (x, y):
        assert (z * z.grad).sum(dim=1).abs().max() < 1e-15
        assert z.grad.abs().max() > 1e-4


def test_a_larger_window_can_only_lower_the_loss():
    x, y = maps(2, 4, 12, 12), maps(2, 4, 12, 12)
    losses = [salkernels.wla_loss(x, y, w, reduction="none") for w in (1, 2, 4, 12)]
    assert all(bool((a > b).all()) for a, b in itertools.pairwise(losses))


def test_order_inside_a_window_of_the_key_does_not_matter():
    x, y = maps(1, 4, 4, 6), maps(1, 4, 4, 6)
    swapped = y.clone()
    swapped[..., 0, 0], swapped[..., 1, 1] = y[..., 1, 1], y[..., 0, 0]
    loss = salkernels.wla_loss(x, y, 2)
    torch.testing.assert_close(salkernels.wla_loss(x, swapped, 2), loss)
    swapped[..., 0, 0], swapped[..., 0, 2] = y[..., 0, 2], y[..., 0, 0]  # across windows it does
    assert abs(salkernels.wla_loss(x, swapped, 2).item() - loss.item()) > 1e-3


def test_the_loss_is_not_symmetric():
    x, y = maps(1, 4, 4, 6), maps(1, 4, 4, 6)
    difference = salkernels.wla_loss(x, y, 2) - salkernels.wla_loss(y, x, 2)
    assert abs(difference.item()) > 1e-3


def test_set_form_is_the_pairwise_form_over_its_pairs():
    features = maps(4, 3, 5, 6)
    pairs = torch.rand(4, 4) > 0.5
    queries, keys = pairs.nonzero(as_tuple=True)
    losses = salkernels.wla_loss(features[queries], features[keys], 2, reduction="none")
    by_pair = salkernels.wla_set_loss(features, pairs, 2, reduction="none")
    torch.testing.assert_close(by_pair[pairs], losses)
    assert (by_pair[~pairs] == 0).all()
    torch.testing.assert_close(salkernels.wla_set_loss(features, pairs, 2), losses.mean())


def test_weights_make_a_weighted_mean():
    features = maps(4, 3, 5, 6)
    weights = torch.rand(4, 4) * (torch.rand(4, 4) > 0.3)
    losses = salkernels.wla_set_loss(features, weights > 0, 2, reduction="none")
    expected = (weights.double() * losses).sum() / weights.double().sum()
    torch.testing.assert_close(salkernels.wla_set_loss(features, weights, 2), expected)
    torch.testing.assert_close(salkernels.wla_set_loss(features, 1e6 * weights, 2), expected)
    by_pair = salkernels.wla_set_loss(features, weights, 2, reduction="none")
    assert torch.equal(by_pair, losses)


def test_align_says_where_the_match_is():
    """`y` is `x` with the pixels of each window shifted: every match is known."""
    x = maps(1, 8, 4, 6)
    windows = x.unflatten(3, (2, 3)).unflatten(2, (2, 2))  # (1, C, 2, 2, 2, 3)
    y = windows.roll((1, 1), dims=(3, 5)).flatten(4).flatten(2, 3)
    max_sim, argmax = salkernels.align(x, y, (2, 3))
    torch.testing.assert_close(max_sim, torch.ones(1, 4, 6, dtype=F64))
    assert argmax.dtype == torch.int64
    rows, columns = argmax[0] // 3, argmax[0] % 3
    assert rows.tolist() == [[1] * 6, [0] * 6] * 2
    assert columns.tolist() == [[1, 2, 0] * 2] * 4


def test_the_loss_is_the_mean_of_what_align_gives():
    x, y = maps(2, 8, 4, 6).requires_grad_(), maps(2, 8, 4, 6).requires_grad_()
    by_align = (1 - salkernels.align(x, y, 2).max_sim).mean()
    loss = salkernels.wla_loss(x, y, 2)
    torch.testing.assert_close(by_align, loss)
    for ours, theirs in zip(
        torch.autograd.grad(by_align, (x, y)), torch.autograd.grad(loss, (x, y)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_loss_and_maxima_can_be_used_together():
    """Both outputs of one call send gradient: the backward adds them."""
    x = maps(3, 8, 4, 6).requires_grad_()
    pairs = ~torch.eye(3, dtype=torch.bool)
    places = pairs.reshape(-1).nonzero().squeeze(1)
    found = salkernels.library.match(x[None], None, places, None, (2, 2), 1e-12, "reference")
    (both,) = torch.autograd.grad(found.loss.sum() + found.max_sim.square().sum(), x)
    parts = [
        torch.autograd.grad(6 * salkernels.wla_set_loss(x, pairs, 2), x)[0],
        torch.autograd.grad(salkernels.align_set(x, pairs, 2).max_sim.square().sum(), x)[0],
    ]
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize("window", [(2, 3), (4, 6), (3, 4)])
def test_match_pixels_are_where_the_matches_lie(window):
    x, y = maps(3, 8, 5, 7), maps(3, 8, 5, 7)
    valid = torch.rand(3, 5, 7) < 0.7
    max_sim, argmax = salkernels.align(x, y, window, valid=(None, valid))
    rows, columns = salkernels.match_pixels(argmax, window)
    assert ((rows < 0) == (argmax < 0)).all()
    for b, i, j in (argmax >= 0).nonzero().tolist():
        row, column = rows[b, i, j], columns[b, i, j]
        assert row // window[0] == i // window[0]
        assert column // window[1] == j // window[1]
        assert valid[b, row, column]
        cosine = torch.cosine_similarity(x[b, :, i, j], y[b, :, row, column], dim=0)
        assert cosine.item() == pytest.approx(max_sim[b, i, j].item(), abs=1e-12)
    with pytest.raises(ValueError, match=r"argmax must be \(\.\.\., H, W\)"):
        salkernels.match_pixels(torch.zeros(3, dtype=torch.long), 2)


def test_loss_of_random_unit_vectors_is_near_its_expectation():
    """In two dimensions with one key the similarity is cos of a uniform angle: mean 0."""
    x, y = maps(1, 2, 100, 100), maps(1, 2, 100, 100)
    assert salkernels.wla_loss(x, y, 1).item() == pytest.approx(1, abs=4 * math.sqrt(0.5) / 100)
