"""Lists and their copies are found again by content, and a CUDA graph can hold a call.

No GPU is needed: the device "meta", which torch has everywhere, plays one.
"""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import salkernels
from salkernels import _kept
from salkernels._pair_list import PairList, to_device

META = torch.device("meta")
SAMPLES = 6


@pytest.fixture
def gpu(monkeypatch):
    """Meta as a GPU: on the stream that the test says, capturing or not; it counts the copies."""
    played = SimpleNamespace(stream=1, capturing=False, copies=0, recent=_kept.Recent())
    monkeypatch.setattr(_kept, "RECENT", played.recent)
    monkeypatch.setattr(_kept, "_has_streams", lambda device: device.type == "meta")
    monkeypatch.setattr(_kept, "stream_of", lambda device: played.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: played.capturing)
    plain = torch.Tensor.to

    def to(x, *where, **how):
        result = plain(x, *where, **how)
        if x.is_cpu and result.is_meta:
            assert not played.capturing, "a graph cannot hold a copy of ordinary memory"
            played.copies += 1
        return result

    monkeypatch.setattr(torch.Tensor, "to", to)
    return played


def mask(seed=0):
    table = torch.rand(SAMPLES, SAMPLES, generator=torch.Generator().manual_seed(seed)) < 0.5
    return table.fill_diagonal_(False)


def scans():
    return torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()


# ---- What is found again -------------------------------------------------------------------------


def test_an_equal_mask_is_copied_once(gpu):
    first = PairList.of(scans(), META)
    assert PairList.of(scans(), META) is first
    assert gpu.copies == 1
    assert first.groups == 2
    assert torch.equal(first.places, scans().reshape(-1).nonzero().squeeze(1))


def test_a_mask_that_was_changed_in_place_is_a_new_one(gpu):
    table = mask()
    first = PairList.of(table, META)
    table[0, 1] ^= True
    second = PairList.of(table, META)
    assert torch.equal(second.places, table.reshape(-1).nonzero().squeeze(1))
    table.numpy()[0, 1] ^= True  # without torch's knowledge: its version counter stands still
    assert PairList.of(table, META) is first


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2, 3).bool(), torch.ones(3, 2).bool()),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
    ],
    ids=["shape", "dtype", "sign"],
)
def test_equal_bytes_are_not_all(gpu, one, other):
    first, second = to_device(one, META), to_device(other, META)
    assert first is not second
    assert (second.shape, second.dtype) == (other.shape, other.dtype)


def test_a_table_of_keys_is_not_one_of_samples(gpu):
    """Equal bytes of indices, for other numbers of samples: other places."""
    pairs = torch.tensor([[0, 1], [2, 0], [0, 1]])
    of = {keys: PairList.listed(pairs, 3, keys, META) for keys in (3, 4, 3)}
    assert of[3].places.tolist() == [1, 6]
    assert of[4].places.tolist() == [1, 8]
    assert gpu.copies == 4  # list and order of each
    assert PairList.listed(pairs.clone(), 3, 3, META) is of[3]


def test_a_slice_is_known_by_what_it_shows(gpu):
    wide = torch.arange(12).view(3, 4)
    first = to_device(wide[:, 1], META)
    assert to_device(wide[:, 1].clone(), META) is first
    assert to_device(wide[:, 2], META) is not first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype(gpu, dtype):
    weights = torch.rand(5, dtype=dtype)
    assert to_device(weights, META) is to_device(weights.clone(), META)
    assert to_device(weights + 1, META) is not to_device(weights, META)


def test_weights_that_learn_keep_their_gradient(gpu):
    weights = torch.rand(5, requires_grad=True)
    assert to_device(weights, META).requires_grad
    assert len(gpu.recent) == 0


def test_where_somebody_looks_everything_happens_again(gpu):
    """Modes, transforms and subclasses see each operator, and what they made is not kept."""
    with FlopCounterMode(display=False):
        PairList.of(mask(), META)
    torch.vmap(lambda x: to_device(x, META))(torch.ones(2, 3))
    to_device(torch.nn.Parameter(torch.ones(2), requires_grad=False), META)
    assert len(gpu.recent) == 0


def test_made_in_inference_mode_it_serves_training_too(gpu):
    with torch.inference_mode():
        to_device(torch.ones(3), META)
        chosen = PairList.of(mask(), META)
    assert PairList.of(mask(), META) is chosen
    assert not any(x.is_inference() for x in (to_device(torch.ones(3), META), *chosen[3:4]))


def test_on_a_cpu_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(_kept, "RECENT", _kept.Recent())
    table = mask()
    PairList.of(table, torch.device("cpu"))
    assert to_device(table, torch.device("cpu")) is table
    assert len(_kept.RECENT) == 0


# ---- Bounds, streams, threads --------------------------------------------------------------------


def test_number_and_bytes_are_bounded():
    recent = _kept.Recent(most=3, most_bytes=100)
    for key in "abcd":
        recent.put(key, key.upper(), 1, 10)
    assert recent.get("a", 1, False) is None
    assert recent.get("b", 1, False) == "B"  # and is now the youngest
    recent.put("e", "E", 1, 75)
    assert [recent.get(key, 1, False) for key in "cdbe"] == [None, "D", "B", "E"]
    recent.put("f", "F", 1, 101)
    assert recent.get("f", 1, False) is None
    assert recent.bytes == 95
    recent.put("e", "smaller", 1, 5)
    assert (len(recent), recent.bytes) == (3, 25)


