"""The C++ kernel against the definition in `salkernels.reference`, on all it may be given."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import salkernels
from salkernels import reference
from salkernels.backends import cpu
from salkernels.library import pair_losses, pair_losses_backward

pytestmark = pytest.mark.skipif(
    cpu.status() is not None, reason=f"the C++ kernel cannot run: {cpu.status()}"
)
EPS = 1e-12

# Relative error of losses, maxima and gradients (as one vector), by dtype of the features.
TOLERANCES = {
    torch.float64: 1e-12,  # a few roundings of 2^-53 over some hundred products
    torch.float32: 1e-5,  # the same, of 2^-24
    torch.bfloat16: 5e-3,  # gradients are rounded to 2^-9; sums are fp32
    torch.float16: 1e-3,  # to 2^-12
}
SHAPES = [  # H, W, window
    ((6, 6), (2, 2)),
    ((7, 9), (2, 3)),  # narrow and short edge windows
    ((5, 4), (1, 1)),
    ((13, 11), (3, 3)),
    ((9, 9), (5, 5)),
    ((12, 12), (6, 6)),
    ((4, 48), (2, 2)),  # more windows than vector lanes
    ((8, 33), (8, 8)),  # 64 pixels: the largest window that is not blocked
    ((12, 20), (12, 20)),  # one window, blocked
    ((20, 18), (18, 17)),  # streamed, index of int32
]
LAYOUTS = ("nchw", "channels_last", "every_other", "transposed")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nchw") -> Tensor:
    """(G, N, C, H, W) features in the given memory layout."""
    groups, samples, channels, height, width = shape
    if layout == "channels_last":
        return torch.randn(groups, samples, height, width, channels).to(dtype).movedim(-1, 2)
    if layout == "every_other":
        wide = torch.randn(groups, samples, 2 * channels, height, 2 * width).to(dtype)
        return wide[:, :, ::2, :, ::2]
    if layout == "transposed":
        return torch.randn(groups, samples, channels, width, height).to(dtype).transpose(3, 4)
    return torch.randn(shape).to(dtype)


def _count(query: Tensor, key: Tensor | None, mask: Tensor | None) -> int:
    if mask is not None:
        return int(mask.sum())
    return query.shape[0] * query.shape[1] * (query if key is None else key).shape[1]


def _relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _compare(query: Tensor, key: Tensor | None, mask: Tensor | None, window: tuple[int, int]):
    tolerance = TOLERANCES[query.dtype]
    arguments = (query, key, mask, window, EPS, _count(query, key, mask))
    expected = reference.pair_losses_forward(*arguments)
    actual = cpu.pair_losses_forward(*arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    wide_tolerance = min(tolerance, 1e-5)  # the forward is fp32 at least, whatever the input
    assert _relative(actual[0], expected[0]) < wide_tolerance
    assert _relative(actual[2], expected[2]) < wide_tolerance
    # Random features tie to within rounding once in a long while.
    assert (actual[1] != expected[1]).sum() <= 1 + actual[1].numel() // 1000

    grad = torch.randn_like(actual[0])
    saved = (grad, query, key, mask, actual[1], actual[2], window, EPS)
    for ours, theirs in zip(
        cpu.pair_losses_backward(*saved), reference.pair_losses_backward(*saved), strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.shape, ours.dtype, ours.stride()) == (
                theirs.shape,
                theirs.dtype,
                theirs.stride(),
            )
            assert _relative(ours, theirs) < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("extent", "window"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parity(dtype, extent, window, layout):
    for channels in (5, 48):
        query = _maps((2, 3, channels, *extent), dtype, layout)
        key = _maps((2, 4, channels, *extent), dtype, layout)
        mask = torch.rand(2, 3, 4) < 0.4
        _compare(query, key, mask, window)
        _compare(query, key, None, window)
        _compare(query, None, torch.rand(2, 3, 3) < 0.5, window)
        _compare(query, None, None, window)


def test_mixed_layouts_of_query_and_key():
    query = _maps((2, 3, 20, 6, 8), torch.float32, "channels_last")
    key = _maps((2, 4, 20, 6, 8), torch.float32, "nchw")
    _compare(query, key, None, (2, 2))


def test_expanded_input():
    query = torch.randn(1, 3, 20, 6, 8).expand(2, -1, -1, -1, -1)
    _compare(query, None, None, (2, 2))


@pytest.mark.parametrize("window", [(2, 2), (16, 17)])
def test_pairwise(window):
    query, key = torch.randn(2, 5, 1, 33, 17, 18)
    _compare(query, key, None, window)


def test_a_window_too_large_for_a_tile_but_not_alone():
    """Streamed for its bytes, not for its pixels; blocks of keys end inside rows of the map."""
    features = torch.randn(1, 3, 300, 27, 41)
    _compare(features, None, torch.rand(1, 3, 3) < 0.7, (27, 41))
    _compare(features[:, :2], features[:, 1:], None, (27, 40))


@pytest.mark.parametrize("set_form", [True, False])
def test_mask_with_empty_rows_columns_and_groups(set_form):
    mask = torch.zeros(3, 6, 6, dtype=torch.bool)
    mask[0, 1, 4] = mask[0, 4, 1] = mask[0, 1, 1] = mask[0, 5, 3] = True
    mask[2, 0, 5] = True
    query = torch.randn(3, 6, 18, 5, 7)
    _compare(query, None if set_form else torch.randn_like(query), mask, (2, 2))
    _compare(query, None, mask.transpose(1, 2), (2, 2))


def test_no_pair_at_all():
    query, mask = torch.randn(2, 3, 8, 4, 4), torch.zeros(2, 3, 3, dtype=torch.bool)
    loss, argmax, max_sim = cpu.pair_losses_forward(query, None, mask, (2, 2), EPS, 0)
    assert not loss.any()
    assert argmax.shape == max_sim.shape == (0, 4, 4)
    grad, _ = cpu.pair_losses_backward(
        torch.ones(2, 3, 3), query, None, mask, argmax, max_sim, (2, 2), EPS
    )
    assert not grad.any()


def test_empty_batch():
    query = torch.randn(0, 1, 8, 4, 4)
    loss, argmax, max_sim = cpu.pair_losses_forward(query, query, None, (2, 2), EPS, 0)
    assert loss.shape == (0, 1, 1)
    grads = cpu.pair_losses_backward(loss, query, query, None, argmax, max_sim, (2, 2), EPS)
    assert [g.shape for g in grads] == [query.shape, query.shape]


def test_capacity_beyond_the_pairs_is_zero_and_below_is_an_error():
    query, mask = torch.randn(1, 3, 8, 4, 4), torch.eye(3, dtype=torch.bool)[None].roll(1, 2)
    _, argmax, max_sim = cpu.pair_losses_forward(query, None, mask, (2, 2), EPS, 7)
    assert argmax.shape == max_sim.shape == (7, 4, 4)
    assert not argmax[3:].any()
    assert not max_sim[3:].any()
    with pytest.raises(ValueError, match="holds 3 pairs, but capacity is 2"):
        cpu.pair_losses_forward(query, None, mask, (2, 2), EPS, 2)


@pytest.mark.parametrize("window", [(2, 2), (3, 3), (18, 20)])
def test_among_equals_the_first_is_the_match(window):
    """Two vectors only, so that every window is full of ties; all but the index is exact."""
    choice = torch.randint(0, 2, (2, 3, 18, 20))
    vectors = torch.eye(16)[:2] * 2
    query = vectors[choice].movedim(-1, 2)  # (G, N, C, H, W)
    arguments = (query, None, None, window, EPS, 18)
    expected, actual = (b.pair_losses_forward(*arguments) for b in (reference, cpu))
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("window", [(2, 2), (17, 18)])
def test_values_out_of_range_reach_what_they_touch_and_nothing_else(value, window):
    query = torch.randn(2, 4, 24, 17, 18)
    query[0, 1, 3, 5, 5] = value
    query[1, 2, :, 16, 17] = value
    mask = torch.rand(2, 4, 4) < 0.6
    mask[0, 1] = mask[0, :, 1] = False
    mask[0, 1, 2] = True
    mask[1, 3] = mask[1, :, 3] = False
    query[1, 3, 0, 0, 0] = value  # in no pair
    arguments = (query, None, mask, window, EPS, int(mask.sum()))
    expected, actual = (b.pair_losses_forward(*arguments) for b in (reference, cpu))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    saved = (torch.randn(2, 4, 4), query, None, mask, *actual[1:], window, EPS)
    expected, actual = (b.pair_losses_backward(*saved)[0] for b in (reference, cpu))
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1e-40])
@pytest.mark.parametrize("window", [(2, 2), (17, 18)])
def test_vectors_at_or_below_eps(eps, window):
    query = torch.randn(1, 4, 24, 17, 18)
    query[0, 0, :, :4] = 0
    query[0, 1, :, 3:6] *= 1e-13
    query[0, 2, :, :, 2] *= 1e-3
    arguments = (query, None, None, window, eps, 16)
    expected, actual = (b.pair_losses_forward(*arguments) for b in (reference, cpu))
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-6)
    saved = (torch.randn(1, 4, 4), query, None, None, *actual[1:], window, eps)
    expected, actual = (b.pair_losses_backward(*saved)[0] for b in (reference, cpu))
    norm = query.norm(dim=2, keepdim=True)
    assert not actual[(norm <= eps).expand_as(actual)].any()
    torch.testing.assert_close(actual * norm, expected * norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window", [2, (3, 2), (7, 6)])
def test_gradcheck(window):
    features = torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    pairs = torch.rand(3, 3, dtype=torch.float64) * (torch.rand(3, 3) < 0.7)
    assert torch.autograd.gradcheck(
        lambda x: salkernels.wla_set_loss(x, pairs, window, backend="cpu"), features
    )
    other = torch.randn_like(features).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: salkernels.wla_loss(x, y, window, reduction="none", backend="cpu"),
        (features, other),
    )


@pytest.mark.parametrize("set_form", [True, False])
def test_opcheck(set_form):
    query = torch.randn(2, 3, 8, 5, 6, requires_grad=True)
    key = None if set_form else torch.randn(2, 3, 8, 5, 6, requires_grad=True)
    mask = torch.rand(2, 3, 3) < 0.6
    arguments = (query, key, mask, [2, 2], EPS, 18, "cpu")
    torch.library.opcheck(pair_losses, arguments)
    with torch.no_grad():
        loss, *kept = pair_losses(*arguments)
    query, key = query.detach(), None if key is None else key.detach()
    torch.library.opcheck(pair_losses_backward, (loss, query, key, mask, *kept, [2, 2], EPS, "cpu"))


def test_compile():
    features = torch.randn(4, 16, 6, 8, requires_grad=True)
    pairs = torch.rand(4, 4) < 0.6

    def loss_of(x: Tensor) -> Tensor:
        return salkernels.wla_set_loss(x * 2, pairs, 2, backend="cpu")

    (eager,) = torch.autograd.grad(loss_of(features), features)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (graphed,) = torch.autograd.grad(compiled(features), features)
    assert torch.equal(eager, graphed)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (30, 32)])
def test_the_same_bits_whatever_the_number_of_threads(window, layout):
    features = _maps((1, 6, 48, 30, 32), torch.float32, layout)
    mask = torch.rand(1, 6, 6) < 0.6
    grad = torch.randn(1, 6, 6)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        forward = cpu.pair_losses_forward(features, None, mask, window, EPS, int(mask.sum()))
        backward = cpu.pair_losses_backward(grad, features, None, mask, *forward[1:], window, EPS)
        results.append((*forward, backward[0]))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("extent", "window"), SHAPES)
def test_both_layouts_have_the_same_bits(extent, window, dtype):
    """Channels-last, gradients go to the map a window at a time; in NCHW, a tile at a time."""
    last = _maps((1, 4, 37, *extent), dtype, "channels_last")
    plain, grad = last.contiguous(), torch.randn(1, 4, 4)
    results = []
    for features in (last, plain):
        forward = cpu.pair_losses_forward(features, None, None, window, EPS, 16)
        grads, _ = cpu.pair_losses_backward(
            grad, features, None, None, forward[1], forward[2], window, EPS
        )
        assert grads.stride() == features.stride()
        results.append((*forward, grads))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_masks_and_neighbours_do_not_change_a_pair():
    """A pair's bits do not depend on which other pairs are computed beside it."""
    features = torch.randn(1, 5, 33, 9, 10)
    everything, _, _ = cpu.pair_losses_forward(features, None, None, (3, 3), EPS, 25)
    mask = torch.rand(1, 5, 5) < 0.4
    some, _, _ = cpu.pair_losses_forward(features, None, mask, (3, 3), EPS, 25)
    assert torch.equal(some, everything * mask)


