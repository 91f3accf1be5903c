"""The CUDA kernels as host code: all that the tests of a backend ask, and what only a kernel has.

`SALKERNELS_EMULATOR_SANITIZE=1` takes the build with the sanitizers, under which the last test
runs this file, test_pixels.py and sanitized_table.py; `SALKERNELS_EMULATOR_ORDER` permutes the
threads of a block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from against_reference import (
    EPS,
    SHAPE_NAMES,
    SHAPES,
    compare,
    features,
    maps,
    relative,
    some_pairs,
    valid_pixels,
)
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
from test_parity import test_pairwise, test_set, test_set_of_valid_pixels_with_any_penalty
from test_ties import (
    test_of_all_equal_keys_the_first_wins,
    test_the_first_nan_wins,
    test_the_gradient_goes_to_the_first_of_equals_only,
    test_the_second_best_place_is_row_by_row,
)
from test_valid import (
    test_a_pair_without_a_pixel_carries_no_weight,
    test_all_valid_is_as_without,
    test_any_mask_on_its_way_to_a_bool_counts,
    test_nobody_takes_part,
    test_what_an_invalid_pixel_holds_reaches_nobody,
)
from test_valid import test_pairwise as test_pairwise_of_valid_pixels

from salkernels import reference
from tools.host_cuda import kernels
from tools.host_cuda.kernels import HostKernels

__all__ = [
    "test_a_pair_without_a_pixel_carries_no_weight",
    "test_a_vector_at_eps_is_dead_and_one_above_is_alive",
    "test_all_dead",
    "test_all_valid_is_as_without",
    "test_any_mask_on_its_way_to_a_bool_counts",
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
    "test_nobody_takes_part",
    "test_of_all_equal_keys_the_first_wins",
    "test_one_channel_has_no_gradient",
    "test_pairwise",
    "test_pairwise_of_valid_pixels",
    "test_set",
    "test_set_of_valid_pixels_with_any_penalty",
    "test_the_first_nan_wins",
    "test_the_gradient_goes_to_the_first_of_equals_only",
    "test_the_second_best_place_is_row_by_row",
    "test_what_an_invalid_pixel_holds_reaches_nobody",
]

pytestmark = pytest.mark.usefixtures("host_kernels")  # which says what is missing
MANY = 1024  # pairs, room included, from which on both directions of one are streamed together


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_every_way_to_tile(shape, layout, host_kernels):
    query, key, window = features(shape, layout=layout)
    if query.shape[1] <= 100:
        compare(host_kernels, query, key, None, None, window)
    compare(host_kernels, query, key, some_pairs(query, key), None, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 7, 9)], ids=str)
def test_every_way_to_tile_in_other_dtypes(shape, dtype, host_kernels):
    query, key, window = features(shape, dtype=dtype)
    compare(host_kernels, query, key, some_pairs(query, key, 0.6), None, window)


@pytest.mark.parametrize("kind", [None, "some", "samples"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_both_directions_of_a_pair_by_one_block(dtype, kind, host_kernels):
    """The pairs (0, 1), (1, 0), (1, 2), (2, 0) and (2, 2): both directions, either, and itself."""
    query = maps(1, 3, 40, 12, 13, dtype=dtype)
    pairs = torch.tensor([1, 3, 5, 6, 8] + [-1] * MANY)
    valid = None if kind is None else valid_pixels(query, None, (12, 12), kind)
    compare(host_kernels, query, None, pairs, valid, (12, 12))


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_the_memory_of_each_architecture_suffices(architecture, step):
    """At the paper's 128 rows of 384 channels, a GPU with 99 KB stages one chunk at a time.

    Of every other channel the gradient has a layout of its own, so that threads write other pieces
    of a chunk than they read of the next.
    """
    query = maps(1, 32, 384 * step, 2, 2)[:, :, ::step]
    compare(HostKernels(architecture), query, None, some_pairs(query, None, 0.3), None, (2, 2))


def test_tf32_is_what_was_allowed_and_no_worse():
    kernels = HostKernels(allow_tf32=True)
    query = maps(1, 6, 128, 4, 8)
    arguments = (query, None, None, None, (2, 2), EPS)
    exact, rounded = (k.match(*arguments) for k in (reference, kernels))
    error = (exact.max_sim - rounded.max_sim).abs().max()
    assert 1e-7 < error < 2e-3, "one tf32 product holds 11 bits"
    saved = (torch.randn_like(exact.max_sim), *arguments[:4], *exact[1:], (2, 2), EPS)
    grads = [k.match_backward(*saved)[0] for k in (kernels, reference)]
    assert relative(*grads) < 2e-3


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 7)], ids=str)
def test_the_order_of_threads_changes_nothing(shape):
    query, key, window = features(shape)
    pairs = some_pairs(query, key, 0.6, left_over=1)
    grad_sim = torch.randn(len(pairs), *query.shape[3:])
    results = []
    for order in (0, -1, 7, 8):
        kernels = HostKernels(order=order)
        forward = kernels.match(query, key, pairs, None, window, EPS)
        backward = kernels.match_backward(
            grad_sim, query, key, pairs, None, *forward[1:], window, EPS
        )
        results.append([t for t in (*forward, *backward) if t is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [(3, 3), (18, 20)])
def test_among_equals_the_first_is_the_match(window, dtype, host_kernels):
    """Two vectors only, so that every window is full of ties, which lanes find apart."""
    choice = torch.randint(0, 2, (1, 3, 18, 20))
    query = (torch.eye(16, dtype=dtype)[:2] * 2)[choice].movedim(-1, 2)
    padded = torch.cat((torch.arange(9), torch.full((MANY,), -1)))
    for pairs, valid in product((None, padded), (None, torch.rand(1, 3, 18, 20) < 0.5)):
        arguments = (query, None, pairs, valid, window, EPS)
        expected, actual = (b.match(*arguments) for b in (reference, host_kernels))
        assert torch.equal(actual.argmax, expected.argmax)
        assert torch.equal(actual.max_sim, expected.max_sim)


@pytest.mark.parametrize(("window", "room"), [((3, 3), 0), ((12, 11), 0), ((12, 11), MANY)])
def test_a_pair_does_not_depend_on_its_neighbours(window, room, host_kernels):
    query = maps(1, 6, 36, 12, 11)
    pairs = some_pairs(query, None, 0.3)
    everything, some = (
        host_kernels.match(
            query, None, torch.cat((of, of.new_full((room,), -1))), None, window, EPS
        )
        for of in (torch.arange(36), pairs)
    )
    for whole, part in zip(everything[:3], some[:3], strict=True):
        assert torch.equal(whole[pairs], part[: len(pairs)])


def test_a_foreign_argmax_stays_inside_the_window(host_kernels):
    for window in ((2, 2), (12, 12), (16, 16)):
        query = maps(1, 2, 8, 16, 16)
        found = host_kernels.match(query, None, None, None, window, EPS)
        for argmax in (found.argmax + 200, found.argmax - 30):
            saved = (query, None, None, None, found.max_sim, argmax, found.norm, window, EPS)
            grad = host_kernels.match_backward(torch.ones_like(found.max_sim), *saved)[0]
            assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *product((torch.float32, torch.bfloat16, torch.float64), (torch.nan, torch.inf, 1e30)),
        (torch.float64, 1e200),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [(2, 2), (3, 9), (17, 18)])
def test_values_out_of_range_reach_what_they_touch_and_nothing_else(
    value, window, dtype, host_kernels
):
    """A norm that overflows is as lost as a NaN: in fp64 that takes more than 1e30."""
    query = maps(1, 5, 24, 17, 18, dtype=dtype)
    query[0, 1, 3, 5, 5] = value
    query[0, 2, :, 16, 17] = value
    table = torch.rand(1, 5, 5) < 0.6
    table[0, 1] = table[0, :, 1] = False
    table[0, 1, 2] = True
    table[0, 4] = table[0, :, 4] = False
    query[0, 4, 0, 0, 0] = value  # in no pair
    pairs = table.flatten().nonzero().squeeze(1)
    arguments = (query, None, pairs, None, window, EPS)
    expected, actual = (b.match(*arguments) for b in (reference, host_kernels))
    assert actual.max_sim.isnan().any() == (dtype != torch.float64 or value != 1e30)
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):  # not the norms
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)
    saved = (torch.randn_like(actual.max_sim), *arguments[:4], *actual[1:], window, EPS)
    expected, actual = (b.match_backward(*saved)[0] for b in (reference, host_kernels))
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=rtol, atol=1e-6)


@pytest.mark.slow
def test_under_the_address_and_undefined_behaviour_sanitizers(host_kernels):
    """In a process of its own, whose first library is the sanitizer's; threads in another order."""
    kernels.build(sanitize=True)
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
    chosen = "test_table or (every_way and not nchw) or (out_of_range and float32) or foreign"
    chosen += " or take_no_part or left_over or nothing or twice"
    # More samples than rows of a tile take ten seconds there, and show nothing new.
    chosen = f"({chosen}) and not (every_way and pixel)"
    here = Path(__file__)
    files = [__file__, *(str(here.with_name(n)) for n in ("test_pixels.py", "sanitized_table.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        [*command, "-k", chosen], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
