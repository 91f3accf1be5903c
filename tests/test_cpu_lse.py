"""The C++ log-sum-exp over negatives against its definition, in fp64, on all it may be given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import LEVELS, run_tests_at
from targets import runs_on
from tolerances import TOLERANCES
from torch import Tensor

from salkernels import reference_contrast
from salkernels.backends import cpu

pytestmark = runs_on("cpu", "cpu")
EPS = 1e-12

SHAPES = [  # H, W, window
    ((7, 9), (2, 3)),  # narrow and short edge windows
    ((5, 4), (1, 1)),
    ((9, 9), (5, 5)),
    ((4, 48), (2, 2)),  # more windows than vector lanes
    ((8, 17), (8, 8)),  # 64 pixels: the largest window of a tile
    ((11, 9), (11, 9)),  # pieces: one window of more than one block
]
LAYOUTS = ("nchw", "channels_last", "every_other", "transposed")


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _maps(shape, dtype=torch.float32, layout="nchw", generator=None) -> Tensor:
    """(G, N, C, H, W) features in the given memory layout."""
    groups, samples, channels, height, width = shape
    shapes = {
        "nchw": shape,
        "channels_last": (groups, samples, height, width, channels),
        "every_other": (groups, samples, 2 * channels, height, 2 * width),
        "transposed": (groups, samples, channels, width, height),
    }
    plain = torch.randn(shapes[layout], generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return plain.movedim(-1, 2)
    if layout == "every_other":
        return plain[:, :, ::2, :, ::2]
    return plain if layout == "nchw" else plain.transpose(3, 4)


def _places(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(1)


def _others(groups: int, samples: int, share=1.0, generator=None) -> Tensor:
    """Pairs of different samples: a pixel with itself leaves nothing but rounding at a small τ."""
    mask = torch.rand(groups, samples, samples, generator=generator) < share
    return mask & ~torch.eye(samples, dtype=torch.bool)


def _wide(*tensors: Tensor | None):
    return [None if x is None else x.double() for x in tensors]


def _compare(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: tuple[int, int],
    valid: Tensor | None = None,
    tau: float = 0.1,
    eps: float = EPS,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both passes against the definition in fp64; our lse and gradient of the queries."""
    tolerance, places = TOLERANCES[query.dtype], _places(mask)
    settings = (window, tau, eps)
    lse = cpu.window_lse(query, key, places, valid, *settings)
    expected = reference_contrast.window_lse(*_wide(query, key), places, valid, *settings)
    assert (lse.shape, lse.dtype) == (
        expected.shape,
        reference_contrast.output(query).dtype,
    )
    limit = 2 * tolerance.similarity  # of the cosines, and of a sum of hundreds of terms
    torch.testing.assert_close(lse.double(), expected, rtol=limit, atol=limit / tau, equal_nan=True)

    if grad is None:
        grad = torch.randn(lse.shape, dtype=torch.float64).to(lse.dtype)
        grad[torch.rand(lse.shape) < 0.1] = 0
    ours = cpu.window_lse_backward(grad, query, key, places, valid, lse, *settings)
    theirs = reference_contrast.window_lse_backward(
        *_wide(grad, query, key), places, valid, expected, *settings
    )
    limit = 3 * tolerance.relative_l2 / min(tau, 0.3)
    for leaf, actual, wanted in zip((query, key), ours, theirs, strict=True):
        assert (leaf is None) == (actual is None) == (wanted is None)
        if leaf is None:
            continue
        assert (actual.dtype, actual.stride()) == (leaf.dtype, torch.empty_like(leaf).stride())
        assert torch.equal(actual.isnan(), wanted.isnan())
        difference = (actual.double() - wanted).nan_to_num(0)
        assert difference.norm() <= limit * wanted.nan_to_num(0).norm() + 1e-30
    return lse, ours[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("extent", "window"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_parity(dtype, extent, window, layout):
    for channels in (5, 48):
        query = _maps((2, 3, channels, *extent), dtype, layout)
        key = _maps((2, 4, channels, *extent), dtype, layout)
        _compare(query, key, torch.rand(2, 3, 4) < 0.4, window)
        _compare(query, None, _others(2, 3, 0.5), window)
    _compare(query, key, None, window, torch.rand(2, 7, *extent) < 0.5)
    _compare(query, None, _others(2, 3), window, torch.rand(2, 3, *extent) < 0.7)


@st.composite
def configurations(draw):
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 20))
    return {
        "seed": draw(st.integers(0, 2**20)),
        "groups": draw(st.integers(1, 2)),
        "samples": draw(st.integers(1, 9)),
        "keys": draw(st.sampled_from([None, 1, 4, 7])),
        # With one channel cosines are ±1, and gradients nothing but rounding.
        "channels": draw(st.integers(2, 40)),
        "extent": (height, width),
        "window": (draw(st.integers(1, height)), draw(st.integers(1, width))),
        "share": draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        "valid": draw(st.sampled_from([None, 0.4, 0.9])),
        "tau": draw(st.sampled_from([2**-10, 0.05, 0.1, 1.0, 100.0])),
        "dtype": draw(st.sampled_from(list(TOLERANCES))),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
    }


