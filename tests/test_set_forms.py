"""The forms of a set call: pairs as indices, keys of another set, gradients to the queries only.

Each against the pairwise losses, pair by pair.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import F64, lay_out
from targets import slow_in_the_interpreter
from torch.autograd import gradcheck

import salkernels

PAIRS = [(3, 1), (0, 4), (3, 1), (2, 0), (0, 2)]  # not ascending, and one of them twice
TABLE = torch.zeros(4, 5, dtype=torch.bool)
for query, key in PAIRS:
    TABLE[query, key] = True


def maps(samples, device="cpu", dtype=torch.float32, layout="contiguous", size=(5, 6)):
    x = torch.randn(samples, 7, *size, dtype=dtype).to(device)
    return lay_out(x, layout).requires_grad_()


def pair_by_pair(x, y, window, valid=None, pairs=PAIRS):
    """Losses (K,) by `wla_loss` on the reference, and which pairs have a pixel that takes part."""
    losses, taking_part = [], []
    for i, j in pairs:
        one = None if valid is None else (valid[0][i, None], valid[1][j, None])
        how = {"valid": one, "reduction": "none", "backend": "reference"}
        losses.append(salkernels.wla_loss(x[i, None], y[j, None], window, **how)[0])
        found = salkernels.align(x[i, None], y[j, None], window, valid=one, backend="reference")
        taking_part.append(bool((found.argmax >= 0).any()))
    return torch.stack(losses), torch.tensor(taking_part, device=x.device)


def assert_same(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    how = {"materialize_grads": True, "retain_graph": True}
    grads = [torch.autograd.grad(loss, leaves, **how) for loss in (ours, theirs)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "reduction",
    # The reduction is that of torch, whatever the backend: one suffices where a call takes seconds.
    ["mean", *(pytest.param(name, marks=slow_in_the_interpreter) for name in ("sum", "none"))],
)
@pytest.mark.parametrize("form", ["indices", "table", "weights"])
def test_queries_and_keys_of_two_sets(form, reduction, masked, backend, device):
    x, y = maps(4, device), maps(5, device, layout="channels_last")
    valid = None
    if masked:
        valid = tuple((torch.rand(len(z), 5, 6) < 0.7).to(device) for z in (x, y))
        valid[1][4] = False  # the pair (0, 4) has no key
    pairs = PAIRS if form == "indices" else TABLE.nonzero().tolist()
    losses, taking_part = pair_by_pair(x, y, (2, 3), valid, pairs)
    weights = torch.rand(4, 5)
    given = {"indices": torch.tensor(PAIRS), "table": TABLE, "weights": TABLE * weights}[form]
    share = torch.ones(len(pairs))
    if form == "weights":
        share = weights[TABLE]
    share = share.to(device)
    expected = {
        "mean": (share * losses).sum() / (share * taking_part).sum(),
        "sum": (share * losses).sum(),
        "none": losses.new_zeros(4, 5).index_put(TABLE.to(device).nonzero(as_tuple=True), losses)
        if form != "indices"
        else losses,
    }[reduction]
    ours = salkernels.wla_set_loss(
        x, given, (2, 3), keys=y, valid=valid, reduction=reduction, backend=backend
    )
    upstream = torch.rand(ours.shape, device=device)
    assert_same((ours * upstream).sum(), (expected * upstream).sum(), (x, y))


@pytest.mark.parametrize("masked", [False, True])
def test_detached_keys_get_no_gradient(masked, backend, device):
    x = maps(5, device)
    valid = (torch.rand(5, 5, 6) < 0.7).to(device) if masked else None
    both = None if valid is None else (valid, valid)
    losses, taking_part = pair_by_pair(x, x.detach(), 2, both)
    how = {"valid": valid, "backend": backend}
    ours = salkernels.wla_set_loss(x, PAIRS, 2, detach_keys=True, **how)
    assert_same(ours, losses.sum() / taking_part.sum(), (x,))
    torch.testing.assert_close(ours, salkernels.wla_set_loss(x, PAIRS, 2, **how))
    (grad,) = torch.autograd.grad(ours, x)
    assert (grad[[1, 4]] == 0).all()  # keys only
    assert (grad[[0, 2, 3]] != 0).any(dim=(1, 2, 3)).all()
    found = salkernels.align_set(x, PAIRS, 2, detach_keys=True, **how)
    again = ((1 - found.max_sim).abs().sum(dim=(1, 2))).sum()
    (other,) = torch.autograd.grad(again, x)
    assert (other[[1, 4]] == 0).all()


def test_detached_keys_of_another_set_keep_their_values():
    x, y = maps(4), maps(5)
    pairs = torch.tensor(PAIRS)
    free = salkernels.wla_set_loss(x, pairs, 2, keys=y)
    held = salkernels.wla_set_loss(x, pairs, 2, keys=y, detach_keys=True)
    assert torch.equal(free, held)
    grads = torch.autograd.grad(held, (x, y), allow_unused=True)
    assert grads[1] is None
    torch.testing.assert_close(grads[0], torch.autograd.grad(free, x)[0])


def test_matches_are_in_the_order_of_the_indices(backend, device):
    x, y = maps(4, device), maps(5, device)
    found = salkernels.align_set(x, torch.tensor(PAIRS), (2, 3), keys=y, backend=backend)
    query, key = (torch.tensor(side) for side in zip(*PAIRS, strict=True))
    expected = salkernels.align(x[query], y[key], (2, 3), backend="reference")
    torch.testing.assert_close(found.max_sim, expected.max_sim)
    assert torch.equal(found.argmax, expected.argmax)
    by_table = salkernels.align_set(x, TABLE.to(device), (2, 3), keys=y, backend=backend)
    order = [TABLE.nonzero().tolist().index(list(pair)) for pair in PAIRS]
    assert torch.equal(by_table.argmax[order], found.argmax)


@pytest.mark.parametrize("pairs", [PAIRS, sorted(set(PAIRS)), PAIRS[:1], []], ids=len)
def test_indices_whose_values_cannot_be_read(pairs, monkeypatch):
    """What happens on a GPU and in a compiled graph, where nothing may be counted."""
    x, y = maps(4, dtype=F64), maps(5, dtype=F64)
    given = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    settings = [{"reduction": r} for r in ("mean", "sum", "none")]
    expected = [salkernels.wla_set_loss(x, given, 2, keys=y, **how) for how in settings]
    monkeypatch.setattr("salkernels._pair_list.values_visible", lambda x: False)
    monkeypatch.setattr("salkernels.checks.values_visible", lambda x: False)
    valid = torch.ones(4, 5, 6, dtype=torch.bool), None
    for how, wanted in zip(settings, expected, strict=True):
        for masks in (None, valid):
            ours = salkernels.wla_set_loss(x, given, 2, keys=y, valid=masks, **how)
            assert ours.shape == wanted.shape
            assert_same(ours.sum(), wanted.sum(), (x, y))
    with pytest.raises(IndexError):
        salkernels.wla_set_loss(x, torch.tensor([[0, 5]]), 2, keys=y)


@pytest.mark.parametrize("form", ["indices", "table"])
@pytest.mark.parametrize("detach", [False, True])
def test_gradcheck(form, detach):
    x, y = maps(4, dtype=F64, size=(3, 4)), maps(5, dtype=F64, size=(3, 4))
    pairs = torch.tensor(PAIRS) if form == "indices" else TABLE

    def loss(x, y):
        return salkernels.wla_set_loss(
            x, pairs, (2, 3), keys=y, detach_keys=detach, reduction="none"
        )

    if detach:
        assert gradcheck(lambda x: loss(x, y), (x,))
    else:
        assert gradcheck(loss, (x, y))


@pytest.mark.parametrize("form", ["indices", "keys", "detached"])
def test_compiled_without_a_graph_break(form):
    x, y = maps(5), maps(5)
    given = torch.tensor(PAIRS)
    how = {
        "indices": {},
        "keys": {"keys": y, "valid": (torch.rand(5, 5, 6) < 0.8, None)},
        "detached": {"detach_keys": True},
    }[form]

    def loss(x, pairs):
        return salkernels.wla_set_loss(x, pairs, 2, **how)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, given), loss(x, given), (x,))


def test_autocast_and_second_derivatives_as_in_the_set_form():
    x, y = maps(4), maps(5)
    exact = salkernels.wla_set_loss(x, PAIRS, 2, keys=y.detach().bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = salkernels.wla_set_loss(x, PAIRS, 2, keys=y.detach().bfloat16())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact)
    (grad,) = torch.autograd.grad(exact, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "given",
    [PAIRS, [list(p) for p in PAIRS], np.array(PAIRS), torch.tensor(PAIRS, dtype=torch.uint8)],
    ids=lambda given: type(given).__name__,
)
def test_ways_to_write_indices(given):
    x, y = maps(4), maps(5)
    expected = pair_by_pair(x, y, 2)[0].mean()
    torch.testing.assert_close(salkernels.wla_set_loss(x, given, 2, keys=y), expected)


def test_ways_to_write_a_table():
    x = maps(3)
    table = [[False, True, False], [False, False, True], [False, False, False]]
    expected = salkernels.wla_set_loss(x, torch.tensor(table), 2)
    for given in (table, np.array(table), [[0.0, 1, 0], [0, 0, 1], [0, 0, 0]], [(0, 1), (1, 2)]):
        assert torch.equal(salkernels.wla_set_loss(x, given, 2), expected)
    assert salkernels.wla_set_loss(x, [], 2) == 0
    weighted = [[0.0, 3.0, 0], [0, 0, 1.0], [0, 0, 0]]
    losses = salkernels.wla_set_loss(x, table, 2, reduction="none")
    torch.testing.assert_close(
        salkernels.wla_set_loss(x, weighted, 2), (3 * losses[0, 1] + losses[1, 2]) / 4
    )


@pytest.mark.parametrize("masked", [False, True])
def test_sum_is_the_sum_of_none(masked):
    x, y = maps(4), maps(4)
    valid = torch.rand(4, 5, 6) < 0.7 if masked else None
    tables = ~torch.eye(4, dtype=torch.bool), torch.eye(4, dtype=torch.bool).roll(1, 1)
    calls = [
        lambda **how: salkernels.wla_loss(x, y, 2, valid=valid, **how),
        lambda **how: salkernels.la_loss(x, y, valid=valid, **how),
        lambda **how: salkernels.wla_contrast(
            x, tables[1], tables[0] & ~tables[1], 2, valid=valid, **how
        ),
    ]
    for call in calls:
        torch.testing.assert_close(call(reduction="sum"), call(reduction="none").sum())


@pytest.mark.parametrize("keys", [None, "other"])
def test_explicit_groups_with_keys(keys, monkeypatch):
    """Blocks of scans, as a GPU is given them, with keys of their own."""
    from salkernels._pair_list import PairList, count_blocks, regroup

    x, y = maps(6), maps(6)
    table = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()
    how = {"keys": y if keys else None, "detach_keys": True, "backend": "reference"}
    how["valid"] = (torch.rand(6, 5, 6) < 0.8, torch.rand(6, 5, 6) < 0.8)
    expected = salkernels.wla_set_loss(x, table, 2, **how)

    @classmethod
    def exactly(cls, found, samples, device, keys):
        groups = count_blocks(found, samples)
        assert groups == 2
        return cls(found, True, groups, regroup(found, samples, groups))

    monkeypatch.setattr(PairList, "exactly", exactly)
    torch.testing.assert_close(salkernels.wla_set_loss(x, table, 2, **how), expected)
