"""The modules hold settings and no state, and give what the functions give."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import salkernels

X, Y = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
EMBEDDINGS = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
POSITIVES = ~torch.eye(4, dtype=torch.bool)
IDS = torch.tensor([[0, 0, 1, 1], [1, 2, 1, 5], [9, 9, 8, 8]]).unbind()

MODULES = [
    salkernels.WLALoss((2, 3), reduction="none", eps=0.5, backend="reference"),
    salkernels.GPLoss(0.7),
    salkernels.SALLoss((2, 3), lambda_=0.5, t=0.6, temperature=0.7, eps=0.5, backend="reference"),
    salkernels.LALoss(reduction="sum", eps=0.5, backend="reference"),
    salkernels.WLASetLoss((2, 3), detach_keys=True, reduction="none", eps=0.5, backend="reference"),
]


def test_same_values_as_the_functions():
    wla, gp, sal, la, wla_set = MODULES
    assert torch.equal(
        wla(X, Y), salkernels.wla_loss(X, Y, (2, 3), reduction="none", eps=0.5, backend="reference")
    )
    assert torch.equal(gp(EMBEDDINGS, POSITIVES), salkernels.gp_loss(EMBEDDINGS, POSITIVES, 0.7))
    settings = {"lambda_": 0.5, "t": 0.6, "temperature": 0.7, "eps": 0.5, "backend": "reference"}
    expected = salkernels.sal_loss(X, EMBEDDINGS, *IDS, (2, 3), **settings)
    assert sal(X, EMBEDDINGS, *IDS) == expected
    how = {"eps": 0.5, "backend": "reference"}
    assert la(X, Y) == salkernels.la_loss(X, Y, reduction="sum", **how)
    pairs, valid = [(0, 1), (3, 2)], (torch.rand(4, 4, 6) < 0.8, None)
    query, held = X.clone().requires_grad_(), Y.clone().requires_grad_()
    ours = wla_set(query, pairs, keys=held, valid=valid)
    how |= {"keys": Y, "valid": valid, "reduction": "none"}
    assert torch.equal(ours, salkernels.wla_set_loss(X, pairs, (2, 3), **how))
    ours.sum().backward()
    assert held.grad is None


def test_the_whole_loss_moves_queries_alone_if_it_is_told_to():
    x = X.clone().requires_grad_()
    free = salkernels.SALLoss(2)(x, EMBEDDINGS, *IDS).la
    held = salkernels.SALLoss(2, detach_keys=True)(x, EMBEDDINGS, *IDS).la
    assert free == held
    table = salkernels.slice_pairs(*IDS, 0.35)
    expected = salkernels.wla_set_loss(x, table, 2, keys=X)
    grads = [torch.autograd.grad(loss, x)[0] for loss in (held, expected, free)]
    torch.testing.assert_close(grads[0], grads[1])
    assert not torch.allclose(grads[0], grads[2])


def test_each_setting_reaches_the_loss():
    base = salkernels.SALLoss(2)(X, EMBEDDINGS, *IDS).loss
    for change in ({"lambda_": 0.5}, {"t": 0.9}, {"temperature": 0.7}, {"eps": 5.0}):
        assert salkernels.SALLoss(2, **change)(X, EMBEDDINGS, *IDS).loss != base, change
    assert salkernels.SALLoss(1)(X, EMBEDDINGS, *IDS).loss != base


def test_defaults_are_those_of_the_functions():
    assert torch.equal(salkernels.WLALoss()(X, Y), salkernels.wla_loss(X, Y, 2))
    assert torch.equal(salkernels.LALoss()(X, Y), salkernels.la_loss(X, Y))
    assert torch.equal(
        salkernels.WLASetLoss()(X, POSITIVES), salkernels.wla_set_loss(X, POSITIVES, 2)
    )
    assert torch.equal(
        salkernels.GPLoss()(EMBEDDINGS, POSITIVES), salkernels.gp_loss(EMBEDDINGS, POSITIVES)
    )
    expected = salkernels.sal_loss(X, EMBEDDINGS, *IDS, 2)
    assert salkernels.SALLoss()(X, EMBEDDINGS, *IDS) == expected
    explicit = salkernels.sal_loss(
        X, EMBEDDINGS, *IDS, 2, lambda_=1.0, t=0.35, temperature=0.1, eps=1e-12
    )
    assert expected == explicit


def test_terms_have_names():
    terms = salkernels.SALLoss()(X, EMBEDDINGS, *IDS)
    assert terms._fields == ("loss", "gp", "la")
    assert torch.equal(terms.loss, terms.gp + terms.la)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_no_state(module):
    assert list(module.parameters()) == []
    assert list(module.buffers()) == []
    assert module.state_dict() == {}
    assert module.half().cpu().train() is module


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_copies_and_pickles(module):
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)


def test_repr_shows_the_settings():
    assert repr(MODULES[0]).startswith("WLALoss(window_size=(2, 3), reduction='none'")
    assert repr(MODULES[1]) == "GPLoss(temperature=0.7)"
    text = repr(MODULES[2])
    assert all(part in text for part in ("SALLoss(", "(2, 3)", "0.5", "t=0.6", "temperature=0.7"))
