"""The registry: names, order, reasons, and that the chosen backend is the one that runs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import salkernels
from salkernels import backends, reference
from salkernels.backends import measured

X, Y = torch.randn(2, 2, 3, 4, 5)
PAIRS = torch.tensor([[False, True], [True, False]])


@pytest.fixture
def fake(monkeypatch):
    """A backend in front of all others that refuses maps of odd height and counts its calls."""
    calls = []

    def forward(*args):
        calls.append("forward")
        return reference.match(*args)

    def backward(*args):
        calls.append("backward")
        return reference.match_backward(*args)

    def why_not(query, key, window):
        return "the height is odd" if query.shape[-2] % 2 else None

    module = SimpleNamespace(
        status=lambda: None,
        why_not=why_not,
        match=forward,
        match_backward=backward,
        calls=calls,
    )
    monkeypatch.setattr(backends, "BACKENDS", {"fake": module, **backends.BACKENDS})
    return module


CALLS = {
    "wla": lambda x, **settings: salkernels.wla_loss(x, Y[:, :, : x.shape[2]], 2, **settings),
    "la": lambda x, **settings: salkernels.la_loss(x, Y[:, :, : x.shape[2]], **settings),
    "set": lambda x, **settings: salkernels.wla_set_loss(x, PAIRS, 2, **settings),
    "sal": lambda x, **settings: (
        salkernels.sal_loss(
            x, torch.eye(2), *torch.tensor([[0, 0], [1, 2], [9, 9]]), 2, **settings
        ).loss
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_first_that_can_run_is_used_forward_and_backward(call, fake):
    x = X.clone().requires_grad_()
    call(x).backward()
    assert fake.calls == ["forward", "backward"]
    expected = X.clone().requires_grad_()
    call(expected, backend="reference").backward()
    assert fake.calls == ["forward", "backward"]
    assert torch.equal(x.grad, expected.grad)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_refusal_falls_back_in_silence_but_not_for_a_name(call, fake):
    odd = X[:, :, :3].clone().requires_grad_()
    call(odd).backward()
    assert fake.calls == []
    with pytest.raises(RuntimeError, match=r"'fake' cannot run this input: the height is odd"):
        call(odd, backend="fake")


def test_modules_hand_on_the_backend(fake):
    salkernels.WLALoss(2, backend="reference")(X, Y)
    assert fake.calls == []
    salkernels.WLALoss(2, backend="fake")(X, Y)
    salkernels.align(X, Y, 2, backend="fake")
    ids = torch.tensor([[0, 0], [1, 2], [9, 9]])
    salkernels.SALLoss(2, backend="fake")(X, torch.eye(2), *ids)
    assert fake.calls == ["forward"] * 3


def test_explain_reports_the_reason_for_this_input(fake):
    even, odd = salkernels.explain(X, 2), salkernels.explain(X[:, :, :3], (1, 2), Y[:, :, :3])
    assert even[0].name == odd[0].name == "fake"
    assert even[0].available
    assert not odd[0].available
    assert odd[0].reason == "the height is odd"
    assert "the height is odd" in str(odd[0])
    assert "available" in str(even[0])


def test_backends_come_in_the_order_of_preference(fake):
    names = [status.name for status in salkernels.backends()]
    assert names == ["fake", "cuda", "triton", "cpu", "reference"]
    assert salkernels.backends()[0].available  # on the machine; an input may still be refused


def test_the_reference_runs_always(device):
    statuses = {status.name: status for status in salkernels.backends()}
    assert statuses["reference"].available
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.ones(1, 2, 3, 5, device=device, dtype=dtype)
        assert salkernels.explain(x, (3, 5), x)[-1].available


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown backend 'gpu'") as caught:
        salkernels.wla_loss(X, Y, 2, backend="gpu")
    assert all(name in str(caught.value) for name in backends.BACKENDS)


def test_a_missing_backend_says_why():
    for name, backend in backends.BACKENDS.items():
        reason = backend.status()
        if reason is None:
            continue
        with pytest.raises(RuntimeError, match=f"'{name}' cannot run this input") as caught:
            salkernels.wla_loss(X, Y, 2, backend=name)
        assert "backend=None" in str(caught.value)
        assert (backend.why_not(X, Y, (2, 2)) or reason) in str(caught.value)


def test_no_backend_at_all(monkeypatch):
    refuses = SimpleNamespace(status=lambda: "no GPU here", why_not=lambda *_: "no GPU here")
    left = {"cuda": refuses}
    monkeypatch.setattr(backends, "BACKENDS", left)
    with pytest.raises(RuntimeError, match="no backend can run this input"):
        salkernels.wla_loss(X, Y, 2)


def test_the_operator_itself_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend"):
        torch.ops.salkernels.match(X[:, None], Y[:, None], None, None, [2, 2], 1e-12, "gpu")


def test_the_package_of_backends_is_the_function_that_lists_them():
    import salkernels.backends as by_import

    assert by_import is salkernels.backends
    assert by_import() == salkernels.backends.statuses()
    assert isinstance(by_import()[0], salkernels.backends.BackendStatus)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_the_operator_itself_refuses_maps_without_a_channel_or_a_pixel(axis, backend, device):
    """The public functions do, too; it must not come to a division by zero below them."""
    x = torch.randn(1, 2, 3, 4, 5, device=device)
    rest = (None, None, None, [1, 1], 1e-12)
    loss, *kept = torch.ops.salkernels.match(x, *rest, backend)
    empty = x.narrow(axis, 0, 0)
    message = "at least one channel and one pixel"
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.salkernels.match(empty, *rest, backend)
    with pytest.raises(ValueError, match=message):
        torch.ops.salkernels.match(empty.to("meta"), *rest, "reference")
    if backend in ("cpu", "cuda", "reference"):
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.salkernels.match_backward(
                kept[0], empty, None, None, None, *kept, [1, 1], 1e-12, backend
            )


@pytest.fixture
def both_on_a_gpu(monkeypatch):
    """A machine where `cuda` and `triton` can run whatever is on a GPU."""
    real = backends.BACKENDS

    def standing_for(name):
        return SimpleNamespace(
            DEVICES=real[name].DEVICES,
            status=lambda: None,
            why_not=lambda query, key, window: (
                f"no {query.dtype}" if query.dtype not in real[name].DTYPES else None
            ),
        )

    fakes = {name: standing_for(name) for name in ("cuda", "triton")}
    monkeypatch.setattr(backends, "BACKENDS", {**real, **fakes})


def on_a_gpu(samples, dtype=torch.float32):
    with FakeTensorMode():
        return torch.empty(samples, 8, 12, 12, device="cuda", dtype=dtype)


@pytest.mark.parametrize(
    ("pairwise", "window", "dtype", "first"),
    [
        (False, (2, 2), torch.float32, "triton"),
        (False, (3, 3), torch.float32, "cuda"),
        (False, (2, 2), torch.bfloat16, "cuda"),
        (False, (3, 3), torch.float16, "triton+cuda"),
        (False, (6, 6), torch.bfloat16, "cuda"),
        (False, (11, 11), torch.bfloat16, "triton"),
        (False, (2, 2), torch.float64, "cuda"),  # triton does not take it
        (True, (2, 2), torch.float32, "cuda"),  # was not measured
    ],
)
def test_on_a_gpu_the_order_goes_by_dtype_and_window(pairwise, window, dtype, first, both_on_a_gpu):
    x = on_a_gpu(32, dtype)
    y = x if pairwise else None
    assert backends.select(None, x, y, window) == first
    order = [status.name for status in salkernels.explain(x, window, y)]
    assert order[0] == first
    rest = [name for name in backends.BACKENDS if name != first]
    assert [name for name in order[1:] if "+" not in name] == rest
    assert next(s.name for s in salkernels.explain(x, window, y) if s.available) == first


def test_rules_do_not_overlap_and_name_backends():
    for rule in measured.RULES:
        assert backends.get(rule.names)
        assert rule.min_pixels <= rule.max_pixels
    for itemsize in (2, 4):
        own = sorted(rule for rule in measured.RULES if rule.itemsize == itemsize)
        for before, after in itertools.pairwise(own):
            assert before.max_pixels < after.min_pixels


def test_without_triton_cuda_does_both_passes(both_on_a_gpu, monkeypatch):
    missing = SimpleNamespace(why_not=lambda *_: "it is not installed", DEVICES=("cuda",))
    monkeypatch.setitem(backends.BACKENDS, "triton", missing)
    assert backends.select(None, on_a_gpu(32), None, (2, 2)) == "cuda"


def test_two_names_are_one_backend_for_each_pass(monkeypatch):
    seen = []

    def recording(name):
        def run(what):
            def call(*arguments):
                seen.append(f"{name} {what}")
                return getattr(reference, what)(*arguments)

            return call

        return SimpleNamespace(
            why_not=lambda *_: None,
            match=run("match"),
            match_backward=run("match_backward"),
        )

    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends.BACKENDS, name, recording(name))
    features = torch.randn(4, 3, 4, 4, requires_grad=True)
    pairs = ~torch.eye(4, dtype=torch.bool)
    salkernels.wla_set_loss(features, pairs, 2, backend="cuda+triton").backward()
    salkernels.wla_set_loss(features, pairs, 2, backend="triton+cuda").backward()
    assert seen == ["cuda match", "triton match_backward", "triton match", "cuda match_backward"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_orders_by_what_is_known(dynamic, both_on_a_gpu):
    """A size that is a symbol stays one."""
    first = "triton"

    def chosen(x):
        return x.new_empty(len(backends.select(None, x, None, (2, 2))))

    torch.compiler.reset()
    traced = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
    assert len(traced(on_a_gpu(32))) == len(first)
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            assert len(traced(on_a_gpu(16))) == len(first)


@pytest.mark.parametrize("name", ["cuda", "triton+cuda", "cuda+triton", "triton"])
def test_on_a_gpu_triton_computes_the_negatives_where_it_can(name, both_on_a_gpu, monkeypatch):
    """`reference` does what it cannot, such as fp64, and on CPUs: there only a name asks for it."""
    real = backends.triton

    def why_not(query, key, window):
        return None if query.dtype in real.DTYPES else "not this dtype"

    monkeypatch.setattr(real, "why_not", why_not)
    monkeypatch.setitem(backends.BACKENDS, "triton", real)

    def chosen(x):
        return backends.for_negatives(name, x, None, (2, 2))

    assert chosen(on_a_gpu(32)) is real
    for x in (on_a_gpu(32, torch.float64), torch.ones(4, 8, 12, 12)):
        assert chosen(x) is (real if name == "triton" else backends.BACKENDS["reference"])
    said = {s.name: s.negatives for s in salkernels.explain(on_a_gpu(32), 2)}
    assert said == {
        "triton": "triton",
        "cuda": "triton",
        "cpu": said["cpu"],
        "reference": "reference",
    }
    said = {s.name: s.negatives for s in salkernels.explain(on_a_gpu(32, torch.float64), 2)}
    assert said["cuda"] == "reference"


@pytest.mark.parametrize("found", [True, False])
def test_what_is_known_of_the_negatives_without_an_input(found, monkeypatch):
    monkeypatch.setattr(backends.triton, "status", lambda: None if found else "no GPU")
    monkeypatch.setattr(backends.triton, "INTERPRETED", False)
    said = {s.name: s.negatives for s in salkernels.backends()}
    assert said["cuda"] == ("triton" if found else "reference")
    assert said["triton"] == "triton"
    assert said["cpu"] != "triton"
