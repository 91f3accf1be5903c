"""What a call does on the host besides its kernels: counted, since times depend on the machine."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import salkernels
from salkernels import _kept, _short, library
from salkernels.backends import BACKENDS, triton
from salkernels.reference import Outputs

SAMPLES, CHANNELS, SIDE = 8, 4, 4
FORWARD, BOTH = 20, 30  # functions of ours
HERE = str(Path(salkernels.__file__).parent)
PAIRS = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool().fill_diagonal_(False)


@pytest.fixture
def stubbed(monkeypatch):
    """A backend of that name that only makes its results, on a CPU that plays a GPU."""

    def match(query, key, pairs, *_):
        count = query.shape[0] if pairs is None else len(pairs)
        maps = torch.zeros(count, SIDE, SIDE)
        return Outputs(torch.zeros(count), maps, maps.byte(), torch.zeros(1))

    def match_backward(grad_sim, query, key, *_):
        return torch.zeros_like(query), None if key is None else torch.zeros_like(key)

    backend = SimpleNamespace(
        status=lambda: None,
        why_not=lambda *_: None,
        match=match,
        match_backward=match_backward,
    )
    monkeypatch.setitem(BACKENDS, "stub", backend)
    monkeypatch.setattr(_kept, "RECENT", _kept.Recent())
    monkeypatch.setattr(_kept, "_has_streams", lambda device: True)
    monkeypatch.setattr(_kept, "stream_of", lambda device: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def counted(run):
    """How often each function is called in the third of three calls, by where it is from."""
    run()
    run()
    found = Counter()

    def look(frame, event, function):
        if event == "call" and frame.f_code.co_filename.startswith(HERE):
            found["ours"] += 1
        elif event == "c_call" and isinstance(getattr(function, "__self__", None), torch.Tensor):
            found[function.__name__] += 1

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


QUESTIONS = {"dim", "numel", "numpy", "stride", "data_ptr", "is_inference", "untyped_storage"}
STUB = {"byte"}


def made(found):
    """Methods of tensors that make one."""
    return set(found) - QUESTIONS - STUB - {"ours"}


@pytest.mark.usefixtures("stubbed")
def test_a_warm_forward_finds_its_list_again():
    """No `nonzero`, no search for scans, no copy, and nothing kept for a backward. The budget of
    functions is today's and a tenth."""
    features = torch.randn(SAMPLES, CHANNELS, SIDE, SIDE)

    def forward():
        with torch.no_grad():
            salkernels.wla_set_loss(features, PAIRS, 2, backend="stub")

    found = counted(forward)
    assert made(found) == {"view", "mean"}
    assert found["ours"] <= FORWARD


@pytest.mark.usefixtures("stubbed")
def test_a_warm_backward_passes_over_the_maxima_once():
    features = torch.randn(SAMPLES, CHANNELS, SIDE, SIDE, requires_grad=True)

    def both():
        salkernels.wla_set_loss(features, PAIRS, 2, backend="stub").backward()

    found = counted(both)
    assert made(found) == {"view", "mean"}
    assert found["ours"] <= BOTH


@pytest.mark.usefixtures("stubbed")
def test_without_a_gradient_to_come_autograd_is_left_out(monkeypatch):
    features = torch.randn(SAMPLES, CHANNELS, SIDE, SIDE)
    monkeypatch.setattr(library._Match, "apply", None)
    monkeypatch.setattr(_short._Mean, "apply", None)
    assert not salkernels.wla_set_loss(features, PAIRS, 2, backend="stub").requires_grad
    features.requires_grad_()
    with torch.no_grad():
        salkernels.wla_set_loss(features, PAIRS, 2, backend="stub")
    with pytest.raises(TypeError, match="NoneType"):
        salkernels.wla_set_loss(features, PAIRS, 2, backend="stub")
    with pytest.raises(TypeError, match="NoneType"):
        salkernels.wla_set_loss(features.detach(), PAIRS, 2, keys=features, backend="stub")


# ---- The derivative of the penalty ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_penalty_in_one_pass_is_the_same(dtype):
    count, height, width = 7, 3, 5
    maxima = 2 * torch.rand(height, width, count, dtype=dtype).permute(2, 0, 1)
    eps = torch.finfo(dtype).eps
    maxima[0, 0] = torch.tensor([1, 1 + eps, 1 - eps / 2, -1, torch.inf], dtype=dtype)
    for grad in (torch.rand(count, dtype=dtype), torch.full((1,), 0.3, dtype=dtype).expand(count)):
        found = library._penalty_gradient_at_once(grad, maxima)
        expected = library.penalty_gradient(grad, maxima)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    maxima[1, 0, 0] = torch.nan
    assert library._penalty_gradient_at_once(grad, maxima).isnan().sum() == 1


def test_who_differentiates_the_gradient_gets_the_one_that_can_be(monkeypatch):
    monkeypatch.setattr(library, "_penalty_gradient_at_once", None)
    features = torch.randn(3, 4, 6, 6, requires_grad=True)
    pairs = ~torch.eye(3, dtype=torch.bool)
    losses = salkernels.wla_set_loss(features, pairs, 2, reduction="none")[pairs]
    torch.autograd.grad(losses.sum(), features, create_graph=True)
    torch.autograd.grad(losses, features, torch.eye(6), is_grads_batched=True, retain_graph=True)
    with pytest.raises(TypeError, match="NoneType"):
        torch.autograd.grad(losses.sum(), features)


# ---- Triton --------------------------------------------------------------------------------------