@given(configurations())
def test_random_configurations(case):
    generator = torch.Generator().manual_seed(case["seed"])
    groups, samples, channels = case["groups"], case["samples"], case["channels"]
    count = case["keys"] or samples
    query, key = (
        _maps((groups, n, channels, *case["extent"]), case["dtype"], layout, generator)
        for n, layout in zip((samples, count), case["layouts"], strict=True)
    )
    if case["keys"] is None:
        mask = _others(groups, samples, case["share"], generator)
        key = None
    else:
        mask = torch.rand(groups, samples, count, generator=generator) < case["share"]
    valid = None
    if case["valid"] is not None:
        maps = samples if key is None else samples + count
        valid = torch.rand(groups, maps, *case["extent"], generator=generator) < case["valid"]
        query = query.masked_fill(~valid[:, :samples, None], torch.nan)
    _compare(query, key, mask, case["window"], valid, case["tau"])


@pytest.mark.parametrize("window", [(2, 2), (9, 10)])
@pytest.mark.parametrize("tau", [2.0**-10, 1e4])
def test_temperatures_at_the_ends(tau, window):
    """e^{1024 cos} overflows, and with cosines below 0 everything would underflow."""
    query = torch.randn(1, 6, 24, 9, 10) / 4 + torch.randn(24, 1, 1)
    query[:, 3:] *= -1  # cosines near −1 with the first three
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, :3, 3:] = mask[0, 4, :2] = True
    lse, grad = _compare(query, None, mask, window, tau=tau)
    assert lse[0, :3].isfinite().all()
    assert grad.isfinite().all()
    # A pixel that takes no part is 0: e^{0 − lse} would be infinite if it were a term.
    valid = torch.rand(1, 6, 9, 10) < 0.6
    _, grad = _compare(query, None, mask, window, valid, tau=tau)
    assert grad.isfinite().all()


@pytest.mark.parametrize("window", [(2, 2), (9, 10)])
def test_a_sample_against_itself_and_pairs_in_one_direction(window):
    query = torch.randn(3, 6, 18, 9, 10)
    mask = torch.zeros(3, 6, 6, dtype=torch.bool)
    mask[0, 1, 4] = mask[0, 4, 1] = mask[0, 1, 1] = mask[0, 5, 3] = True
    mask[2, 0, 5] = True
    lse, grad = _compare(query, None, mask, window, tau=1.0)
    assert torch.equal((lse != -torch.inf).all(dim=(2, 3)), mask.any(dim=2))
    assert torch.equal((grad != 0).flatten(2).any(dim=2), mask.any(dim=2) | mask.any(dim=1))
    _compare(query, torch.randn_like(query), mask, window)
    _compare(query, None, None, window, tau=1.0)


def test_more_partners_than_a_panel_has_room_for():
    """Weights of 64 x 64 for each pair: panels of one sample, and of some."""
    _compare(torch.randn(1, 9, 12, 8, 16), None, _others(1, 9), (8, 8))
    _compare(torch.randn(1, 12, 12, 6, 6), None, _others(1, 12, 0.7), (6, 6))
    _compare(torch.randn(1, 60, 6, 2, 4), None, _others(1, 60, 0.9), (2, 2))


def test_more_samples_than_a_tile_has_room_for():
    """Pieces, though each window is small."""
    query = torch.randn(1, 94, 700, 8, 8)
    assert query.nbytes > 16 << 20
    mask = torch.eye(94, dtype=torch.bool).roll(1, 1)[None]
    _compare(query, None, mask, (8, 8))


@pytest.mark.parametrize("window", [(2, 2), (9, 10)])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_pixels_that_take_no_part(layout, window):
    """Samples and windows without a valid pixel; NaN in features and gradients there."""
    features = _maps((1, 4, 20, 9, 10), torch.float32, layout).clone()
    valid = torch.rand(1, 4, 9, 10) < 0.6
    valid[0, 1] = False
    valid[0, 2, : window[0], : window[1]] = False
    features.masked_fill_(~valid[:, :, None], torch.nan)
    places = _places(_others(1, 4))
    settings = (window, 0.1, EPS)
    lse = cpu.window_lse(features, None, places, valid, *settings)
    assert (lse[~valid] == -torch.inf).all()
    grad = torch.randn(lse.shape).masked_fill_(lse == -torch.inf, torch.nan)
    calm = features.nan_to_num(0)
    for backend in (cpu, reference_contrast):
        (ours, _), (theirs, _) = (
            backend.window_lse_backward(g, x, None, places, valid, lse, *settings)
            for g, x in ((grad, features), (grad.nan_to_num(0), calm))
        )
        assert (ours[(~valid)[:, :, None].expand_as(ours)] == 0).all()
        assert torch.equal(ours, theirs), "their NaN reaches nobody"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("window", [(2, 2), (9, 10)])
