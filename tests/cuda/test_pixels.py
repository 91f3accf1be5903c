"""What takes part: valid pixels, pairs against room left over, and gradients of any kind."""

from __future__ import annotations

import pytest
import torch
from against_reference import (
    EPS,
    SHAPE_NAMES,
    SHAPES,
    VALID,
    compare,
    features,
    maps,
    some_pairs,
    spoil,
    valid_pixels,
)

from salkernels import reference
from salkernels.backends import cuda
from tools.host_cuda.kernels import TAKE, HostKernels

# One of each: tiles of all samples, of some, several windows, streamed by bytes and by int32.
REGIMES = [SHAPES[i] for i in (9, 1, 2, 3, 4, 7, 8)]


@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_pixels_that_are_not_valid_take_no_part(shape, kind, host_kernels):
    query, key, window = features(shape)
    valid = valid_pixels(query, key, window, kind)
    compare(host_kernels, query, key, some_pairs(query, key, left_over=2), valid, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", VALID[:3])
@pytest.mark.parametrize("shape", REGIMES, ids=str)
def test_valid_pixels_in_other_dtypes(shape, kind, dtype, host_kernels):
    query, key, window = features(shape, dtype=dtype, layout="nchw")
    valid = valid_pixels(query, key, window, kind)
    compare(host_kernels, query, key, None, valid, window)


@pytest.mark.parametrize("shape", REGIMES, ids=str)
def test_all_valid_is_the_same_as_none_named(shape, host_kernels):
    query, key, window = features(shape)
    valid = valid_pixels(query, key, window, "none").logical_not()
    # Whatever a byte holds that is not 0 is True.
    for named in (valid, torch.full(valid.shape, 2, dtype=torch.uint8).view(torch.bool)):
        results = []
        for of in (None, named):
            found = host_kernels.match(query, key, None, of, window, EPS)
            saved = (query, key, None, of, *found[1:], window, EPS)
            grads = host_kernels.match_backward(torch.ones_like(found.max_sim), *saved)
            results.append([t for t in (*found, *grads) if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", REGIMES, ids=str)
def test_what_is_not_valid_changes_no_bit(shape, host_kernels):
    """Nor does the gradient of a maximum that there is none of."""
    query, key, window = features(shape)
    valid = valid_pixels(query, key, window, "some")
    pairs = some_pairs(query, key, 0.6)
    results = []
    for x, y in ((query, key), spoil(query, key, valid)):
        found = host_kernels.match(x, y, pairs, valid, window, EPS)
        grad_sim = torch.linspace(-1, 1, found.max_sim.numel()).view_as(found.max_sim)
        if x is not query:
            absent = found.argmax == reference.no_match(found.argmax.dtype)
            assert absent.any()
            assert (found.max_sim[absent] == 1).all()
            grad_sim[absent] = torch.nan
        saved = (grad_sim, x, y, pairs, valid, *found[1:], window, EPS)
        grads = host_kernels.match_backward(*saved)
        results.append([t for t in (*found, *grads) if t is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", REGIMES, ids=str)
def test_any_gradient_of_the_maxima(shape, dtype, host_kernels):
    query, key, window = features(shape, dtype=dtype)
    pairs = some_pairs(query, key, 0.6)
    plane = (len(pairs), *query.shape[3:])
    zero = torch.zeros(plane, dtype=dtype)
    _, grads = compare(host_kernels, query, key, pairs, None, window, zero)
    assert not any(g.count_nonzero() for g in grads if g is not None)
    some = torch.where(torch.rand(plane) < 0.1, torch.randn(plane, dtype=dtype) * 1e3, 0)
    lost = some.clone()
    lost[0, 0, 0] = torch.nan
    _, grads = compare(host_kernels, query, key, pairs, None, window, lost)
    rows = sum(int(g.isnan().any(dim=2).sum()) for g in grads if g is not None)
    assert 1 <= rows <= 2, "the query, and the key that it chose, which may be one row"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(2, 2), (10, 13)])
def test_the_backend_gives_the_operators_what_they_take(window, dtype, host_kernels, monkeypatch):
    """The module that a GPU runs, on the host's operators: gradients of any strides and dtype."""
    monkeypatch.setattr(cuda, "_require", lambda *_: None)
    for name in ("match", "match_backward"):
        operator = getattr(torch.ops.salkernels_emulator, f"native_{name}").default
        monkeypatch.setattr(cuda, f"_{name}", operator)
    query, key = (maps(2, n, 16, 10, 13, dtype=dtype) for n in (3, 2))
    pairs = some_pairs(query, key, 0.7)
    plane = (len(pairs), 10, 13)
    for grad_sim in (
        torch.randn(plane).mT.contiguous().mT,
        torch.randn(plane, dtype=torch.float64)[:, ::2].repeat_interleave(2, 1),
        torch.randn(1, 1, 1).expand(plane),
        torch.ones(plane, dtype=torch.bfloat16),
    ):
        compare(cuda, query, key, pairs, None, window, grad_sim)


@pytest.mark.parametrize("shape", REGIMES, ids=str)
def test_room_that_is_left_over_is_filled(shape, host_kernels):
    query, key, window = features(shape)
    pairs = some_pairs(query, key)
    table = query.shape[0] * query.shape[1] * (query if key is None else key).shape[1]
    found = host_kernels.match(query, key, pairs, None, window, EPS)
    saved = (query, key, None, *found[1:], window, EPS)
    grads = host_kernels.match_backward(
        torch.ones_like(found.max_sim), *saved[:2], pairs, *saved[2:]
    )
    # More room than there are pairs in all, and places that are none.
    rest = torch.tensor([-1, table, table + 7, -9, 2**40] + [-1] * table)
    more = torch.cat((pairs, rest))
    full = host_kernels.match(query, key, more, None, window, EPS)
    for whole, part in zip(full[:3], found[:3], strict=True):
        assert torch.equal(whole[: len(pairs)], part)
    assert not full.loss[len(pairs) :].count_nonzero()
    assert (full.max_sim[len(pairs) :] == 1).all()
    assert (full.argmax[len(pairs) :] == reference.no_match(full.argmax.dtype)).all()
    grad_sim = torch.ones_like(full.max_sim)
    grad_sim[len(pairs) :] = torch.nan
    again = host_kernels.match_backward(grad_sim, query, key, more, None, *full[1:], window, EPS)
    for ours, theirs in zip(again, grads, strict=True):
        assert ours is theirs or torch.equal(ours, theirs)


def test_a_pair_that_is_named_twice_leaves_no_row_unwritten(host_kernels):
    query = maps(1, 3, 8, 4, 4)
    found = host_kernels.match(query, None, torch.tensor([1, 1, 5]), None, (2, 2), EPS)
    assert found.max_sim.isfinite().all()
    assert found.loss.isfinite().all()
    assert found.loss[2] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(2, 2), (6, 7), (18, 18)])
@pytest.mark.parametrize("counts", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 3, 3), (0, 3, None)])
def test_where_there_is_nothing(counts, window, dtype, host_kernels):
    """No groups, no queries, no keys, or no pair; with room for pairs and without."""
    groups, queries, keys = counts
    query = maps(groups, queries, 5, 18, 19, dtype=dtype)
    key = None if keys is None else maps(groups, keys, 5, 18, 19, dtype=dtype)
    for room in (0, 3):
        pairs = torch.full((room,), -1)
        found = host_kernels.match(query, key, pairs, None, window, EPS)
        assert [len(x) for x in found[:3]] == [room] * 3
        assert found.loss.tolist() == [0] * room
        assert (found.max_sim == 1).all()
        assert (found.argmax == reference.no_match(found.argmax.dtype)).all()
        saved = (query, key, pairs, None, *found[1:], window, EPS)
        grads = host_kernels.match_backward(torch.full_like(found.max_sim, torch.nan), *saved)
        for grad, x in zip(grads, (query, key), strict=True):
            assert (grad is None) == (x is None)
            assert x is None or (grad.shape == x.shape and not grad.count_nonzero())
    if 0 in counts:
        compare(host_kernels, query, key, None, None, window)