def test_another_stream_makes_its_own(gpu):
    first = to_device(torch.ones(3), META)
    gpu.stream = 2
    second = to_device(torch.ones(3), META)
    assert second is not first
    assert to_device(torch.ones(3), META) is second
    assert gpu.copies == 2
    assert len(gpu.recent) == 1


def test_threads_share_it():
    recent, wrong = _kept.Recent(most=8, most_bytes=800), []

    def work(seed):
        for i in range(2000):
            key = (i * seed) % 23
            recent.put(key, key, seed % 2, 100)
            found = recent.get(key, seed % 2, False)
            if found not in (None, key):
                wrong.append((key, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recent.bytes == 100 * len(recent) <= 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_is_made_once(gpu, dtype):
    like = torch.empty(2, dtype=dtype, device="meta")
    with torch.inference_mode():
        first = _kept.one(like)
    assert _kept.one(like) is first
    assert (first.dtype, first.shape, first.is_inference()) == (dtype, (), False)
    gpu.stream = 2
    second = _kept.one(like)
    assert second is not first
    assert _kept.one(torch.empty(2, dtype=dtype)).item() == 1
    gpu.capturing, gpu.stream = True, 3
    assert _kept.one(like) is second
    half = like.to(torch.float16)
    assert _kept.one(half) is not _kept.one(half), "one of a graph is kept for nobody else"


# ---- Graphs --------------------------------------------------------------------------------------


def test_a_capture_takes_what_the_warm_up_left(gpu):
    chosen = PairList.of(mask(), META)
    gpu.stream, gpu.capturing = 2, True
    assert PairList.of(mask(), META) is chosen


def test_a_mask_that_no_call_has_used_is_an_error_in_a_capture(gpu):
    PairList.of(mask(), META)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"being captured, and a table or list \(6, 6\) .* once"):
        PairList.of(mask(1), META)
    assert len(gpu.recent) == 1
    with pytest.raises(RuntimeError, match=r"a table or list \(3,\) on the CPU"):
        to_device(torch.ones(3), META)


def test_a_copy_in_a_graph_outlives_its_place_here(gpu):
    """A replay reads it, and nothing else holds it: the graph has its address alone."""
    captured, other = (weakref.ref(PairList.of(mask(seed), META).grouped) for seed in (0, 1))
    gpu.capturing = True
    PairList.of(mask(0), META)
    gpu.capturing = False
    for seed in range(2, 2 + _kept.MOST):
        PairList.of(mask(seed), META)
    gc.collect()
    assert other() is None
    assert captured() is not None


@pytest.mark.parametrize("pinned", [False, True])
def test_pinned_memory_is_copied_by_the_graph_itself(gpu, monkeypatch, pinned):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: pinned)
    source = torch.ones(3)
    first = to_device(source, META)
    gpu.capturing = True
    if pinned:
        with pytest.raises(AssertionError, match="a graph cannot hold"):  # the played one
            to_device(source, META)
    else:
        assert to_device(source, META) is first


CALLS = {
    "mask": lambda x, p: salkernels.wla_set_loss(x, p, 2),
    "table": lambda x, p: salkernels.wla_set_loss(x, p, 2, reduction="none"),
    "weights": lambda x, p: salkernels.wla_set_loss(x, p * 0.5, 2),
    "valid": lambda x, p: salkernels.wla_set_loss(x, p, 2, valid=x[:, 0] > 0),
    "indices": lambda x, p: salkernels.wla_set_loss(x, p.nonzero().flip(0), 2),
    "keys": lambda x, p: salkernels.wla_set_loss(x, p[:, :4], 2, keys=x[:4]),
    "matches": lambda x, p: salkernels.align_set(x, p, 2).max_sim.sum(),
    "contrast": lambda x, p: salkernels.wla_contrast(x, p, ~p, 2),
    "contrast of each": lambda x, p: salkernels.wla_contrast(x, p, ~p, 2, reduction="none"),
    "positions": lambda x, p: salkernels.gp_loss(x[:, :, 0, 0], p),
    "whole": lambda x, p: salkernels.sal_loss(x, x[:, :, 0, 0], [1] * 6, range_of(p), 9, 2).loss,
}


def range_of(table):
    """Indices of slices that differ with the mask."""
    return table.sum(dim=1).cumsum(0) % 9


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_loss_can_be_captured_after_one_call(gpu, call):
    features = torch.randn(SAMPLES, 5, 4, 4, device="meta", requires_grad=True)

    def both(table):
        return torch.autograd.grad(call(features, table).sum(), features)

    both(mask())
    copies = gpu.copies
    assert copies > 0
    gpu.stream, gpu.capturing = 2, True
    both(mask())
    with pytest.raises(RuntimeError, match="Call the loss once with the same one"):
        both(mask(1))
    gpu.capturing = False
    both(mask(1))
    assert gpu.copies > copies
