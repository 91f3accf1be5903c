"""What the backward is given by a forward, of this backend or another, and how it is cut."""

from __future__ import annotations

import ctypes

import pytest
import torch
from against_reference import (
    EPS,
    SHAPE_NAMES,
    SHAPES,
    TOLERANCES,
    compare,
    features,
    maps,
    relative,
    some_pairs,
    valid_pixels,
)

from salkernels.backends import triton
from tools.host_cuda.kernels import HostKernels

KINDS = [SHAPES[i] for i in (1, 2, 4, 7, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _call(kernels, shape, dtype=torch.float32, valid_kind=None):
    query, key, window = features(shape, dtype=dtype)
    pairs = some_pairs(query, key, 0.6, left_over=1)
    valid = None if valid_kind is None else valid_pixels(query, key, window, valid_kind)
    found = kernels.match(query, key, pairs, valid, window, EPS)
    return (query, key, pairs, valid), found, window


def terms_norm(grad_sim, query):
    """What the gradient of a sample's match with itself cancels from: see `compare`."""
    return float(grad_sim.norm()) / query.shape[2] ** 0.5


@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_outputs_lie_as_those_of_triton(shape, host_kernels):
    (query, key, pairs, _), found, window = _call(host_kernels, shape)
    planned = triton.outputs(query, key, pairs, window)
    for ours, theirs in zip(found, planned, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            theirs.shape,
            theirs.dtype,
            theirs.stride(),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_the_layout_of_what_was_kept_changes_no_bit(shape, dtype, host_kernels):
    call, found, window = _call(host_kernels, shape, dtype, "some")
    grad_sim = torch.randn_like(found.max_sim)
    kept = [found.max_sim, found.argmax, found.norm]
    results = []
    for lay_out in (lambda x: x, torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT):
        saved = [lay_out(x) for x in kept]
        grads = host_kernels.match_backward(lay_out(grad_sim), *call, *saved, window, EPS)
        results.append([g for g in grads if g is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "some", "samples"])
@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_the_backward_finds_the_norms_if_none_were_kept(shape, kind, dtype, host_kernels):
    call, found, window = _call(host_kernels, shape, dtype, kind)
    grad_sim = torch.randn_like(found.max_sim)
    grads = [
        host_kernels.match_backward(grad_sim, *call, *found[1:3], norm, window, EPS)
        for norm in (found.norm, found.norm.new_empty(0))
    ]
    least = terms_norm(grad_sim, call[0])
    for ours, theirs in zip(*grads, strict=True):
        assert (
            ours is theirs is None or relative(ours, theirs, least) < TOLERANCES[dtype].relative_l2
        )


def test_the_kept_norms_are_what_is_used(host_kernels):
    call, found, window = _call(host_kernels, SHAPES[1])
    grad_sim = torch.ones_like(found.max_sim)
    twice = [
        host_kernels.match_backward(grad_sim, *call, *found[1:3], norm, window, EPS)[0]
        for norm in (found.norm, found.norm * 2)
    ]
    assert not torch.allclose(*twice)


@pytest.mark.parametrize("kilobytes", [2, 16, 48])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_with_less_shared_memory_the_gradient_is_the_same(shape, kilobytes, host_kernels):
    """Rows gathered from memory, narrower slices, and counts in memory."""
    small = HostKernels()
    small.shared_limit = kilobytes << 10
    for dtype in DTYPES if shape[1] < 100 else DTYPES[:1]:
        call, found, window = _call(host_kernels, shape, dtype, "some")
        grad_sim = torch.randn_like(found.max_sim)
        whole, part = (
            kernels.match_backward(grad_sim, *call, *found[1:], window, EPS)
            for kernels in (host_kernels, small)
        )
        least = terms_norm(grad_sim, call[0])
        for ours, theirs in zip(part, whole, strict=True):
            assert (
                ours is theirs is None
                or relative(ours, theirs, least) < TOLERANCES[dtype].relative_l2
            )


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_blocks_of_products_that_no_pair_needs_are_skipped_and_no_other(share, host_kernels):
    """32 samples of 4 pixels are a full tile, of which few or all blocks are needed."""
    query = maps(1, 32, 20, 2, 2)
    for dtype in DTYPES:
        compare(host_kernels, query.to(dtype), None, some_pairs(query, None, share), None, (2, 2))


def test_a_float_is_the_sum_of_two_tf32(host_kernels):
    """All that the tensor core drops of `low`, it truncates to 11 bits, is below 2^-22 of x; and
    nothing points to one side: over many sums that would show."""
    split = host_kernels.library.emulator_split
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator) * 2.0 ** torch.randint(-40, 40, (20000,))
    edges = [1.0, -1.0, 1 + 2**-23, 1 + 2**-11, 1 + 2**-10 - 2**-23, 1.5, 2 - 2**-23, 0.0]
    x = torch.cat((x, torch.tensor(edges)))
    parts = torch.empty(2, len(x), dtype=torch.int32)
    split(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(parts.data_ptr()), ctypes.c_int64(len(x)))
    high, low = parts
    assert not (high & 0x1FFF).any(), "a tf32 whole"
    high = high.view(torch.float32).double()
    exact = low.view(torch.float32).double()
    assert torch.equal(high + exact, x.double()), "what is left is left exactly"
    seen = (low & ~0x1FFF).view(torch.float32).double()
    error = high + seen - x.double()
    assert (error.abs() <= 2.0**-22 * x.double().abs()).all()
    lean = (error / x.double().where(x != 0, 1)).mean().abs()
    assert lean < 2.0**-26, "errors of either sign are as frequent"
