"""The Triton backend beyond the tables that all backends share: tiles, tuning, what it says."""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import types
from unittest.mock import MagicMock

import pytest
import torch
from cases import F32, F64
from targets import runs_on

import salkernels
from salkernels.backends import select
from salkernels.backends import triton as backend

pytest.importorskip("triton")
from triton_check import (  # noqa: F401
    DEVICE,
    EPS,
    compare,
    listed,
    maps,
    runs,
    small_tiles,
    some_pairs,
)

from salkernels.triton_kernels import config, launch, tune
from salkernels.triton_kernels.config import Tile
from salkernels.triton_kernels.geometry import Product, Strides
from salkernels.triton_kernels.launcher import Launcher, planner
from salkernels.triton_kernels.layout import Layout, Problem, Signature


@runs
@pytest.mark.parametrize("density", [0.08, 0.5])
def test_a_set_in_several_tiles(density, small_tiles):  # noqa: F811
    """17 samples at 2 x 2 are three tiles; few pairs leave tile pairs empty, many do not."""
    compare(maps(1, 17, 5, 2, 3), None, some_pairs(1, 17, 17, density), (2, 2))


@runs
def test_every_pair_of_a_set_in_several_tiles(small_tiles):  # noqa: F811
    compare(maps(1, 18, 5, 2, 2), None, None, (2, 2))


@runs
def test_groups_of_queries_and_keys_in_several_tiles(small_tiles):  # noqa: F811
    keys = maps(2, 5, 5, 2, 2, layout="channels_last")
    compare(maps(2, 6, 5, 2, 2), keys, some_pairs(2, 6, 5), (2, 2))


@runs
def test_many_pairs_in_one_tile(small_tiles):  # noqa: F811
    compare(maps(11, 1, 5, 2, 2), maps(11, 1, 5, 2, 2), None, (2, 2))


@runs
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_windows_larger_than_a_tile(dtype, small_tiles):  # noqa: F811
    """Streamed, with a last block that is not full and an edge window that is smaller."""
    mask = torch.tensor([[[False, True], [True, True]]], device=DEVICE)
    compare(maps(1, 2, 20, 7, 9, dtype=dtype), None, listed(mask), (7, 6))


@runs
def test_other_keys_in_windows_larger_than_a_tile(small_tiles):  # noqa: F811
    compare(maps(2, 1, 20, 6, 7), maps(2, 2, 20, 6, 7, layout="channels_last"), None, (6, 6))


def planned(mask, nodes, keys=None, room=0):
    """The plan of 2 x 2 windows of that many nodes, in tiles of 32 rows."""
    shape = (mask.shape[0], nodes, 1, 2, 2)
    key = None if keys is None else torch.Size((mask.shape[0], keys, 1, 2, 2))
    strides = (Strides(*torch.empty(shape).stride()),) * 2
    tiles = (Tile(32, 16, 4, 1),) * 3
    signature = Signature(
        torch.Size(shape), key, (2, 2), F32, strides, True, False, Product("ieee", True), tiles
    )
    layout = Layout(signature, tiles[0], 32, 4)
    assert layout.ordered
    pairs = listed(mask, room)
    return planner(layout)(pairs, len(pairs), stream=0)


@runs
def test_slices_of_one_scan_come_together():
    """Views of two scans in turn: sorted, each scan is one run, and no pair crosses."""
    volume = torch.tensor([0, 1], device=DEVICE).repeat_interleave(4).repeat(4)
    mask = (volume[:, None] == volume) & ~torch.eye(32, dtype=torch.bool, device=DEVICE)
    order = planned(mask[None], 32).order[0].long()
    assert sorted(order.tolist()) == list(range(32))
    assert len(volume[order].unique_consecutive()) == 2


@runs
@pytest.mark.parametrize(
    ("groups", "queries", "keys"), [(1, 33, None), (3, 17, None), (2, 9, 14), (1, 70, None)]
)
def test_the_plan_is_that_of_plain_torch(groups, queries, keys):
    mask = torch.rand(groups, queries, keys or queries, device=DEVICE) < 0.15
    found = planned(mask, queries, keys, room=5)
    count = int(mask.count_nonzero())
    numbers = torch.full(mask.shape, -1, dtype=torch.int32, device=DEVICE)
    numbers[mask] = torch.arange(count, dtype=torch.int32, device=DEVICE)
    assert torch.equal(found.slots, numbers)
    if queries > 64:
        assert found.order is None, "more nodes than one program orders: as they come"
    else:
        assert torch.equal(found.order, order_of(mask, keys))