def test_values_out_of_range_reach_what_they_touch_and_nothing_else(value, window):
    query = torch.randn(2, 4, 24, 9, 10)
    query[0, 1, 3, 5, 5] = value
    query[1, 2, :, 8, 9] = value
    mask = _others(2, 4, 0.6)
    mask[0, 1] = mask[0, :, 1] = False
    mask[0, 1, 2] = True
    mask[1, 3] = mask[1, :, 3] = False
    query[1, 3, 0, 0, 0] = value  # in no pair
    settings = (_places(mask), None)
    outputs = []
    for backend in (cpu, reference_contrast):
        lse = backend.window_lse(query, None, *settings, window, 0.1, EPS)
        grad = torch.linspace(-1, 1, lse.numel()).view(lse.shape)
        grad = grad.masked_fill(torch.arange(10) % 3 == 0, 0)
        back = backend.window_lse_backward(grad, query, None, *settings, lse, window, 0.1, EPS)
        outputs.append((lse, back[0]))
    assert outputs[0][0].isnan().any()
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [1e-12, 1e-2, 1e-40])
@pytest.mark.parametrize("window", [(2, 2), (9, 10)])
def test_vectors_at_or_below_eps(eps, window):
    query = torch.randn(1, 4, 24, 9, 10)
    query[0, 0, :, :4] = 0
    query[0, 1, :, 3:6] *= 1e-13
    query[0, 2, :, :, 2] *= 1e-3
    outputs = []
    for backend in (cpu, reference_contrast):
        lse = backend.window_lse(query, None, _places(_others(1, 4)), None, window, 0.1, eps)
        grad = torch.linspace(-1, 1, lse.numel()).view(lse.shape)
        saved = (grad, query, None, _places(_others(1, 4)), None, lse)
        outputs.append((lse, backend.window_lse_backward(*saved, window, 0.1, eps)[0]))
    norm = query.norm(dim=2, keepdim=True)
    assert not outputs[0][1][(norm <= eps).expand_as(query)].any()
    for ours, theirs in zip(*outputs, strict=True):
        scale = norm if ours.dim() == 5 else 1
        torch.testing.assert_close(ours * scale, theirs * scale, rtol=1e-4, atol=1e-5)


def test_layouts_and_strides_of_all_arguments():
    query = _maps((2, 3, 20, 6, 8), layout="channels_last")
    key = _maps((2, 4, 20, 6, 8))
    _compare(query, key, None, (2, 2), grad=torch.randn(2, 3, 8, 6).transpose(2, 3))
    expanded = torch.randn(1, 3, 20, 6, 8).expand(2, -1, -1, -1, -1)
    _compare(expanded, None, _others(2, 3), (2, 2), grad=torch.ones(1).expand(2, 3, 6, 8))
    valid = (torch.rand(2, 3, 8, 6) < 0.7).transpose(2, 3)
    odd = (valid.byte() * 254).view(torch.bool)  # valid is any byte but zero
    found = [_compare(key[:, :3], None, _others(2, 3), (2, 2), v)[0] for v in (valid, odd)]
    assert torch.equal(*found)


@pytest.mark.parametrize(("extent", "window"), SHAPES)
def test_both_layouts_have_the_same_bits(extent, window):
    """Channels-last, gradients go to the map a window at a time; in NCHW, a tile at a time."""
    last = _maps((1, 4, 37, *extent), layout="channels_last")
    valid, places = torch.rand(1, 4, *extent) < 0.8, _places(_others(1, 4))
    grad = torch.randn(1, 4, *extent)
    results = []
    for features in (last, last.contiguous()):
        lse = cpu.window_lse(features, None, places, valid, window, 0.1, EPS)
        saved = (grad, features, None, places, valid, lse)
        results.append((lse, cpu.window_lse_backward(*saved, window, 0.1, EPS)[0]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (30, 32)])
def test_the_same_bits_whatever_the_number_of_threads(window, layout):
    features = _maps((1, 6, 48, 30, 32), layout=layout)
    places, grad = _places(_others(1, 6, 0.6)), torch.randn(1, 6, 30, 32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        lse = cpu.window_lse(features, None, places, None, window, 0.1, EPS)
        saved = (grad, features, None, places, None, lse)
        results.append((lse, cpu.window_lse_backward(*saved, window, 0.1, EPS)[0]))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 112), (torch.bfloat16, 168)])
