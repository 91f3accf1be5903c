"""The log-sum-exp over windows of negatives in Triton: both passes against the definition."""

from __future__ import annotations

import pytest
import torch
from cases import F32
from test_contrast import CASE, NEGATIVES, check_against_the_formula
from tolerances import TOLERANCES

from salkernels import reference_contrast as definition
from salkernels.backends import triton as backend

pytest.importorskip("triton")
from triton_check import DEVICE, EPS, listed, maps, runs, small_tiles, some_pairs  # noqa: F401

TAU = 0.1


def compare(query, key, pairs, window, valid=None, tau=TAU, eps=EPS, grad=None):
    """Both passes against the definition in fp64; returns the results and the gradients."""
    rest = (pairs, valid, window, tau, eps)
    wide = [None if x is None else x.double() for x in (query, key)]
    found = backend.window_lse(query, key, *rest)
    expected = definition.window_lse(*wide, *rest)
    tolerance = TOLERANCES[query.dtype]
    assert found.dtype == F32
    assert found.is_contiguous()
    # An error of a cosine is divided by τ; the sum of many terms has the error of each.
    bound = 3 * tolerance.similarity / tau
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=1e-6, equal_nan=True)
    if grad is None:
        grad = torch.randn(found.shape, device=query.device)
        grad[torch.rand_like(grad) < 0.2] = 0
    grads = backend.window_lse_backward(grad, query, key, *rest[:2], found, *rest[2:])
    wanted = definition.window_lse_backward(
        grad.double(), *wide, *rest[:2], expected, window, tau, eps
    )
    for ours, theirs, x in zip(grads, wanted, (query, key), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert ours.dtype == x.dtype
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.double().nan_to_num(), theirs.nan_to_num()
        error = (ours - theirs).norm() / theirs.norm().clamp_min(1e-30)
        assert error <= tolerance.relative_l2 * max(1, 0.3 / tau), float(error)
    return found, grads


def valid_share(share, groups, nodes, *plane):
    return torch.rand(groups, nodes, *plane, device=DEVICE) < share


def hidden(x, valid):
    """NaN where a pixel takes no part."""
    return x.masked_fill(~valid[:, :, None], torch.nan)


@runs
@pytest.mark.parametrize("density", [0.08, 0.6])
def test_a_set_of_several_blocks(density, small_tiles):  # noqa: F811
    """12 samples at 2 x 3 are three blocks of rows, and one at the edge; few pairs leave some of
    them without a negative, and some samples, too."""
    found, grads = compare(maps(1, 12, 5, 2, 4), None, some_pairs(1, 12, 12, density), (2, 3))
    assert found.isinf().any() == (density < 0.1)
    if density < 0.1:
        assert (grads[0] == 0).all(dim=2).any()


@runs
def test_every_pair_of_a_set_itself_included(small_tiles):  # noqa: F811
    compare(maps(1, 9, 5, 2, 2), None, None, (2, 2))


@runs
def test_groups_of_queries_and_keys_in_several_blocks(small_tiles):  # noqa: F811
    """Whose channels lie otherwise, and with room that is left over in the list."""
    keys = maps(2, 10, 16, 2, 2, layout="channels_last")
    compare(maps(2, 9, 16, 2, 2), keys, some_pairs(2, 9, 10, room=4), (2, 2))


@runs
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [3, 48, 160])
def test_channels_in_several_blocks(channels, dtype, small_tiles):  # noqa: F811
    """Blocks of 32, of which a program takes one, two or four; 160 are two programs."""
    x = maps(1, 3, channels, 2, 3, dtype=dtype, layout="channels_last")
    # Not with themselves: such a cosine of 1 alone would count, and it has no gradient.
    compare(x, None, listed(~torch.eye(3, dtype=torch.bool, device=DEVICE)[None]), (2, 3))


@runs
@pytest.mark.parametrize(("form", "window"), [("set", (6, 8)), ("keys", (7, 9))])
def test_windows_larger_than_a_block(form, window, small_tiles):  # noqa: F811
    """Of which some pixels take no part; smaller ones at the edges, and one of the whole map."""
    valid = valid_share(0.7, 1, 2 if form == "set" else 4, 7, 9)
    x = hidden(maps(1, 2, 8, 7, 9, layout="strided"), valid[:, :2])
    y = None if form == "set" else hidden(maps(1, 2, 8, 7, 9), valid[:, 2:])
    found, _ = compare(x, y, None, window, valid)
    assert torch.equal(found == -torch.inf, ~valid[:, :2])