def order_of(mask, keys):
    """Nodes by the lowest node within three steps along pairs."""
    samples = mask.shape[1]
    nodes = samples + (keys or 0)
    linked = torch.eye(nodes, dtype=torch.bool, device=DEVICE).repeat(len(mask), 1, 1)
    if keys is None:
        linked |= mask | mask.mT
    else:
        linked[:, :samples, samples:] = mask
        linked[:, samples:, :samples] = mask.mT
    label = torch.arange(nodes, device=DEVICE).expand(len(mask), nodes)
    for _ in range(3):
        label = torch.where(linked, label[:, None, :], nodes).amin(dim=2)
    return label.argsort(dim=1, stable=True).to(torch.int32)


@runs
def test_without_a_list_nothing_is_planned():
    x = torch.zeros(1, 33, 1, 2, 2, device=DEVICE)
    asked = launch.Asked.by(Problem(x, None, None, None, (2, 2), EPS), launch.FORWARD)
    signature = asked.signature(gradient=False)
    assert planner(Layout.of(signature))(None, 33 * 33, 0) == (None, None)


class Compiled:
    """In place of what Triton compiles: records launches."""

    def __init__(self):
        self.calls = []

    function, packed_metadata = 7, (4, 1, 0)

    def run(self, *words):
        self.calls.append((words[:3], words[9:]))


def test_a_second_launch_takes_what_the_first_compiled():
    compiled, asked = Compiled(), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: asked.append((grid, constants)) or compiled

    launcher = Launcher(Kernel(), Tile(32, 16, 4, 1), 7, FORM="form")
    x = torch.zeros(64)
    for tensor in (x, x[4:], x[1:], x[5:]):  # two that start at 16 bytes, and two that do not
        launcher((tensor, None), 3, stream=0)
    assert [grid for grid, _ in asked] == [(7,), (7,)]
    assert asked[0][1]["num_warps"] == 4
    assert [grid for grid, _ in compiled.calls] == [(7, 1, 1)] * 2
    assert compiled.calls[0][1][1:] == (3, "form"), "constants follow the arguments"


@runs
def test_how_a_call_is_cut_is_worked_out_once_whatever_its_pairs():
    x = maps(1, 6, 5, 4, 4)
    launch._forward.cache_clear()
    for count in (1, 5, 16):
        backend.match(x, None, torch.arange(1, count + 1, device=DEVICE), None, (2, 2), EPS)
    assert launch._forward.cache_info().misses == 1
    backend.match(x, None, None, None, (2, 2), EPS)
    assert launch._forward.cache_info().misses == 2


@runs
@pytest.mark.parametrize("room", [0, 9])
def test_more_nodes_than_the_plan_kernel_holds(room, small_tiles):  # noqa: F811
    """A band: each sample with the next, 70 of them."""
    index = torch.arange(70, device=DEVICE)
    mask = (index[:, None] + 1 == index)[None]
    compare(maps(1, 70, 3, 1, 2), None, listed(mask, room), (1, 2))


@runs
def test_memory_beyond_the_features_is_a_few_percent():
    """At the paper's shape: matches, norms and partial sums, in bytes."""
    query = torch.empty(1, 32, 384, 44, 44, device="meta")
    found = backend.outputs(query, None, torch.empty(272, device="meta"), (2, 2))
    partial = 4 * 22 * 22 * 272
    kept = sum(tensor.numel() * tensor.element_size() for tensor in found)
    assert kept + partial <= 0.1 * query.numel() * query.element_size()


def test_fp64_is_refused_with_the_way_out():
    x = torch.zeros(1, 2, 3, 4, dtype=F64)
    status = {s.name: s for s in salkernels.explain(x, 2)}["triton"]
    assert not status.available
    if backend.status() is None:
        assert "got torch.float64: use the reference" in status.reason