def test_wrong_arguments_are_errors_and_not_crashes():
    query = torch.randn(1, 2, 4, 4, 4)
    for bad in [
        (query[0], None, None, (2, 2), EPS, 4),
        (query, query[..., :3], None, (2, 2), EPS, 4),
        (query, query.double(), None, (2, 2), EPS, 4),
        (query, None, torch.ones(1, 2, 3, dtype=torch.bool), (2, 2), EPS, 4),
        (query, None, None, (0, 2), EPS, 4),
        (query, None, None, (2, 5), EPS, 4),
    ]:
        with pytest.raises(RuntimeError):
            cpu.pair_losses_forward(*bad)
    loss, argmax, max_sim = cpu.pair_losses_forward(query, None, None, (2, 2), EPS, 4)
    for saved in [(argmax[:3], max_sim), (argmax, max_sim[:3]), (argmax.int(), max_sim)]:
        with pytest.raises(RuntimeError):
            cpu.pair_losses_backward(loss, query, None, None, *saved, (2, 2), EPS)
    # A foreign argmax may be wrong, but must not lead out of the window.
    cpu.pair_losses_backward(loss, query, None, None, argmax + 200, max_sim, (2, 2), EPS)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(level):
    """The choice is made once per process, so each level runs in a process of its own."""
    code = (
        "import torch, sys; from salkernels.backends import cpu\n"
        f"if cpu.instruction_set() != {level!r}: sys.exit(77)\n"
        "import pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', "
        f"{__file__!r}, '-k', 'test_parity or out_of_range or test_vectors or among']))"
    )
    environment = {**os.environ, "SALKERNELS_CPU_ISA": level}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode == 77:
        pytest.skip(f"this machine cannot run {level}")
    assert run.returncode == 0, run.stdout + run.stderr


def test_one_large_window_needs_no_large_memory():
    """44 x 44 at C = 384 in one window: the similarities alone would be 15 MB a pair."""
    code = """
import resource, torch, salkernels
features = torch.randn(2, 384, 44, 44, requires_grad=True)
small = features.detach()[..., :8, :8].contiguous().requires_grad_()
pairs = ~torch.eye(2, dtype=torch.bool)
for x in (small, features.detach()[:, :, :4].contiguous().requires_grad_()):
    salkernels.wla_set_loss(x, pairs, x.shape[2:], backend="cpu").backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
salkernels.wla_set_loss(features, pairs, 44, backend="cpu").backward()
salkernels.la_loss(features[:1], features[1:], backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grew = float(run.stdout)
    # Two gradients of 5.9 MB, a slice's gradient, 1.5 MB a thread, 2 x 1936 x 8 bytes of matches.
    assert grew < 30, f"{grew} MB"
