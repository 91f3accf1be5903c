"""The contrast of matches with negatives: against the formula in float64, and its corner cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import EPS, F32, F64, lay_out
from compare import assert_gradient, assert_values, tolerance_for
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import salkernels
import salkernels.reference as reference
from salkernels.backends import BACKENDS

TAU = 0.1
POSITIVES = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
NEGATIVES = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def units(x, eps=EPS):
    """x / max(norm, eps) of (S, C, HW); a vector at or below eps carries no gradient."""
    norm = x.square().sum(dim=1, keepdim=True).sqrt()
    return torch.where(norm <= eps, (x / eps).detach(), x / norm.clamp_min(eps))


def formula(x, y, positives, negatives, window, tau, valid=None, eps=EPS):
    """Losses (P, HW) of each pair and pixel, which take part, and the lead of the best match.

    Every product of every two pixels of the maps, in float64: a window is a mask on them.
    """
    height, width = x.shape[2:]
    rows, columns = torch.arange(height) // window[0], torch.arange(width) // window[1]
    number = (rows[:, None] * width + columns).flatten()
    sim = torch.einsum("icp,jcl->ijpl", units(x.flatten(2), eps), units(y.flatten(2), eps))
    among = (number[:, None] == number).expand(sim.shape)
    if valid is not None:
        queries, keys = (v.flatten(1) for v in valid)
        among = among & queries[:, None, :, None] & keys[None, :, None, :]
    sim = sim.masked_fill(~among, -torch.inf)
    losses, present, leads = [], [], []
    for i, j in positives.nonzero().tolist():
        best = sim[i, j].amax(dim=-1)
        takes_part = best != -torch.inf
        others = [sim[i, k] for k in negatives[i].nonzero().flatten().tolist() if k != i]
        terms = torch.cat([best[:, None], *others], dim=1) / tau
        losses.append(torch.where(takes_part, terms.logsumexp(dim=1) - best / tau, 0))
        present.append(takes_part)
        two = sim[i, j].detach().topk(min(2, sim.shape[-1])).values
        alone = (two[:, -1] == -torch.inf) | (two.shape[1] == 1)
        leads.append(torch.where(alone, torch.inf, two[:, 0] - two[:, -1]))
    if not losses:
        nothing = x.new_zeros(0, height * width)
        return nothing, nothing.bool(), nothing
    return torch.stack(losses), torch.stack(present), torch.stack(leads)


def mean(losses, present):
    """Over the pixels that take part, then over the pairs that have any."""
    count = present.sum(dim=1)
    return (losses.sum(dim=1) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


@st.composite
def configurations(draw):
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    samples = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def table(density):
        return torch.rand(samples, samples, generator=generator) < density

    positives = table(draw(st.sampled_from([0.2, 0.6, 1.0])))
    return {
        # With one channel cosines are ±1, and gradients nothing but rounding.
        "shape": (samples, draw(st.integers(2, 9)), height, width),
        "window": (draw(st.integers(1, height)), draw(st.integers(1, width))),
        "tau": draw(st.sampled_from([0.05, 0.1, 1.0])),
        "dtype": draw(st.sampled_from([F64, F32, torch.bfloat16, torch.float16])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
        "form": draw(st.sampled_from(["set", "keys"])),
        "valid": draw(st.sampled_from([None, 0.5, 0.9])),
        "positives": positives,
        "negatives": table(draw(st.sampled_from([0.0, 0.5, 1.0]))) & ~positives,
        "eps": draw(st.sampled_from([EPS, 1.2])),
        "generator": generator,
    }


def check_against_the_formula(case, backend, device="cpu"):
    """Value and gradients, with NaN where pixels are not valid."""
    generator, dtype, window = case["generator"], case["dtype"], case["window"]
    x, y = (torch.randn(case["shape"], generator=generator, dtype=F64).to(dtype) for _ in range(2))
    place = (case["shape"][0], *case["shape"][2:])
    valid = None
    if case["valid"] is not None:
        valid = [torch.rand(place, generator=generator) < case["valid"] for _ in range(2)]
    if case["form"] == "set":
        y, valid = x, None if valid is None else [valid[0]] * 2
    wide = [z.double().requires_grad_() for z in (x, y)]
    if case["form"] == "set":
        wide[1] = wide[0]
    if valid is not None:
        x, y = (z.masked_fill(~v[:, None], torch.nan) for z, v in zip((x, y), valid, strict=True))
    features, keys = (lay_out(z.to(device), case["layout"]).requires_grad_() for z in (x, y))
    tables = (case["positives"].to(device), case["negatives"].to(device))
    how = {"eps": case["eps"], "backend": backend}
    leaves, wide_leaves = [features], wide[:1]
    if case["form"] == "keys":
        how |= {
            "keys": keys,
            "valid": None if valid is None else tuple(v.to(device) for v in valid),
        }
        leaves, wide_leaves = [features, keys], wide
    elif valid is not None:
        how["valid"] = valid[0].to(device)
    loss = salkernels.wla_contrast(features, *tables, window, case["tau"], **how)
    tables = (case["positives"], case["negatives"])
    terms, present, leads = formula(*wide, *tables, window, case["tau"], valid, case["eps"])
    expected = mean(terms, present) + 0 * sum(leaf.sum() for leaf in wide_leaves)
    tolerance = tolerance_for(dtype)
    assert loss.dtype == (F64 if dtype == F64 else F32)
    # An error of a cosine is divided by τ.
    assert_values(loss, expected, 3 * tolerance.value / case["tau"], "loss")

    close = bool((leads < tolerance.margin).any())  # a match hangs on rounding
    weight = 20.0
    grads = torch.autograd.grad(weight * loss, leaves)
    expected_grads = torch.autograd.grad(weight * expected, wide_leaves, materialize_grads=True)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert actual.dtype == dtype
        if not close:
            size = wanted.abs().max().clamp_min(1e-6)
            assert_gradient(actual.double() / size, wanted / size, wider(dtype, case["tau"]))


def wider(dtype, tau):
    """Weights are e^{sim / τ}: the error of a similarity comes divided by τ.

    Of half precision two gradients are added, of the matches and of the negatives, each rounded
    already: where they cancel, what is left has the error of either.
    """
    tolerance = tolerance_for(dtype)
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    return replace(
        tolerance,
        element=3 * tolerance.element,
        floor=3 * tolerance.floor / tau + 2 * rounding,
        relative_l2=3 * tolerance.relative_l2 / min(tau, 0.3),
        cosine=10 * tolerance.cosine / tau,
        bias=10 * tolerance.bias / tau,
    )


@given(configurations())
def test_random_configurations_against_the_formula(case):
    for backend in ("cpu", "reference"):
        if BACKENDS[backend].status() is None:
            check_against_the_formula(dict(case, generator=clone(case["generator"])), backend)


def clone(generator):
    copy = torch.Generator()
    copy.set_state(generator.get_state())
    return copy


CASE = {
    "shape": (4, 5, 5, 6),
    "window": (2, 4),
    "tau": TAU,
    "dtype": F32,
    "layout": "channels_last",
    "form": "set",
    "valid": 0.8,
    "positives": POSITIVES,
    "negatives": NEGATIVES,
    "eps": EPS,
}


@pytest.mark.parametrize("form", ["set", "keys"])
def test_every_backend_against_the_formula(form, backend, device):
    case = dict(CASE, form=form, generator=torch.Generator().manual_seed(1))
    check_against_the_formula(case, backend, device)


def maps(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("form", ["set", "keys"])
@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 5)])
def test_gradcheck(window, form, valid):
    x, keys = maps(4, 3, 4, 5), maps(4, 3, 4, 5)
    mask = torch.rand(4, 4, 5) < 0.7 if valid else None
    weights = torch.rand(4, 4, dtype=F64)

    def loss(x, keys):
        keys = None if form == "set" else keys
        losses = salkernels.wla_contrast(
            x, POSITIVES, NEGATIVES, window, 0.3, keys=keys, valid=mask, reduction="none"
        )
        return (losses * weights).sum() + 0 * (0 if keys is not None else x.sum())

    inputs = (x,) if form == "set" else (x, keys)
    # One random direction with keys, whose set form is checked number by number: 14 s less.
    assert gradcheck(lambda x, keys=None: loss(x, keys), inputs, fast_mode=form == "keys")


@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 4), (4, 5)])
def test_the_budget_changes_nothing(budget, window, monkeypatch):
    x, keys = maps(4, 3, 4, 5), maps(4, 3, 4, 5)
    valid = torch.rand(4, 4, 5) < 0.8

    def both():
        for other in (None, keys):
            loss = salkernels.wla_contrast(
                x, POSITIVES, NEGATIVES, window, TAU, keys=other, valid=valid, backend="reference"
            )
            leaves = (x,) if other is None else (x, keys)
            yield loss, torch.autograd.grad(loss, leaves)

    expected = list(both())
    monkeypatch.setattr(reference, "GRAM_BUDGET", budget)
    torch.testing.assert_close(list(both()), expected, rtol=0, atol=1e-13)


def test_no_product_is_larger_than_the_budget(monkeypatch):
    """Neither pass keeps or makes anything that grows with negatives · window · map."""
    from test_chunking import Largest

    budget, samples, side = 8000, 8, 12
    monkeypatch.setattr(reference, "GRAM_BUDGET", budget)
    x = torch.randn(samples, 4, side, side).requires_grad_()
    scans = torch.arange(2).repeat_interleave(samples // 2)
    positives = scans[:, None] == scans
    with Largest() as largest:
        loss = salkernels.wla_contrast(x, positives, ~positives, side, TAU, backend="reference")
        loss.backward()
    maps_of_pairs = int(positives.sum()) * side * side
    assert largest.elements >= maps_of_pairs, "the mode saw nothing"
    assert largest.elements <= max(budget, maps_of_pairs, x.numel())


def test_a_sample_without_negatives_has_no_loss_and_counts():
    x = maps(4, 3, 4, 5)
    none = NEGATIVES.clone()
    none[0] = False
    losses = salkernels.wla_contrast(x, POSITIVES, none, 2, reduction="none")
    full = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, reduction="none")
    assert losses[0, 1] == 0 < full[0, 1]
    assert losses[1:].equal(full[1:])
    mean = salkernels.wla_contrast(x, POSITIVES, none, 2)
    torch.testing.assert_close(mean, (losses[1, 0] + losses[2, 3]) / 3)
    (grad,) = torch.autograd.grad(mean, x)
    assert grad.isfinite().all()
    (nothing,) = torch.autograd.grad(salkernels.wla_contrast(x, POSITIVES, NEGATIVES & False, 2), x)
    assert (nothing == 0).all()


def test_without_pairs_and_without_samples_the_loss_is_zero():
    x = maps(4, 3, 4, 5)
    loss = salkernels.wla_contrast(x, POSITIVES & False, NEGATIVES, 2)
    assert loss == 0
    assert (torch.autograd.grad(loss, x)[0] == 0).all()
    empty, table = maps(0, 3, 4, 5), torch.zeros(0, 0, dtype=torch.bool)
    loss = salkernels.wla_contrast(empty, table, table, 2)
    assert loss == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 3, 4, 5)


def test_the_diagonal_of_the_negatives_is_ignored():
    x = maps(4, 3, 4, 5)
    expected = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2)
    itself = torch.eye(4, dtype=torch.bool)
    assert salkernels.wla_contrast(x, POSITIVES, NEGATIVES | itself, 2) == expected
    keys = x.detach()
    with_keys = salkernels.wla_contrast(x, POSITIVES, NEGATIVES | itself, 2, keys=keys)
    torch.testing.assert_close(with_keys, expected)


def test_features_that_are_alike_are_at_chance():
    """What Eq. 1 cannot see costs the logarithm of the number of choices."""
    x = torch.randn(1, 5, 1, 1, dtype=F64).expand(4, 5, 4, 6)
    losses = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, (2, 3), reduction="none")
    for i, j in POSITIVES.nonzero().tolist():
        choices = 1 + 6 * int(NEGATIVES[i].sum())
        assert losses[i, j].item() == pytest.approx(math.log(choices), rel=1e-12)
    assert salkernels.wla_set_loss(x, POSITIVES, (2, 3)) < 1e-12


def test_a_code_of_place_costs_as_much():
    """Features that tell the pixel's place, and nothing of the slice: Eq. 1 is 0, this is not."""
    x = torch.randn(1, 64, 4, 6, dtype=F64).expand(4, 64, 4, 6)
    assert salkernels.wla_set_loss(x, POSITIVES, 2) < 1e-12
    losses = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, reduction="none")
    for i, j in POSITIVES.nonzero().tolist():
        assert losses[i, j] > math.log(1 + int(NEGATIVES[i].sum())) - 1e-9


