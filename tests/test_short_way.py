"""A call that equals an earlier one takes a shorter way: the same results, and the same errors."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import salkernels
from salkernels import _kept, _short

PAIRS = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool().fill_diagonal_(False)


def maps(dtype=torch.float32, requires_grad=True, **how):
    x = torch.randn(6, 4, 5, 6, **how).to(dtype)
    return x.requires_grad_(requires_grad)


FORMS = {
    "set": lambda x, **how: salkernels.wla_set_loss(x, PAIRS, 2, **how),
    "pairs": lambda x, **how: salkernels.wla_loss(x, x.flip(0), (2, 3), **how),
    "whole map": lambda x, **how: salkernels.la_loss(x, x.flip(0), **how),
}
every_form = pytest.mark.parametrize("loss", FORMS.values(), ids=FORMS)


def long_way(loss, x, **how):
    losses = loss(x, reduction="none", **how)
    return losses[PAIRS].mean() if losses.dim() == 2 else losses.mean()


@pytest.fixture
def ways(monkeypatch):
    """How often a known call was run, and its gradient taken, one way or the other."""
    seen = []
    for name in ("forward", "backward", "seen_backward"):
        plain = getattr(_short.Known, name)

        def call(*a, name=name, plain=plain):
            seen.append(name)
            return plain(*a)

        monkeypatch.setattr(_short.Known, name, call)
    return seen


# ---- Results -------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_first_and_later_calls_are_those_of_the_long_way(loss, dtype, layout, ways):
    x = maps(dtype, False).contiguous(memory_format=layout).requires_grad_()
    expected = long_way(loss, x)
    wanted = torch.autograd.grad(expected, x)[0]
    ways.clear()
    for _ in range(3):
        found = loss(x)
        assert (found.shape, found.dtype) == ((), expected.dtype)
        torch.testing.assert_close(found, expected)
        grad = torch.autograd.grad(found, x)[0]
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, wanted)
        with torch.no_grad():
            assert torch.equal(loss(x), found)
    assert ways == ["forward", "backward", "forward"] * 3


def test_maps_of_any_strides():
    wide = torch.randn(12, 4, 5, 12)
    late = wide[6:, :, :, 6:]  # does not begin where its storage does
    for x in (wide[::2, :, :, ::2], wide[:6, :1, :, :6].expand(6, 4, 5, 6), late):
        x = x.detach().requires_grad_()
        for loss in FORMS.values():
            for _ in range(2):
                found, expected = loss(x), long_way(loss, x)
                torch.testing.assert_close(found, expected)
                grads = (torch.autograd.grad(value, x)[0] for value in (found, expected))
                torch.testing.assert_close(*grads)


def test_a_gradient_for_each_map_that_asks():
    x, y = maps(), maps()
    for a, b in ((x, y), (x, y.detach()), (x.detach(), y), (x, x)):
        for _ in range(2):
            loss = salkernels.wla_loss(a, b, 2)
            expected = salkernels.wla_loss(a, b, 2, reduction="none").mean()
            asked = [z for z in {id(a): a, id(b): b}.values() if z.requires_grad]
            torch.testing.assert_close(
                torch.autograd.grad(loss, asked), torch.autograd.grad(expected, asked)
            )


def test_a_mask_that_was_changed_in_place_is_seen():
    x, table = maps(), PAIRS.clone()
    first = salkernels.wla_set_loss(x, table, 2)
    table.numpy()[0, 1] = False  # without torch's knowledge: its version counter stands still
    second = salkernels.wla_set_loss(x, table, 2)
    losses = salkernels.wla_set_loss(x, table, 2, reduction="none")
    torch.testing.assert_close(second, losses[table].mean())
    assert not torch.equal(first, second)
    table.fill_(False)
    assert salkernels.wla_set_loss(x, table, 2) == 0


def test_settings_are_told_apart():
    x = maps(requires_grad=False)
    for window in (2, (2, 2), (1, 2), (2, 1), 3):
        for eps in (1e-12, 3.0):
            for backend in (None, "reference"):
                how = {"eps": eps, "backend": backend}
                found = salkernels.wla_set_loss(x, PAIRS, window, **how)
                losses = salkernels.wla_set_loss(x, PAIRS, window, reduction="none", **how)
                torch.testing.assert_close(found, losses[PAIRS].mean())


# ---- Errors --------------------------------------------------------------------------------------

BAD = {
    "window of a float": lambda x: salkernels.wla_set_loss(x, PAIRS, 2.0),
    "window of a bool": lambda x: salkernels.wla_set_loss(x, PAIRS, True),
    "large window": lambda x: salkernels.wla_set_loss(x, PAIRS, 6),
    "eps of 0": lambda x: salkernels.wla_set_loss(x, PAIRS, 2, eps=0.0),
    "eps of NaN": lambda x: salkernels.wla_set_loss(x, PAIRS, 2, eps=float("nan")),
    "table of another size": lambda x: salkernels.wla_set_loss(x, PAIRS[:, :5], 2),
    "table in a row": lambda x: salkernels.wla_set_loss(x, PAIRS.reshape(-1), 2),
    "table of bytes": lambda x: salkernels.wla_set_loss(x, PAIRS.byte(), 2),
    "integers": lambda x: salkernels.wla_set_loss(x.detach().int(), PAIRS, 2),
    "three axes": lambda x: salkernels.wla_set_loss(x[0], PAIRS, 2),
    "unknown backend": lambda x: salkernels.wla_set_loss(x, PAIRS, 2, backend="gpu"),
    "sparse maps": lambda x: salkernels.wla_set_loss(x.detach().to_sparse(), PAIRS, 2),
    "a list": lambda x: salkernels.wla_set_loss([1.0], PAIRS, 2),
    "reduction": lambda x: salkernels.wla_set_loss(x, PAIRS, 2, reduction="means"),
    "pairs, other dtype": lambda x: salkernels.wla_loss(x, x.double(), 2),
    "pairs, other shape": lambda x: salkernels.wla_loss(x, x[:5], 2),
    "pairs, window": lambda x: salkernels.wla_loss(x, x, (2, 7)),
    "pairs, other device": lambda x: salkernels.wla_loss(x, x.to("meta"), 2),
}


def error_of(call, x):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call(x)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_refused_first_is_refused_after_good_calls(bad):
    x = maps()
    first = error_of(bad, x)
    for window in (1, 2, (2, 2)):
        for _ in range(2):
            salkernels.wla_set_loss(x, PAIRS, window)
            salkernels.wla_loss(x, x, window)
    assert error_of(bad, x) == first


def test_a_window_of_numpy_takes_the_long_way(ways):
    x = maps()
    assert torch.equal(
        salkernels.wla_set_loss(x, PAIRS, np.int64(2)), salkernels.wla_set_loss(x, PAIRS, 2)
    )


# ---- Autograd ------------------------------------------------------------------------------------


@every_form
def test_the_gradient_of_the_gradient(loss, ways):
    """It is linear in what comes from above, and a second derivative in the maps is an error."""
    x = maps(torch.float64)
    above = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        grad = torch.autograd.grad(loss(x), x, above, create_graph=True)[0]
        along = torch.randn_like(grad)
        plain = torch.autograd.grad(long_way(loss, x), x)[0]
        torch.testing.assert_close(
            torch.autograd.grad((grad * along).sum(), above, retain_graph=True)[0],
            (plain * along).sum(),
        )
        with pytest.raises(RuntimeError, match="differentiable once only"):
            torch.autograd.grad(grad.sum(), x)
    assert ways.count("seen_backward") == 2


@every_form
def test_a_batch_of_gradients(loss):
    x = maps(torch.float64)
    loss(x)
    above = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = torch.autograd.grad(loss(x), x, above, is_grads_batched=True)[0]
    plain = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(found, torch.stack([factor * plain for factor in above]))


@every_form
def test_gradcheck(loss):
    x = maps(torch.float64)
    loss(x)
    assert torch.autograd.gradcheck(loss, x)


def test_maps_that_were_changed_before_the_backward_are_an_error():
    x = maps()
    for _ in range(2):
        y = x * 1
        loss = salkernels.wla_set_loss(y, PAIRS, 2)
        with torch.no_grad():
            y += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_hooks_on_saved_tensors_see_the_maxima():
    x = maps()
    loss = FORMS["set"]
    wanted = torch.autograd.grad(loss(x), x)[0]
    for _ in range(2):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(t.shape) or t.clone(), lambda t: t.contiguous()
        ):
            found = loss(x)
        assert (int(PAIRS.sum()), 5, 6) in seen
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted)
    found = checkpoint(loss, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], wanted)


# ---- Who sees what -------------------------------------------------------------------------------


class Looks(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@every_form
def test_a_mode_sees_the_operators_of_a_known_call(loss):
    x = maps(requires_grad=False)
    loss(x)
    with Looks() as mode:
        loss(x)
    assert "salkernels.match.default" in mode.seen


@every_form
def test_autocast_transforms_and_forward_mode_find_no_known_call(loss, ways):
    x = maps(requires_grad=False)
    expected = loss(x)
    ways.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(x), expected)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        loss(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(x)
    assert not ways


class Tagged(torch.Tensor):
    pass


@every_form
def test_a_subclass_keeps_its_type_on_the_long_way(loss, ways):
    x = maps(requires_grad=False)
    expected = loss(x)
    ways.clear()
    assert isinstance(loss(x.as_subclass(Tagged)), Tagged)
    assert torch.equal(loss(x.as_subclass(Tagged)).as_subclass(torch.Tensor), expected)
    assert not ways


# ---- Keeping -------------------------------------------------------------------------------------


def test_calls_are_kept_within_bounds():
    x = maps(requires_grad=False)
    for i in range(2 * _kept.MOST):
        table = PAIRS.clone()
        table.view(-1)[:8] ^= torch.tensor([i >> b & 1 for b in range(8)]).bool()
        salkernels.wla_set_loss(x, table, 2)
    assert len(_kept.RECENT) == _kept.MOST
    assert _kept.RECENT.bytes <= _kept.MOST_BYTES


def test_no_map_is_kept():
    import gc
    import weakref

    x = maps()
    salkernels.wla_set_loss(x, PAIRS, 2).backward()
    salkernels.wla_loss(x, x.detach(), 2).backward()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_made_in_inference_mode_it_serves_training_too():
    x = maps()
    with torch.inference_mode():
        expected = salkernels.wla_set_loss(x, PAIRS, 2)
    loss = salkernels.wla_set_loss(x, PAIRS, 2)
    assert torch.equal(loss, expected)
    loss.backward()


def test_made_in_inference_mode_its_gradient_can_be_differentiated():
    x, pairs = maps(), PAIRS.roll(1, 0)
    found = []
    for first in (contextlib.nullcontext, torch.inference_mode):
        _kept.RECENT._entries.clear()
        with first():
            salkernels.wla_set_loss(x.detach(), pairs, 2)
        weight = torch.ones((), requires_grad=True)
        loss = salkernels.wla_set_loss(x, pairs, 2) * weight
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found += torch.autograd.grad(grad.norm(), weight)
    assert found[0] == found[1] > 0


def test_a_signal_handler_may_call_a_loss_inside_of_a_look_up():
    done = threading.Event()

    def interrupted():
        with _kept.RECENT._lock:  # where the handler runs
            salkernels.wla_set_loss(maps(), PAIRS, 2)
        done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_may_fork_while_a_thread_is_in_a_look_up():
    inside = threading.Event()

    def look_up():
        with _kept.RECENT._lock:
            inside.set()
            time.sleep(0.3)

    thread = threading.Thread(target=look_up)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        _kept.RECENT.get("anything", 0, False)
        os._exit(0)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_streams_have_calls_of_their_own_and_a_capture_takes_any(monkeypatch):
    stream, capturing = [1], [False]
    monkeypatch.setattr(_kept, "_has_streams", lambda device: True)
    monkeypatch.setattr(_kept, "stream_of", lambda device: stream[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    x = maps(requires_grad=False)
    key = _short.key_of_set(x, PAIRS, 2, 1e-12, "reference")
    salkernels.wla_set_loss(x, PAIRS, 2, backend="reference")
    first = _short.find(key)
    assert first is not None
    stream[0] = 2
    assert _short.find(key) is None
    capturing[0] = True
    assert _short.find(key) is first
    assert _kept.RECENT.captured[id(first)] is first
    # What is made in a capture is of its memory: nobody else may find it.
    salkernels.wla_loss(x, x, 2, backend="reference")
    capturing[0] = False
    assert _short.find(_short.key_of_pairs(x, x, 2, 1e-12, "reference")) is None


def test_threads_share_known_calls():
    x, wrong = maps(requires_grad=False), []
    tables = [PAIRS.clone() for _ in range(4)]
    for i, table in enumerate(tables):
        table[0, 1 : 1 + i] = False
    expected = [salkernels.wla_set_loss(x, table, 2) for table in tables]

    def work(seed):
        for i in range(100):
            which = (i * seed) % 4
            leaf = x.clone().requires_grad_()
            loss = salkernels.wla_set_loss(leaf, tables[which], 2)
            loss.backward()
            if not torch.equal(loss, expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