def test_arguments_that_do_not_fit_are_refused_before_a_kernel_sees_them(host_kernels):
    query, key = maps(2, 3, 8, 4, 4), maps(2, 2, 8, 4, 4)
    valid = torch.ones(2, 5, 4, 4, dtype=torch.bool)
    found = host_kernels.match(query, key, None, valid, (2, 2), EPS)

    def refused(message, **other):
        arguments = {"query": query, "key": key, "pairs": None, "valid": valid, **other}
        with pytest.raises(RuntimeError, match=message):
            host_kernels.match(**arguments, window=(2, 2), eps=EPS)

    refused("valid must be", valid=valid[:, :3].contiguous())
    refused("valid must be", key=None)
    refused("valid must be bool", valid=valid.float())
    refused("pairs must be", pairs=torch.zeros(3, dtype=torch.int32))
    refused("share a dtype", key=key.half())
    refused("features must be", query=query.int(), key=key.int())
    saved = (query, key, None, valid, *found[1:], (2, 2), EPS)
    with pytest.raises(RuntimeError, match=r"must be \(pairs, H, W\)"):
        host_kernels.match_backward(found.max_sim[1:], *saved)
    with pytest.raises(RuntimeError, match="norm must be empty or"):
        host_kernels.match_backward(found.max_sim, *saved[:6], found.norm[1:], (2, 2), EPS)


def test_launches(host_kernels):
    """As few as they can be; the outputs of a launch that was taken are whatever they were."""
    names = []

    class Recorded(HostKernels):
        _take = TAKE(lambda name, *_: names.append(name.decode()) or 0)

    kernels, query = Recorded(), maps(1, 4, 8, 4, 4)
    valid = torch.ones(1, 4, 4, 4, dtype=torch.bool)
    for pairs in (None, torch.tensor([1, 2, 4, 8])):
        found = kernels.match(query, None, pairs, valid, (2, 2), EPS)
        kernels.match_backward(found.max_sim, query, None, pairs, valid, *found[1:], (2, 2), EPS)
    once = ["match_fp32", "reduce_losses_f32", "sort_pairs", "list_terms_f32", "gradient_rows_fp32"]
    assert names == [f"salkernels_{name}" for name in once * 2]
    names.clear()
    query = query.bfloat16()
    kernels.match_backward(found.max_sim, query, None, pairs, valid, *found[1:], (2, 2), EPS)
    assert names == ["salkernels_sort_pairs", "salkernels_gradient_tile_bf16"]


def test_a_library_without_a_driver_says_so(host_kernels):
    assert host_kernels.library.salkernels_driver_version() == 0