def test_nan_reaches_what_it_is_part_of_and_nothing_else():
    x = torch.randn(4, 3, 4, 4, dtype=F64)
    x[2, 1, 0, 1] = torch.nan  # in the first window; a negative of samples 0 and 1, which match
    x.requires_grad_()
    losses = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, reduction="none")
    assert losses[POSITIVES].isnan().tolist() == [True, True, True]
    calm = salkernels.wla_contrast(x, POSITIVES, NEGATIVES & (torch.arange(4) != 2), 2,
                                   reduction="none")  # fmt: skip
    assert calm[POSITIVES].isnan().tolist() == [False, False, True]
    (grad,) = torch.autograd.grad(losses.sum(), x)
    windows = grad.isnan().any(dim=1)
    assert windows[:3, :2, :2].all()  # and 3 where it was chosen as the match of 2
    assert not windows[:, 2:].any()
    assert not windows[:, :, 2:].any()


def test_a_nan_that_no_loss_looks_at_gives_no_gradient():
    """A negative is NaN where no pixel of the key is valid: the pixels there take no part."""
    x = torch.randn(4, 3, 4, 4, dtype=F64)
    x[2, 1, 0, 1] = torch.nan
    x.requires_grad_()
    valid = torch.ones(4, 4, 4, dtype=torch.bool)
    valid[1, :2, :2] = False
    valid[3] = False
    positives = POSITIVES.clone()
    positives[1] = False
    loss = salkernels.wla_contrast(x, positives, NEGATIVES, 2, valid=valid)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 10.0, 1e4])
