"""What the Triton kernels make of the operator's arguments, in every way that they cut a call."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from cases import F32

from salkernels import reference
from salkernels.backends import triton as backend

pytest.importorskip("triton")
from triton_check import DEVICE, EPS, compare, maps, runs, small_tiles, some_pairs  # noqa: F401

from salkernels.triton_kernels import gradient, match, plan, sum, terms

BF16, F16 = torch.bfloat16, torch.float16
pytestmark = [runs, pytest.mark.usefixtures("small_tiles")]

# How a call is cut, in tiles of 32 rows: (G, N, M or None, C, H, W) and the window.
CUTS = {
    "set in a tile": ((1, 5, None, 5, 4, 5), (2, 2)),
    "groups merged": ((5, 1, 1, 5, 4, 5), (2, 2)),
    "set in two tiles": ((1, 10, None, 5, 2, 3), (2, 2)),
    "set in several tiles": ((1, 17, None, 5, 2, 3), (2, 2)),
    "queries and keys in several tiles": ((1, 6, 5, 5, 3, 2), (2, 2)),
    "set streamed": ((1, 3, None, 20, 7, 9), (7, 6)),
    "queries and keys streamed": ((2, 1, 2, 20, 6, 7), (6, 6)),
}
every_cut = pytest.mark.parametrize("cut", CUTS)


class Call:
    """Features of a cut, some pairs of them, and which pixels are valid."""

    def __init__(self, cut, dtype=F32, density=0.5, room=0):
        (groups, queries, keys, *rest), self.window = CUTS[cut]
        self.query = maps(groups, queries, *rest, dtype=dtype, layout="channels_last")
        self.key = None if keys is None else maps(groups, keys, *rest, dtype=dtype)
        self.pairs = some_pairs(groups, queries, keys or queries, density, room)
        nodes = queries + (keys or 0)
        self.valid = torch.ones(groups, nodes, *rest[1:], dtype=torch.bool, device=DEVICE)

    def poison(self):
        """NaN and Inf in the pixels that are not valid."""
        channels = torch.arange(self.query.shape[2], device=DEVICE)
        bad = torch.where(channels % 2 == 0, torch.nan, torch.inf).to(self.query.dtype)
        samples = self.query.shape[1]
        for x, valid in (
            (self.query, self.valid[:, :samples]),
            (self.key, self.valid[:, samples:]),
        ):
            if x is not None:
                x.copy_(torch.where(valid[:, :, None], x, bad[:, None, None]))
        return self

    @property
    def given(self):
        return self.query, self.key, self.pairs, self.window


# ---- Pixels that take no part --------------------------------------------------------------------


@every_cut
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_pixels_that_take_no_part(cut, dtype):
    call = Call(cut, dtype, density=0.7)
    call.valid = torch.rand(call.valid.shape, device=DEVICE) < 0.5
    found, grads = compare(*call.poison().given, call.valid)
    assert not any(x.isnan().any() for x in (*found[:2], *grads) if x is not None)
    samples = call.query.shape[1]
    assert not grads[0].movedim(2, -1)[~call.valid[:, :samples]].any()
    assert (found.argmax == reference.no_match(found.argmax.dtype)).any()


@every_cut
def test_windows_and_samples_without_a_pixel(cut):
    """A query pixel that meets nothing takes no part; a pair of such alone counts 0."""
    call = Call(cut, density=1)
    rows, columns = call.window
    call.valid[:, 0] = False  # a sample
    call.valid[:, -1, :rows, :columns] = False  # a window of a key
    found, _ = compare(*call.poison().given, call.valid)
    nothing = (found.argmax == reference.no_match(found.argmax.dtype)).all(2).all(1)
    assert nothing.any()
    assert not found.loss[nothing].any()


@every_cut
def test_no_pixel_at_all(cut):
    call = Call(cut)
    call.valid.zero_()
    found, grads = compare(*call.poison().given, call.valid)
    assert (found.max_sim == 1).all()
    assert not any(x.any() for x in (found.loss, *grads) if x is not None)


@every_cut
def test_nan_of_valid_pixels_beside_others(cut):
    call = Call(cut, density=0.7)
    call.valid = torch.rand(call.valid.shape, device=DEVICE) < 0.8
    call.poison()
    call.valid[0, 1, 0, 0] = True
    (call.query if call.query.shape[1] > 1 else call.key)[0, -1, 1, 0, 0] = torch.nan
    compare(*call.given, call.valid)


def test_a_byte_that_is_not_zero_is_true():
    call = Call("groups merged")
    call.valid = torch.rand(call.valid.shape, device=DEVICE) < 0.5
    bytes_ = torch.where(call.valid, 128, 0).to(torch.uint8).view(torch.bool)
    found = [
        backend.match(call.query, call.key, call.pairs, valid, call.window, EPS)
        for valid in (call.valid, bytes_)
    ]
    assert all(map(torch.equal, *found))


# ---- Rows of the list that are left over ---------------------------------------------------------


@every_cut
def test_room_that_is_left_over(cut):
    call = Call(cut, room=19)
    found, _ = compare(*call.given)
    assert (found.max_sim[-19:] == 1).all()
    assert (found.argmax[-19:] == reference.no_match(found.argmax.dtype)).all()
    assert not found.loss[-19:].any()
    # As that counts what is no place of a pair.
    beyond = call.pairs.clone()
    beyond[-19:] = call.query.shape[0] * call.query.shape[1] ** 2 * 100
    again = backend.match(call.query, call.key, beyond, None, call.window, EPS)
    assert all(map(torch.equal, again[:3], found[:3]))


@every_cut
def test_a_list_of_nothing_but_room(cut):
    call = Call(cut, density=0, room=3)
    call.query[:, 0] = torch.nan  # no pair: it reaches nobody
    _, grads = compare(*call.given)
    assert not any(x.any() for x in grads if x is not None)


@every_cut
def test_no_pair(cut):
    call = Call(cut, density=0)
    _, grads = compare(*call.given)
    assert not any(x.any() for x in grads if x is not None)


def test_no_key():
    x, y = maps(2, 3, 4, 2, 2), maps(2, 0, 4, 2, 2)
    pairs = torch.full((2,), -1, device=DEVICE)
    found = backend.match(x, y, pairs, None, (2, 2), EPS)
    assert found.max_sim.tolist() == torch.ones(2, 2, 2).tolist()
    assert found.loss.tolist() == [0, 0]
    grads = backend.match_backward(found.max_sim, x, y, pairs, None, *found[1:], (2, 2), EPS)
    assert not grads[0].any()
    assert grads[1].shape == y.shape


# ---- The gradient of the maxima ------------------------------------------------------------------


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat(2, 1, 1)[::2],
        torch.zeros_like,
    ],
    ids=["as the maxima", "transposed", "every second", "zero"],
)
def test_gradients_of_the_maxima_as_they_come(lay_out):
    call = Call("set in several tiles")
    grad_sim = lay_out(torch.randn(len(call.pairs), *call.query.shape[3:], device=DEVICE))
    compare(*call.given, grad_sim=grad_sim)


@pytest.mark.parametrize("value", [1.0, 0.0, torch.nan])
def test_one_number_for_all_maxima(value):
    """As from a sum, expanded from one element."""
    call = Call("set in several tiles")
    grad_sim = torch.tensor(value, device=DEVICE).expand(len(call.pairs), *call.query.shape[3:])
    compare(*call.given, grad_sim=grad_sim)


def test_a_gradient_that_lies_as_the_maxima_is_not_copied():
    found = backend.outputs(maps(1, 4, 3, 2, 2), None, None, (2, 2))
    assert backend._pixel_by_pixel(found.max_sim).data_ptr() == found.max_sim.data_ptr()


@every_cut
def test_nan_gradients_reach_both_pixels_of_a_match(cut):
    call = Call(cut)
    grad_sim = torch.randn(len(call.pairs), *call.query.shape[3:], device=DEVICE)
    grad_sim[0, 0, 1] = torch.nan
    _, grads = compare(*call.given, grad_sim=grad_sim)
    assert any(x.isnan().any() for x in grads if x is not None)


@every_cut
def test_gradients_of_pixels_that_take_no_part_are_ignored(cut):
    call = Call(cut, room=2)
    call.valid = torch.rand(call.valid.shape, device=DEVICE) < 0.5
    found = backend.match(*call.poison().given[:3], call.valid, call.window, EPS)
    grad_sim = torch.randn(found.max_sim.shape, device=DEVICE)
    grad_sim[found.argmax == reference.no_match(found.argmax.dtype)] = torch.nan
    _, grads = compare(*call.given, call.valid, grad_sim)
    assert not any(x.isnan().any() for x in grads if x is not None)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("window", [(15, 17), (16, 16)])
def test_the_largest_windows_of_bytes(window):
    """255 pixels in a tile of 256 rows: the row that is padding has the number of no match."""
    x = maps(1, 2, 3, *window)
    valid = torch.rand(1, 2, *window, device=DEVICE) < 0.5
    found = backend.match(x, None, None, valid, window, EPS)
    grad_sim = torch.randn(found.max_sim.shape, device=DEVICE)
    grad_sim[found.argmax == reference.no_match(found.argmax.dtype)] = torch.nan
    compare(x, None, None, window, valid, grad_sim)


@pytest.fixture
def large_tiles(small_tiles, monkeypatch):  # noqa: F811
    from salkernels.triton_kernels import config

    if DEVICE == "cuda":
        pytest.skip("no tile of a GPU is as large")
    monkeypatch.setattr(config, "INTERPRETER", config.Tile(256, 128, 4, 1))


@every_cut
def test_matches_from_elsewhere_lead_nowhere(cut):
    """They may be wrong, but nothing beyond a map is read, and nothing but NaN is not finite."""
    call = Call(cut)
    found = backend.match(*call.given[:3], None, call.window, EPS)
    back = partial(backend.match_backward, torch.ones_like(found.max_sim), *call.given[:3], None)
    for number in (200, reference.no_match(found.argmax.dtype)):
        argmax = torch.full_like(found.argmax, number)
        grads = back(found.max_sim, argmax, found.norm, call.window, EPS)
        assert all(x.isfinite().all() for x in grads if x is not None)
    assert not any(x.any() for x in grads if x is not None), "no match is no term"


# ---- Numbers without a cosine --------------------------------------------------------------------


@every_cut
def test_norms_beyond_the_range_of_their_squares(cut):
    """Such a vector has no unit vector: NaN, in its pairs and in no other."""
    call = Call(cut, density=0.7)
    (call.query if call.query.shape[1] > 1 else call.key)[0, -1, :, 0, 0] = 3e19
    found, grads = compare(*call.given, dtype=F32)  # that has its range
    assert found.max_sim.isnan().any()
    assert any(x.isnan().any() for x in grads if x is not None)


# ---- The kernels themselves ----------------------------------------------------------------------


def test_kernels_have_few_parameters():
    kernels = [
        kernel
        for module in (gradient, match, plan, sum, terms)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and kernel.fn.__module__ == module.__name__
    ]
    assert len(kernels) == 10
    for kernel in kernels:
        assert len(inspect.signature(kernel.fn).parameters) <= 20, kernel
