"""The C++ kernel against the definition in `salkernels.reference`, on all it may be given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from instruction_sets import LEVELS, run_tests_at
from targets import runs_on
from tolerances import ROUNDED_TIES, TOLERANCES
from torch import Tensor

import salkernels
from salkernels import reference
from salkernels.backends import cpu
from salkernels.reference import Outputs

pytestmark = runs_on("cpu", "cpu")
EPS = 1e-12
CSRC = Path(__file__).parents[1] / "csrc"

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


def _places(mask: Tensor | None) -> Tensor | None:
    """The list of pairs (P,) of a table (G, N, M)."""
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(1)


def _match(backend, query, key, mask, window, eps=EPS, valid=None) -> Outputs:
    return Outputs(*backend.match(query, key, _places(mask), valid, window, eps))


def _backward(backend, grad_sim, query, key, mask, found, window, eps=EPS, valid=None):
    kept = (found.max_sim, found.argmax, found.norm)
    return backend.match_backward(grad_sim, query, key, _places(mask), valid, *kept, window, eps)


def _relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    if expected.numel() == 0:
        return 0.0
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def _compare(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: tuple[int, int],
    valid: Tensor | None = None,
):
    tolerance = TOLERANCES[query.dtype]
    arguments = (query, key, mask, window, EPS, valid)
    expected, actual = _match(reference, *arguments), _match(cpu, *arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert _relative(actual.loss, expected.loss) < tolerance.value
    assert _relative(actual.max_sim, expected.max_sim) < tolerance.similarity
    wrong = actual.argmax != expected.argmax
    assert wrong.sum() <= 1 + actual.argmax.numel() * ROUNDED_TIES
    none = reference.no_match(actual.argmax.dtype)
    assert torch.equal(actual.argmax == none, expected.argmax == none)

    grad = torch.randn_like(actual.max_sim)
    saved = (grad, query, key, mask, actual, window, EPS, valid)
    for ours, theirs in zip(_backward(cpu, *saved), _backward(reference, *saved), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.shape, ours.dtype, ours.stride()) == (
                theirs.shape,
                theirs.dtype,
                theirs.stride(),
            )
            assert _relative(ours, theirs) < tolerance.relative_l2


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
    _compare(query, None, None, window, torch.rand(2, 3, *extent) < 0.7)
    _compare(query, key, mask, window, torch.rand(2, 7, *extent) < 0.5)


@pytest.mark.parametrize("window", [(2, 2), (12, 20), (20, 18)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_pixels_that_take_no_part(layout, window):
    """Samples and windows without a valid pixel, and NaN wherever a pixel is not valid."""
    features = _maps((1, 4, 20, 24, 20), torch.float32, layout).clone()
    valid = torch.rand(1, 4, 24, 20) < 0.6
    valid[0, 1] = False
    valid[0, 2, : window[0], : window[1]] = False
    features.masked_fill_(~valid[:, :, None], torch.nan)
    _compare(features, None, None, window, valid)
    _compare(features, features.roll(1, 1), None, window, torch.cat([valid, valid.roll(1, 1)], 1))
    found = _match(cpu, features, None, None, window, valid=valid)
    grads, _ = _backward(
        cpu,
        torch.full_like(found.max_sim, torch.nan),
        features,
        None,
        None,
        found,
        window,
        valid=valid,
    )
    assert (grads[(~valid)[:, :, None].expand_as(grads)] == 0).all(), "their NaN reaches nobody"


def test_valid_is_any_byte_but_zero():
    features = torch.randn(1, 3, 8, 6, 6)
    valid = torch.rand(1, 3, 6, 6) < 0.5
    odd = (valid.byte() * 254).view(torch.bool)
    for ours, theirs in zip(
        _match(cpu, features, None, None, (2, 2), valid=odd),
        _match(cpu, features, None, None, (2, 2), valid=valid),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


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
    found = _match(cpu, query, None, mask, (2, 2))
    assert found.loss.shape == (0,)
    assert found.argmax.shape == found.max_sim.shape == (0, 4, 4)
    grad, _ = _backward(cpu, found.max_sim, query, None, mask, found, (2, 2))
    assert not grad.any()


def test_empty_batch():
    query = torch.randn(0, 1, 8, 4, 4)
    found = _match(cpu, query, query, None, (2, 2))
    assert found.loss.shape == (0,)
    grads = _backward(cpu, found.max_sim, query, query, None, found, (2, 2))
    assert [g.shape for g in grads] == [query.shape, query.shape]


def test_room_that_is_left_over_takes_no_part():
    query, places = torch.randn(1, 3, 8, 4, 4), torch.tensor([1, 5, 6, -1, -1])
    few = Outputs(*cpu.match(query, None, places[:3], None, (2, 2), EPS))
    found = Outputs(*cpu.match(query, None, places, None, (2, 2), EPS))
    for ours, theirs in zip(found[:3], few[:3], strict=True):
        assert torch.equal(ours[:3], theirs)
    assert (found.loss[3:] == 0).all()
    assert (found.max_sim[3:] == 1).all()
    assert (found.argmax[3:] == 255).all()
    grad = torch.randn_like(found.max_sim)
    kept = found[1:]
    ours = cpu.match_backward(grad, query, None, places, None, *kept, (2, 2), EPS)[0]
    kept = few[1:]
    theirs = cpu.match_backward(grad[:3], query, None, places[:3], None, *kept, (2, 2), EPS)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("places", [[3, 1], [2, 2], [9], [-2, 1], [-1, 3]])
def test_a_list_that_is_no_list_of_pairs_is_an_error(places):
    with pytest.raises(RuntimeError, match="ascending order"):
        cpu.match(torch.randn(1, 3, 8, 4, 4), None, torch.tensor(places), None, (2, 2), EPS)


@pytest.mark.parametrize("window", [(2, 2), (3, 3), (18, 20)])
def test_among_equals_the_first_is_the_match(window):
    """Two vectors only, so that every window is full of ties; all but the index is exact."""
    choice = torch.randint(0, 2, (2, 3, 18, 20))
    vectors = torch.eye(16)[:2] * 2
    query = vectors[choice].movedim(-1, 2)  # (G, N, C, H, W)
    expected, actual = (_match(b, query, None, None, window) for b in (reference, cpu))
    assert torch.equal(actual.argmax, expected.argmax)
    assert torch.equal(actual.max_sim, expected.max_sim)


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
    expected, found = (_match(b, query, None, mask, window) for b in (reference, cpu))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    saved = (torch.randn_like(found.max_sim), query, None, mask, found, window)
    expected, actual = (_backward(b, *saved)[0] for b in (reference, cpu))
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1e-40])
@pytest.mark.parametrize("window", [(2, 2), (17, 18)])
def test_vectors_at_or_below_eps(eps, window):
    query = torch.randn(1, 4, 24, 17, 18)
    query[0, 0, :, :4] = 0
    query[0, 1, :, 3:6] *= 1e-13
    query[0, 2, :, :, 2] *= 1e-3
    expected, found = (_match(b, query, None, None, window, eps) for b in (reference, cpu))
    torch.testing.assert_close(found.max_sim, expected.max_sim, rtol=1e-4, atol=1e-6)
    grad_sim = torch.randn(16, 1, 1).expand_as(found.max_sim) / (17 * 18)
    saved = (grad_sim, query, None, None, found, window, eps)
    expected, actual = (_backward(b, *saved)[0] for b in (reference, cpu))
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
    grad = torch.randn(int(mask.sum()), 30, 32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = _match(cpu, features, None, mask, window)
        backward = _backward(cpu, grad, features, None, mask, found, window)
        results.append((*found, backward[0]))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("extent", "window"), SHAPES)
def test_both_layouts_have_the_same_bits(extent, window, dtype):
    """Channels-last, gradients go to the map a window at a time; in NCHW, a tile at a time."""
    last = _maps((1, 4, 37, *extent), dtype, "channels_last")
    plain, grad = last.contiguous(), torch.randn(16, *extent)
    valid = torch.rand(1, 4, *extent) < 0.8
    results = []
    for features in (last, plain):
        found = _match(cpu, features, None, None, window, valid=valid)
        grads, _ = _backward(cpu, grad, features, None, None, found, window, valid=valid)
        assert grads.stride() == features.stride()
        results.append((*found, grads))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 112), (torch.bfloat16, 168)])
def test_large_gradients_have_the_bits_of_small_ones(dtype, channels, layout):
    """Gradients of 32 MB go around the caches, here in maps where strips share cache lines."""
    features = _maps((2, 8, channels, 82, 82), dtype, layout)
    assert features.nbytes >= 32 << 20 > features[0].nbytes
    found = _match(cpu, features, None, None, (2, 2))
    grad = torch.randn_like(found.max_sim)
    whole, _ = _backward(cpu, grad, features, None, None, found, (2, 2))
    for group, (ours, theirs) in enumerate(zip(whole, features, strict=True)):
        pairs = slice(64 * group, 64 * (group + 1))
        kept = Outputs(*(x[pairs] for x in found[:3]), found.norm)
        alone, _ = _backward(cpu, grad[pairs], theirs[None], None, None, kept, (2, 2))
        assert torch.equal(ours, alone[0])


FRAGMENTS = "simd pack tile ahead match terms gradient lse lse-weights lse-gradient lse-pieces"


@pytest.mark.parametrize("name", FRAGMENTS.split())
def test_fragments_of_the_kernels_open_by_themselves(name):
    """So that an editor understands them: the build includes them in another file's namespace."""
    compiler, source = shutil.which("g++"), CSRC / "cpu" / f"{name}-inl.h"
    if compiler is None or not source.exists():
        pytest.skip("needs g++ and the sources")
    arguments = ["-std=c++17", "-fsyntax-only", "-Wno-psabi", "-Wno-ignored-attributes", "-xc++"]
    run = subprocess.run(
        [compiler, *arguments, str(source)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_masks_and_neighbours_do_not_change_a_pair():
    """A pair's bits do not depend on which other pairs are computed beside it."""
    features = torch.randn(1, 5, 33, 9, 10)
    mask = torch.rand(1, 5, 5) < 0.4
    everything, some = (_match(cpu, features, None, m, (3, 3)) for m in (None, mask))
    assert torch.equal(some.max_sim, everything.max_sim[_places(mask)])
    assert torch.equal(some.loss, everything.loss[_places(mask)])


def test_wrong_arguments_are_errors_and_not_crashes():
    query, valid = torch.randn(1, 2, 4, 4, 4), torch.ones(1, 2, 4, 4, dtype=torch.bool)
    for bad in [
        (query[0], None, None, None, (2, 2), EPS),
        (query, query[..., :3], None, None, (2, 2), EPS),
        (query, query.double(), None, None, (2, 2), EPS),
        (query, None, torch.ones(1, 2, 2, dtype=torch.bool), None, (2, 2), EPS),
        (query, None, torch.tensor([0, 1], dtype=torch.int32), None, (2, 2), EPS),
        (query, None, torch.arange(8)[::4], None, (2, 2), EPS),
        (query, None, None, None, (0, 2), EPS),
        (query, None, None, None, (2, 5), EPS),
        (query, None, None, valid.float(), (2, 2), EPS),
        (query, None, None, valid[:, :1], (2, 2), EPS),
        (query, query, None, valid, (2, 2), EPS),
        (query, None, None, valid.transpose(2, 3)[..., :3], (2, 2), EPS),
    ]:
        with pytest.raises(RuntimeError):
            cpu.match(*bad)
    loss, max_sim, argmax, norm = cpu.match(query, None, None, None, (2, 2), EPS)
    for grad, *kept in [
        (max_sim, max_sim, argmax[:3]),
        (max_sim, max_sim[:3], argmax),
        (max_sim[:3], max_sim, argmax),
        (max_sim, max_sim, argmax.int()),
    ]:
        with pytest.raises(RuntimeError):
            cpu.match_backward(grad, query, None, None, None, *kept, norm, (2, 2), EPS)
    # A foreign argmax may be wrong, but must not lead out of the window.
    kept = (max_sim, argmax + 200, norm)
    cpu.match_backward(max_sim, query, None, None, None, *kept, (2, 2), EPS)


def test_a_loss_of_a_large_map_keeps_its_digits():
    """One fp32 sum over sixteen million pixels would be off by 1e-4."""
    x, y = torch.randn(2, 1, 1, 4, 2000, 1)
    x, y = (z.expand(1, 1, 4, 2000, 2000) for z in (x, y))
    loss = cpu.match(x, y, None, None, (1, 1), EPS)[0]
    expected = 1 - torch.cosine_similarity(x[..., :1].double(), y[..., :1].double(), dim=2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    run_tests_at(level, __file__, "test_parity or out_of_range or test_vectors or among")


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