def test_temperatures_at_the_ends(tau):
    """The exponential of cos / τ overflows; the log-sum-exp does not."""
    x = maps(4, 3, 4, 5, dtype=F32)
    loss = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, tau)
    terms, present, _ = formula(x.double(), x.double(), POSITIVES, NEGATIVES, (2, 2), tau)
    torch.testing.assert_close(loss.double(), mean(terms, present), rtol=1e-3, atol=1e-4)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_sums_in_fp32(dtype):
    x, y = maps(4, 33, 4, 6, dtype=dtype), maps(4, 33, 4, 6, dtype=F32)

    def loss(x, keys=None):
        return salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, keys=keys)

    expected = loss(x)
    expected_grad = torch.autograd.grad(expected, x)[0]
    mixed = loss(x.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(x)
        grad = torch.autograd.grad(actual, x)[0]
        assert actual.dtype == F32
        assert actual.equal(expected)
        assert grad.equal(expected_grad)
        assert loss(x, y).equal(mixed)
    with pytest.raises(TypeError, match="must have one dtype"):
        loss(x, y)


def test_second_derivatives_are_an_error():
    x = maps(4, 3, 4, 5)
    loss = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        grad.square().sum().backward()


def test_a_second_derivative_through_the_negatives_alone_is_one_too():
    x = maps(4, 3, 4, 5)
    pairs = NEGATIVES.flatten().nonzero().squeeze(1)
    operator = torch.ops.salkernels.window_lse
    lse = operator(x[None], None, pairs, None, (2, 2), TAU, EPS, "reference")
    (grad,) = torch.autograd.grad(lse[lse.isfinite()].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        grad.sum().backward()


def test_batches_of_gradients():
    x = maps(4, 3, 4, 5)
    losses = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, reduction="none")[POSITIVES]
    rows = torch.eye(3, dtype=F64)
    (together,) = torch.autograd.grad(losses, x, rows, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(losses, x, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_keys_that_are_the_features_are_no_keys():
    x = maps(4, 3, 4, 5)
    expected = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2)
    loss = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, keys=x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])
    stopped = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, keys=x.detach())
    (grad,) = torch.autograd.grad(stopped, x)
    assert (grad[3] == 0).all()  # sample 3 is a key only
    assert (grad[0] != 0).any()