def test_maps_that_lie_right_are_not_touched():
    maps = torch.rand(3, 4, 5).permute(2, 0, 1)
    assert triton._pixel_by_pixel(maps) is maps
    assert triton._pixel_by_pixel(maps.contiguous()).stride() == maps.stride()
    assert torch.equal(triton._pixel_by_pixel(maps.contiguous()), maps)
    one = torch.rand(1, 4, 5)
    assert triton._pixel_by_pixel(one).permute(1, 2, 0).is_contiguous()


def test_the_parts_of_arguments_are_looked_at_too():
    launcher = pytest.importorskip("salkernels.triton_kernels.launcher")
    even = torch.zeros(64)
    odd = even[1:]
    places = tuple(launcher._tensors((even, (None, even, 3), (1, 2), 0.5, None, (even,))))
    assert places == ((0, None), (1, (1,)), (5, (0,)))
    keys = set()
    for a in (even, odd):
        for b in (even, odd):
            for c in (even, odd):
                given = (a, (None, b, 3), (1, 2), 0.5, None, (c,))
                found, key = launcher._addressed(given, places)
                assert found == [
                    *(a.data_ptr(), (None, b.data_ptr(), 3), (1, 2), 0.5, None),
                    (c.data_ptr(),),
                ]
                keys.add(key)
    assert len(keys) == 8


def test_tf32_and_tiles_are_part_of_what_is_asked(monkeypatch, tmp_path):
    """What may change between two calls on the same maps."""
    launch = pytest.importorskip("salkernels.triton_kernels.launch")
    config = pytest.importorskip("salkernels.triton_kernels.config")
    monkeypatch.setattr(launch, "capability", lambda _: 90)
    maps = torch.empty(1, 2, 4, 4, 4)
    problem = launch.Problem(maps, None, None, None, (2, 2), 1e-12)

    def asked():
        return launch.Asked.by(problem, launch.FORWARD)

    plain = asked()
    assert asked() == plain
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert asked() != plain
        assert asked().signature(gradient=False).product.PRECISION == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert plain.signature(gradient=False).product.PRECISION == "tf32x3"
    tile = config.Tile(32, 16, 2, 1)
    config.write(tmp_path / "tiles.json", {("match", torch.float32, 90): tile})
    monkeypatch.setenv(config.FILE_VARIABLE, str(tmp_path / "tiles.json"))
    assert asked().tiles == (tile, *plain.tiles[1:])
    problem = problem._replace(query=maps.movedim(2, -1).contiguous().movedim(-1, 2))
    assert asked().strides != plain.strides


class Compiled:
    """In place of Triton's: what it is launched with."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self):
        self.seen = []

    def run(self, *words):
        self.seen.append(words)

    def __getitem__(self, grid):
        return lambda *arguments: self.seen.append((grid, *arguments))


def test_a_warm_launch_hands_over_addresses(monkeypatch):
    launcher = pytest.importorskip("salkernels.triton_kernels.launcher")
    tile = pytest.importorskip("salkernels.triton_kernels.config").Tile(0, 0, 4, 1)
    compiled = Compiled()
    jit = Counter()

    class Kernel:
        def __getitem__(self, grid):
            jit[grid] += 1
            return lambda *_, **__: compiled

    launch = launcher.Launcher(Kernel(), tile, 5, FORM=3)
    even, odd = torch.zeros(8), torch.zeros(9)[1:]
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(launcher, "_HOOKS", hooks)
    for x in (even, odd, even, odd):
        launch((x, None), 2, stream=11)
    assert jit == {(5,): 2}, "compiled once for each alignment"
    expected = (5, 1, 1, 11, 7, (4, 1, 0), None, None, None)
    assert compiled.seen == [(*expected, (x.data_ptr(), None), 2, 3) for x in (even, odd)]
    compiled.seen.clear()
    for watched in (
        hooks.__dict__ | {"launch_enter_hook": print},
        hooks.__dict__ | {"launch_exit_hook": SimpleNamespace(calls=[print])},
        None,
    ):
        monkeypatch.setattr(launcher, "_HOOKS", watched and SimpleNamespace(**watched))
        launch((even, None), 2, stream=11)
    assert [words[0] for words in compiled.seen] == [(5, 1, 1)] * 3, "through Triton's own launch"


def test_the_plan_of_a_list_that_never_changes_is_made_once(monkeypatch):
    launcher = pytest.importorskip("salkernels.triton_kernels.launcher")
    launch = pytest.importorskip("salkernels.triton_kernels.launch")
    made = []
    monkeypatch.setattr(launcher.Launcher, "__call__", lambda self, *a, **_: made.append(a[0]))
    problem = launch.Problem(torch.empty(1, 8, 4, 4, 4), None, torch.arange(5), None, (2, 2), 1.0)
    layout = launch.Layout.of(launch.Asked.by(problem, launch.FORWARD).signature(False))
    plan, other = launcher.planner(layout), launcher.planner(layout, ordered=not layout.ordered)
    listed = torch.arange(5)
    assert plan(listed, 5, 0) is not plan(listed, 5, 0), "a list of the caller's, who may change it"
    _kept._allow_notes((listed, 3, None))
    monkeypatch.setattr(_kept, "capturing", lambda device: True)
    plan(listed, 5, 0)
    assert not _kept.notes_of(listed), "memory of a graph is the graph's"
    monkeypatch.setattr(_kept, "capturing", lambda device: False)
    first = plan(listed, 5, 0)
    assert plan(listed, 5, 0) is first
    assert launcher.planner(layout)(listed, 5, 0) is first, "of the backward, too"
    assert other(listed, 5, 0) is not first
    assert len(made) == 5