def hand_made(spec):
    module = types.ModuleType("triton")
    module.__spec__ = spec
    return module


@pytest.fixture
def fresh_status():
    backend._ask.cache_clear()
    yield
    backend._ask.cache_clear()


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (hand_made(None), "not the real one"),  # as serving libraries do
        (hand_made(importlib.machinery.ModuleSpec("triton", None)), "not the real one"),
        (MagicMock(), "not the real one"),
        (types.SimpleNamespace(jit=None), "not the real one"),
        (None, "not installed"),  # which makes an import fail
    ],
    ids=["without a spec", "without a loader", "a mock", "a namespace", "none"],
)
def test_a_placeholder_in_place_of_triton(stand_in, reason, monkeypatch, fresh_status):
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    x = torch.zeros(1, 2, 3, 4)
    for statuses in (salkernels.backends(), salkernels.explain(x, 2)):
        status = {s.name: s for s in statuses}["triton"]
        assert reason in status.reason
    with pytest.raises(RuntimeError, match=reason):
        salkernels.wla_loss(x, x, 2, backend="triton")


def test_the_report_says_that_a_placeholder_is_one():
    code = """
import runpy, sys, torch, types
sys.modules["triton"] = types.ModuleType("triton")
runpy.run_module("salkernels", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not the real one" in done.stdout


@runs_on("triton", "cpu")
@pytest.mark.parametrize(
    ("triton", "numpy", "runs_there"),
    [("3.6.0", "2.4.0", False), ("3.6.2", "2.5.1", False), ("3.6.0", "2.3.5", True),
     ("3.7.0", "2.5.0", True), ("3.10.1+git12", "3.0.0rc1", True)],
)  # fmt: skip
def test_versions_on_which_the_interpreter_does_not_run(
    triton, numpy, runs_there, monkeypatch, fresh_status
):
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    reason = backend.status()
    assert (reason is None) == runs_there
    if not runs_there:
        assert "triton 3.7 or newer, or numpy before 2.4" in reason


def test_without_a_gpu_a_call_by_name_says_what_is_missing():
    code = """
import torch, salkernels
torch.cuda.is_available = lambda: False
x = torch.zeros(1, 2, 3, 4)
try:
    salkernels.wla_loss(x, x, 2, backend="triton")
except RuntimeError as error:
    print(error)
assert salkernels.wla_loss(x, x, 2) == 1  # and without a name another one runs
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "backend 'triton' cannot run this input" in done.stdout
    assert "GPU" in done.stdout or "built for CPUs only" in done.stdout


@runs_on("triton", "cpu")
def test_the_interpreter_runs_by_name_only():
    x = torch.randn(1, 2, 3, 4)
    assert {s.name: s for s in salkernels.explain(x, 2)}["triton"].available
    assert select(None, x, None, (2, 2)) != "triton"
    assert select("triton", x, None, (2, 2)) == "triton"


KEY = ("match", F32, 90)