def test_scans_side_by_side_are_groups_for_the_matches_only():
    """Positives fall into blocks, whose samples the negatives cross."""
    x = maps(6, 5, 4, 4, dtype=F32)
    scan = torch.arange(3).repeat_interleave(2)
    positives = (scan[:, None] == scan) & ~torch.eye(6, dtype=torch.bool)
    negatives = scan[:, None] != scan
    loss = salkernels.wla_contrast(x, positives, negatives, 2)
    terms, present, _ = formula(x.double(), x.double(), positives, negatives, (2, 2), TAU)
    torch.testing.assert_close(loss.double(), mean(terms, present), rtol=1e-5, atol=1e-5)


def test_explain_names_who_computes_the_negatives():
    statuses = {status.name: status for status in salkernels.explain(torch.ones(2, 3, 4, 4), 2)}
    assert statuses["reference"].negatives == "reference"
    for name, status in statuses.items():
        own = hasattr(BACKENDS[name], "window_lse")
        assert status.negatives == (name if own else "reference")
        said = "negatives of wla_contrast: reference" in str(status)
        assert said == (status.available and not own)


def test_a_backend_without_the_operator_computes_the_matches(monkeypatch):
    calls = []

    class Half:
        status = staticmethod(lambda: None)
        why_not = staticmethod(lambda *_: None)
        match_backward = staticmethod(reference.match_backward)

        @staticmethod
        def match(*args):
            calls.append("match")
            return reference.match(*args)

    monkeypatch.setitem(BACKENDS, "half", Half)
    x = maps(4, 3, 4, 5)
    expected = salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, backend="reference")
    assert salkernels.wla_contrast(x, POSITIVES, NEGATIVES, 2, backend="half") == expected
    assert calls == ["match"]


def test_the_operator_has_no_sum_where_a_pixel_takes_no_part():
    x = torch.randn(1, 4, 3, 4, 4, dtype=F64)
    valid = torch.rand(1, 4, 4, 4) < 0.7
    x.masked_fill_(~valid[:, :, None], torch.nan)
    pairs = NEGATIVES.flatten().nonzero().squeeze(1)
    lse = torch.ops.salkernels.window_lse(x, None, pairs, valid, (4, 4), TAU, EPS, "reference")
    assert torch.equal(lse == -torch.inf, ~valid)
    assert lse[valid].isfinite().all()