def test_large_gradients_have_the_bits_of_small_ones(dtype, channels, layout):
    """Gradients of 32 MB go around the caches, here in maps where strips share cache lines."""
    features = _maps((2, 8, channels, 82, 82), dtype, layout)
    assert features.nbytes >= 32 << 20 > features[0].nbytes
    places = _places(_others(1, 8, 0.3))
    both = torch.cat([places, places + 64])
    lse = cpu.window_lse(features, None, both, None, (2, 2), 0.1, EPS)
    grad = torch.randn_like(lse)
    saved = (grad, features, None, both, None, lse)
    whole, _ = cpu.window_lse_backward(*saved, (2, 2), 0.1, EPS)
    for group in range(2):
        part = (grad[group, None], features[group, None], None, places, None, lse[group, None])
        alone, _ = cpu.window_lse_backward(*part, (2, 2), 0.1, EPS)
        assert torch.equal(whole[group], alone[0])


@pytest.mark.parametrize("window", [(2, 2), (3, 4), (9, 10)])
def test_gradcheck(window):
    features = torch.randn(1, 3, 4, *window, dtype=torch.float64, requires_grad=True)
    other = torch.randn(1, 2, 4, *window, dtype=torch.float64, requires_grad=True)
    operator = torch.ops.salkernels.window_lse
    valid = torch.ones(1, 5, *window, dtype=torch.bool)
    valid[0, 1, 0, 0] = valid[0, 4, -1, -1] = False

    def sums(query, key, places, valid):
        lse = operator(query, key, places, valid, window, 0.3, EPS, "cpu")
        return lse.masked_fill(lse == -torch.inf, 0)

    fast = window == (9, 10)
    check = torch.autograd.gradcheck
    assert check(lambda x: sums(x, None, _places(_others(1, 3)), None), features, fast_mode=fast)
    assert check(lambda x, y: sums(x, y, None, valid), (features, other), fast_mode=fast)


def test_nothing_to_sum():
    query = torch.randn(2, 3, 8, 4, 4)
    settings = (None, (2, 2), 0.1, EPS)
    none = torch.tensor([], dtype=torch.int64)
    for places in (none, torch.tensor([-1, -1])):
        lse = cpu.window_lse(query, None, places, *settings)
        assert (lse == -torch.inf).all()
        back = cpu.window_lse_backward(lse, query, query, places, None, lse, *settings[1:])
        assert not any(grad.any() for grad in back)
    for shape in [(0, 1, 8, 4, 4), (2, 0, 8, 4, 4)]:
        empty = torch.randn(shape)
        lse = cpu.window_lse(empty, None, None, *settings)
        assert lse.shape == (*shape[:2], 4, 4)
        back = cpu.window_lse_backward(lse, empty, None, None, None, lse, *settings[1:])
        assert back[0].shape == shape


def test_room_that_is_left_over_takes_no_part():
    query, places = torch.randn(1, 3, 8, 4, 4), torch.tensor([1, 5, 6, -1, -1])
    few, all_of_it = (
        cpu.window_lse(query, None, p, None, (2, 2), 0.1, EPS) for p in (places[:3], places)
    )
    assert torch.equal(few, all_of_it)


def test_wrong_arguments_are_errors_and_not_crashes():
    query, valid = torch.randn(1, 2, 4, 4, 4), torch.ones(1, 2, 4, 4, dtype=torch.bool)
    for *bad, message in [
        (query[0], None, None, None, (2, 2), 0.1, "5 axes|must be"),
        (query, query.double(), None, None, (2, 2), 0.1, "share a dtype"),
        (query, None, torch.tensor([3, 1]), None, (2, 2), 0.1, "ascending order"),
        (query, None, torch.tensor([4]), None, (2, 2), 0.1, "ascending order"),
        (query, None, None, None, (2, 5), 0.1, "window"),
        (query, None, None, valid[:, :1], (2, 2), 0.1, "valid"),
        (query, None, None, None, (2, 2), 0.0, "temperature must be > 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.window_lse(*bad, EPS)
    lse = cpu.window_lse(query, None, None, None, (2, 2), 0.1, EPS)
    for grad, kept in [(lse[:, :1], lse), (lse, lse[..., :3]), (lse, lse.double()[0])]:
        with pytest.raises(RuntimeError, match="lse and grad_lse"):
            cpu.window_lse_backward(grad, query, None, None, None, kept, (2, 2), 0.1, EPS)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    run_tests_at(level, __file__, "configurations or temperatures or out_of_range or panel")
