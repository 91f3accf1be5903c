"""The Triton backend against the definition, both passes; and inputs for it."""

from __future__ import annotations

import pytest
import torch
from cases import F32, lay_out
from targets import runs_on
from tolerances import TOLERANCES

from salkernels import reference
from salkernels.backends import triton as backend
from salkernels.triton_kernels import config
from salkernels.triton_kernels.config import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-12
runs = runs_on("triton", DEVICE)


def compare(query, key, pairs, window, valid=None, grad_sim=None, dtype=torch.float64):
    """Both passes against the definition in a dtype; returns the outputs and the gradients."""
    found = backend.match(query, key, pairs, valid, window, EPS)
    wide = [None if x is None else x.to(dtype) for x in (query, key)]
    expected = reference.match(*wide, pairs, valid, window, EPS)
    tolerance = TOLERANCES[query.dtype]
    close(found.loss, expected.loss.double(), tolerance.value)
    close(found.max_sim, expected.max_sim.double(), tolerance.similarity)
    assert torch.equal(found.argmax, expected.argmax)
    if grad_sim is None:
        grad_sim = torch.randn(found.max_sim.shape, device=query.device)
    call = (pairs, valid, *found[1:], window, EPS)
    grads = backend.match_backward(grad_sim, query, key, *call)
    call = (pairs, valid, *expected[1:], window, EPS)
    wanted = reference.match_backward(grad_sim, *wide, *call)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert ours.dtype == query.dtype
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
        error = (ours - theirs).norm()
        assert error <= tolerance.relative_l2 * theirs.norm(), float(error / theirs.norm())
    return found, grads


def close(actual, expected, atol):
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0, equal_nan=True)


def maps(*shape, dtype=F32, layout="contiguous"):
    groups, samples, *rest = shape
    x = torch.randn(groups * samples, *rest, device=DEVICE).to(dtype)
    return lay_out(x, layout).unflatten(0, (groups, samples))


def listed(mask, room=0):
    """The list of the pairs in a mask (G, N, M), and rows that are left over."""
    pairs = mask.flatten().nonzero().squeeze(1)
    return torch.cat([pairs, pairs.new_full((room,), -1)])


def some_pairs(groups, queries, keys, density=0.5, room=0):
    return listed(torch.rand(groups, queries, keys, device=DEVICE) < density, room)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 rows: few samples fill several."""
    tile = Tile(32, 16, 4, 1)
    for key in list(config.TABLE):
        monkeypatch.setitem(config.TABLE, key, tile)
    monkeypatch.setattr(config, "OVERRIDES", {})
    monkeypatch.setattr(config, "INTERPRETER", tile)