@runs
@pytest.mark.parametrize("tau", [2**-10, 1e4])
def test_temperatures_at_the_ends(tau, small_tiles):  # noqa: F811
    """e^{1 / τ} overflows; blocks come with rising and with falling maxima."""
    x = maps(1, 9, 6, 2, 2)
    x[0, 1:] = x[0, 1:] + torch.linspace(3, 0, 8, device=DEVICE)[:, None, None, None]
    found, _ = compare(x, None, some_pairs(1, 9, 9, 0.8), (2, 2), tau=tau)
    assert found.isfinite().all()


@runs
def test_short_vectors_get_no_gradient():
    x = maps(1, 4, 3, 2, 2)
    x[0, 1, :, 0, 0] = 0
    _, grads = compare(x, None, None, (2, 2), eps=1.2)
    short = x[0].norm(dim=1) <= 1.2
    assert 0 < short.sum() < short.numel()
    assert torch.equal((grads[0][0] == 0).all(dim=1), short)


@runs
@pytest.mark.parametrize("form", ["set", "keys"])
def test_nan_reaches_its_terms_and_nothing_else(form, small_tiles):  # noqa: F811
    """And infinity, which is NaN as a cosine. A query without a gradient passes none on."""
    x, y = maps(1, 4, 3, 4, 4), maps(1, 4, 3, 4, 4)
    (x if form == "set" else y)[0, 2, 1, 0, 1] = torch.nan
    x[0, 3, 1, 3, 3] = torch.inf
    key = None if form == "set" else y
    mask = NEGATIVES[None].to(DEVICE)
    grad = torch.ones(1, 4, 4, 4, device=DEVICE)
    found, grads = compare(x, key, listed(mask), (2, 2), grad=grad)
    assert found[0, :2, :2, :2].isnan().all()
    assert not found[0, :3, :, 2:].isnan().any() or form == "set"
    assert grads[0][0, :2, :, :2, :2].isnan().all()
    assert not grads[0][0, :2, :, :2, 2:].isnan().any()
    grad[found.isnan()] = 0
    _, grads = compare(x, key, listed(mask), (2, 2), grad=grad)
    assert not any(g.isnan().any() for g in grads if g is not None)


@runs
@pytest.mark.parametrize("keys", [None, 3, 0])
def test_without_any_pair(keys):
    """A list of room alone, an empty one, and no keys at all."""
    x, y = maps(1, 2, 3, 2, 2), None if keys is None else maps(1, keys, 3, 2, 2)
    for pairs in ([-1, -1], []):
        found, grads = compare(x, y, torch.tensor(pairs, dtype=torch.long, device=DEVICE), (2, 2))
        assert (found == -torch.inf).all()
        assert all((g == 0).all() for g in grads if g is not None)


@runs
def test_gradients_and_sums_in_other_strides_and_dtypes():
    x = maps(1, 3, 4, 3, 3)
    lse = backend.window_lse(x, None, None, None, (2, 2), TAU, EPS)
    grad = torch.randn(lse.shape, device=DEVICE)
    first, _ = backend.window_lse_backward(grad, x, None, None, None, lse, (2, 2), TAU, EPS)
    other = (z.mT.contiguous().mT for z in (grad.double(), lse))
    grad, lse = other
    assert not lse.is_contiguous()
    again, _ = backend.window_lse_backward(grad, x, None, None, None, lse, (2, 2), TAU, EPS)
    assert torch.equal(first, again)


CASES = {
    "keys": {"form": "keys", "layout": "contiguous"},
    "one pixel, bf16": {"window": (1, 1), "shape": (4, 3, 2, 2), "dtype": torch.bfloat16},
    "fp16, large eps": {"window": (5, 6), "dtype": torch.float16, "form": "keys", "eps": 1.2},
}


@runs
@pytest.mark.parametrize("name", CASES)
def test_the_loss_against_the_formula(name):
    generator = torch.Generator().manual_seed(2)
    check_against_the_formula(CASE | CASES[name] | {"generator": generator}, "triton", DEVICE)


def test_doubles_are_refused_in_words():
    x = maps(1, 2, 3, 2, 2).double()
    with pytest.raises(RuntimeError, match="triton backend cannot run"):
        backend.window_lse(x, None, None, None, (2, 2), TAU, EPS)
