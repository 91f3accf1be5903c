"""The CUDA kernels as host code: all that the tests of a backend ask, and what only a kernel has.

`SALKERNELS_EMULATOR_SANITIZE=1` takes the build with the sanitizers, under which the last test
runs this file once more; `SALKERNELS_EMULATOR_ORDER` permutes the threads of a block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from cases import CASES
from test_dtypes import (
    test_dtypes_of_what_comes_out,
    test_half_precision_is_fp32_math_on_the_same_values,
)
from test_edges import (
    test_a_vector_at_eps_is_dead_and_one_above_is_alive,
    test_all_dead,
    test_dead_vectors_get_no_gradient,
    test_default_eps_lets_small_features_through,
    test_empty_batch,
    test_empty_set,
    test_gradient_of_an_expanded_map_is_summed_over_its_copies,
    test_nan_in_a_sample_without_a_pair_reaches_nothing,
    test_nan_in_one_pair_of_a_batch,
    test_nan_reaches_its_pairs_and_no_other,
    test_no_pair_gives_zero_with_zero_gradient,
    test_one_channel_has_no_gradient,
)
from test_parity import test_pairwise, test_set
from test_ties import (
    test_of_all_equal_keys_the_first_wins,
    test_the_first_nan_wins,
    test_the_gradient_goes_to_the_first_of_equals_only,
    test_the_second_best_place_is_row_by_row,
)

from benchmarks import cuda_emulation
from benchmarks.cuda_emulation import HostKernels
from salkernels import reference

__all__ = [
    "test_a_vector_at_eps_is_dead_and_one_above_is_alive",
    "test_all_dead",
    "test_dead_vectors_get_no_gradient",
    "test_default_eps_lets_small_features_through",
    "test_dtypes_of_what_comes_out",
    "test_empty_batch",
    "test_empty_set",
    "test_gradient_of_an_expanded_map_is_summed_over_its_copies",
    "test_half_precision_is_fp32_math_on_the_same_values",
    "test_nan_in_a_sample_without_a_pair_reaches_nothing",
    "test_nan_in_one_pair_of_a_batch",
    "test_nan_reaches_its_pairs_and_no_other",
    "test_no_pair_gives_zero_with_zero_gradient",
    "test_of_all_equal_keys_the_first_wins",
    "test_one_channel_has_no_gradient",
    "test_pairwise",
    "test_set",
    "test_the_first_nan_wins",
    "test_the_gradient_goes_to_the_first_of_equals_only",
    "test_the_second_best_place_is_row_by_row",
]

EPS = 1e-12
SANITIZED = os.environ.get("SALKERNELS_EMULATOR_SANITIZE") == "1"

# Relative error of losses, maxima and gradients (as one vector), by dtype of the features.
TOLERANCES = {
    torch.float64: 1e-12,  # a few roundings of 2^-53 over some hundred products
    torch.float32: 1e-5,  # the same, of 2^-24
    torch.bfloat16: 5e-3,  # gradients are rounded to 2^-9; sums are fp32
    torch.float16: 1e-3,  # to 2^-12
}


def maps(*shape, dtype=torch.float32, layout="channels_last"):
    """(G, N, C, H, W)"""
    groups, samples, channels, height, width = shape
    if layout == "channels_last":
        return torch.randn(groups, samples, height, width, channels).to(dtype).movedim(-1, 2)
    return torch.randn(shape).to(dtype)


def relative(actual, expected):
    if actual is None or expected is None:
        assert actual is expected
        return 0.0
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def compare(kernels, query, key, mask, window, tolerance=None):
    """Forward and backward against the definition."""
    count = query.shape[0] * query.shape[1] * (query if key is None else key).shape[1]
    arguments = (query, key, mask, window, EPS, count if mask is None else int(mask.sum()))
    expected = reference.pair_losses_forward(*arguments)
    actual = kernels.pair_losses_forward(*arguments)
    tolerance = tolerance or TOLERANCES[query.dtype]
    assert relative(actual[0], expected[0]) < min(tolerance, 1e-5)
    assert relative(actual[2], expected[2]) < min(tolerance, 1e-5)
    # Random features tie to within rounding once in a long while.
    assert (actual[1] != expected[1]).sum() <= 1 + actual[1].numel() // 1000
    saved = (torch.randn_like(actual[0]), *arguments[:3], *actual[1:], window, EPS)
    grads = kernels.pair_losses_backward(*saved)
    for ours, theirs in zip(grads, reference.pair_losses_backward(*saved), strict=True):
        assert relative(ours, theirs) < tolerance
    return actual, grads


LARGE = [  # G, N, M (0: set form), C, H, W, window
    ((1, 9, 0, 40, 4, 8, (4, 4)), "two tiles of samples: 9 x 16 rows"),
    ((1, 23, 0, 36, 3, 7, (3, 4)), "three tiles, the last with one sample less"),
    ((2, 3, 5, 24, 6, 10, (5, 5)), "keys and queries differ, and groups"),
    ((2, 2, 7, 68, 9, 9, (8, 8)), "one query sample a tile, two tiles of keys"),
    ((40, 1, 1, 21, 2, 6, (2, 2)), "many windows of many groups in a block"),
    ((1, 2, 0, 8, 3, 200, (1, 2)), "more windows than a tile takes"),
    ((1, 130, 0, 4, 1, 2, (1, 1)), "more samples than rows of a tile, at one pixel"),
    ((1, 3, 0, 50, 12, 13, (12, 12)), "streamed, with a narrow edge window"),
    ((2, 2, 3, 16, 17, 19, (17, 16)), "streamed, with an index of int32"),
    ((1, 4, 0, 520, 2, 6, (2, 2)), "more channels than are staged at a time"),
]


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("shape", [row[0] for row in LARGE], ids=[row[1] for row in LARGE])
def test_every_way_to_tile(shape, layout, host_kernels):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, layout=layout)
    key = maps(groups, keys, channels, height, width, layout=layout) if keys else None
    mask = torch.rand(groups, queries, keys or queries) < 0.4
    if mask.numel() > 1000:  # the emulator takes its time
        if SANITIZED:
            pytest.skip("takes ten seconds under the sanitizers, which see nothing new in it")
        mask = mask.triu(-1) & mask.tril(1)
    else:
        compare(host_kernels, query, key, None, window)
    compare(host_kernels, query, key, mask, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [LARGE[i][0] for i in (0, 2, 7, 9)], ids=str)
def test_every_way_to_tile_in_other_dtypes(shape, dtype, host_kernels):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, dtype=dtype)
    key = maps(groups, keys, channels, height, width, dtype=dtype) if keys else None
    compare(host_kernels, query, key, torch.rand(groups, queries, keys or queries) < 0.6, window)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_the_memory_of_each_architecture_suffices(architecture, step):
    """At the paper's 128 rows of 384 channels, a GPU with 99 KB stages one chunk at a time.

    Of every other channel the gradient has a layout of its own, so that threads write other pieces
    of a chunk than they read of the next.
    """
    features = maps(1, 32, 384 * step, 2, 2)[:, :, ::step]
    mask = torch.rand(1, 32, 32) < 0.3
    compare(HostKernels(architecture), features, None, mask, (2, 2))


def test_tf32_is_what_was_allowed_and_no_worse():
    kernels = HostKernels(allow_tf32=True)
    query = maps(1, 6, 128, 4, 8)
    arguments = (query, None, None, (2, 2), EPS, 36)
    exact, rounded = (k.pair_losses_forward(*arguments) for k in (reference, kernels))
    error = (exact[2] - rounded[2]).abs().max()
    assert 1e-7 < error < 2e-3, "one tf32 product holds 11 bits"
    saved = (torch.randn(1, 6, 6), query, None, None, *exact[1:], (2, 2), EPS)
    grads = [k.pair_losses_backward(*saved)[0] for k in (kernels, reference)]
    assert relative(*grads) < 2e-3


@pytest.mark.parametrize("shape", [LARGE[i][0] for i in (0, 2, 7)], ids=str)
def test_the_order_of_threads_changes_nothing(shape):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width)
    key = maps(groups, keys, channels, height, width) if keys else None
    mask = torch.rand(groups, queries, keys or queries) < 0.6
    grad = torch.randn(mask.shape)
    results = []
    for order in (0, -1, 7, 8):
        kernels = HostKernels(order=order)
        forward = kernels.pair_losses_forward(query, key, mask, window, EPS, mask.numel())
        backward = kernels.pair_losses_backward(grad, query, key, mask, *forward[1:], window, EPS)
        results.append([t for t in (*forward, *backward) if t is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(3, 3), (18, 20)])
def test_among_equals_the_first_is_the_match(window, dtype, host_kernels):
    """Two vectors only, so that every window is full of ties, which lanes find apart."""
    choice = torch.randint(0, 2, (1, 3, 18, 20))
    query = (torch.eye(16, dtype=dtype)[:2] * 2)[choice].movedim(-1, 2)
    arguments = (query, None, None, window, EPS, 9)
    expected, actual = (b.pair_losses_forward(*arguments) for b in (reference, host_kernels))
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("window", [(3, 3), (12, 11)])
def test_a_pair_does_not_depend_on_its_neighbours(window, host_kernels):
    features, mask = maps(1, 6, 36, 12, 11), torch.rand(1, 6, 6) < 0.3
    everything, *_ = host_kernels.pair_losses_forward(features, None, None, window, EPS, 36)
    some, *_ = host_kernels.pair_losses_forward(features, None, mask, window, EPS, 36)
    assert torch.equal(some, everything * mask)


def test_capacity(host_kernels):
    """Rows beyond the pairs are cleared. Pairs beyond the rows get NaN: the host is not told."""
    features, mask = maps(1, 5, 8, 4, 4), torch.rand(1, 5, 5) < 0.5
    count = int(mask.sum())
    loss, argmax, max_sim = host_kernels.pair_losses_forward(
        features, None, mask, (2, 2), EPS, count + 3
    )
    assert loss.isfinite().all()
    assert not argmax[count:].any()
    assert not max_sim[count:].any()
    loss, argmax, max_sim = host_kernels.pair_losses_forward(
        features, None, mask, (2, 2), EPS, count - 2
    )
    assert loss[mask].isnan().tolist() == [False] * (count - 2) + [True] * 2


def test_a_foreign_argmax_stays_inside_the_window(host_kernels):
    for window in ((2, 2), (12, 12)):
        features = maps(1, 2, 8, 12, 12)
        loss, argmax, max_sim = host_kernels.pair_losses_forward(
            features, None, None, window, EPS, 4
        )
        saved = (torch.ones_like(loss), features, None, None, argmax + 200, max_sim, window, EPS)
        assert host_kernels.pair_losses_backward(*saved)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("window", [(2, 2), (3, 9), (17, 18)])
def test_values_out_of_range_reach_what_they_touch_and_nothing_else(value, window, host_kernels):
    query = maps(1, 5, 24, 17, 18)
    query[0, 1, 3, 5, 5] = value
    query[0, 2, :, 16, 17] = value
    mask = torch.rand(1, 5, 5) < 0.6
    mask[0, 1] = mask[0, :, 1] = False
    mask[0, 1, 2] = True
    mask[0, 4] = mask[0, :, 4] = False
    query[0, 4, 0, 0, 0] = value  # in no pair
    arguments = (query, None, mask, window, EPS, int(mask.sum()))
    expected, actual = (b.pair_losses_forward(*arguments) for b in (reference, host_kernels))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)
    saved = (torch.randn(1, 5, 5), query, None, mask, *actual[1:], window, EPS)
    expected, actual = (b.pair_losses_backward(*saved)[0] for b in (reference, host_kernels))
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not SANITIZED, reason="test_pairwise and test_set say more, but take longer")
@pytest.mark.parametrize("form", ["pairwise", "set"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_table(case, form, host_kernels):
    x, y = case.features().detach(), case.features(stream=1).detach()
    if form == "set":
        mask = case.pairs()[None]
        arguments = (x[None], None, mask, case.window, case.eps, case.samples**2)
    else:
        arguments = (x[:, None], y[:, None], None, case.window, case.eps, case.samples)
    actual, expected = (k.pair_losses_forward(*arguments) for k in (host_kernels, reference))
    value = max(TOLERANCES[case.dtype] * 0.1, 1e-12)
    for ours, theirs in ((actual[0], expected[0]), (actual[2], expected[2])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=min(value, 1e-6))
    saved = (torch.randn_like(actual[0]), *arguments[:3], *expected[1:], *arguments[3:5])
    for ours, theirs in zip(
        host_kernels.pair_losses_backward(*saved),
        reference.pair_losses_backward(*saved),
        strict=True,
    ):
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, rtol=TOLERANCES[case.dtype], atol=10 * TOLERANCES[case.dtype]
            )


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="these are the tests that it runs")
def test_under_the_address_and_undefined_behaviour_sanitizers(host_kernels):
    """In a process of its own, whose first library is the sanitizer's; threads in another order."""
    cuda_emulation.build(sanitize=True)
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    gxx = shutil.which("g++")
    libraries = [
        subprocess.run(
            [gxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "SALKERNELS_EMULATOR_SANITIZE": "1",
        "SALKERNELS_EMULATOR_ORDER": "5",
    }
    chosen = "test_table or (every_way and not nchw) or out_of_range or foreign or capacity"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-k", chosen], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