def test_a_file_of_tiles_replaces_the_table(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    config.write(path, {KEY: Tile(32, 64, 8, 2)})
    monkeypatch.setenv(config.FILE_VARIABLE, str(path))
    assert config.tile_for(*KEY) == Tile(32, 64, 8, 2)
    assert config.tile_for("match", F32, 80) == config.TABLE["match", F32]
    assert config.tile_for("gradient", F32, 90) == config.TABLE["gradient", F32]
    assert config.tile_for("match", F32, 0) == config.INTERPRETER


@pytest.mark.parametrize("text", [None, "{", '[{"kernel": "match"}]', "[1]"])
def test_a_bad_file_of_tiles_is_named(text, tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(config.FILE_VARIABLE, str(path))
    with pytest.raises(ValueError, match="no table of tiles") as caught:
        config.tile_for(*KEY)
    assert str(path) in str(caught.value)


def test_sm_100_has_tiles_of_its_own():
    assert config.tile_for("gradient", torch.bfloat16, 100) != config.tile_for(
        "gradient", torch.bfloat16, 90
    )


def test_tuning_takes_the_fastest_that_runs(capsys):
    times = {Tile(64, 16, 4, 1): 3.0, Tile(64, 32, 4, 1): 1.0, Tile(64, 64, 4, 1): None}
    tried = []

    def measure(best_so_far):
        tile = config.tile_for(*KEY)
        tried.append(tile)
        if times[tile] is None:
            raise RuntimeError("out of resource: shared memory")
        return tune.Time(times[tile], 0.1)

    chosen, found = tune.best(KEY, list(times), measure)
    assert tried == list(times)
    assert chosen == Tile(64, 32, 4, 1)
    assert len(found) == 2
    assert config.tile_for(*KEY) == config.TABLE["match", F32], "as before"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "2/3" in lines[1]
    assert "shared memory" in lines[2]
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.best(KEY, [Tile(64, 64, 4, 1)], measure)


@pytest.mark.parametrize(("noise", "number"), [(0.04, 1), (0.06, 0)])
def test_tuning_keeps_the_first_unless_another_wins_by_more_than_the_noise(noise, number):
    tiles = [Tile(64, 16, 4, 1), Tile(64, 32, 4, 1)]

    def measure(best_so_far):
        return tune.Time(1.0 - 0.1 * tiles.index(config.tile_for(*KEY)), noise)

    assert tune.best(KEY, tiles, measure)[0] == tiles[number]


def test_candidates_begin_with_the_table_and_hold_nothing_twice():
    for (kernel, dtype), tile in config.TABLE.items():
        found = tune.candidates(kernel, dtype)
        assert found[0] == tile
        assert len(found) == len(set(found)) == tune.MOST
    # The nearest, and of those only such as hold a window.
    found = tune.candidates("match", torch.bfloat16)
    assert Tile(128, 64, 8, 3) in found, "twice the rows with twice the warps is one step"
    assert Tile(128, 16, 8, 1) not in found
    assert {tile.rows for tile in tune.candidates("match", F32, pixels=36)} == {64, 128}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "salkernels.triton_kernels.tune"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "nothing to tune" in done.stderr


def test_tiles_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "tiles.json"
    config.write(path, {KEY: Tile(32, 64, 8, 2)})
    assert json.loads(path.read_text())[0]["capability"] == 90
    assert list(path.parent.iterdir()) == [path]


@runs
def test_nan_reaches_the_pixels_that_it_reaches_in_the_definition(small_tiles):  # noqa: F811
    """In no other pixel of the window, whether a tile holds it or it is streamed."""
    for size, window in ((4, 2), (7, 7)):
        x = maps(1, 3, 4, size, size)
        x[0, 1, 2, 1, 1] = torch.nan
        mask = torch.zeros(1, 3, 3, dtype=torch.bool, device=DEVICE)
        mask[0, 0, 1] = mask[0, 1, 2] = True
        _, grads = compare(x, None, listed(mask), (window, window))
        assert grads[0].isnan().any()


@runs
def test_saved_tensors_in_another_layout():
    """As after a hook that offloads them."""
    x, y = maps(2, 1, 5, 4, 4), maps(2, 1, 5, 4, 4)
    kept = backend.match(x, y, None, None, (2, 2), EPS)[1:]
    grads = [
        backend.match_backward(torch.ones_like(kept[0]), x, y, None, None, *saved, (2, 2), EPS)
        for saved in (kept, [tensor.contiguous() for tensor in kept])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@runs
def test_a_tiny_eps_and_a_dead_vector():
    x = torch.zeros(1, 1, 2, 2, 2, device=DEVICE)
    assert backend.match(x, x, None, None, (2, 2), 1e-40).loss.item() == 1


@runs
def test_the_norm_of_what_is_never_loaded_is_infinite():
    """Of samples without a pair where groups share a tile, and of pixels that are not valid."""
    x = maps(1, 3, 4, 2, 2)
    pairs = torch.tensor([-1], device=DEVICE)
    assert backend.match(x, None, pairs, None, (2, 2), EPS).norm.isinf().all()
    valid = torch.ones(1, 3, 2, 2, dtype=torch.bool, device=DEVICE)
    valid[0, 1, 0, 1] = False
    norm = backend.match(x, None, None, valid, (2, 2), EPS).norm
    assert norm.isinf().nonzero().tolist() == [[1, 0, 1]]
    torch.testing.assert_close(norm[0], x[0, 0].norm(dim=0))
