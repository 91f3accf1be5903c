"""The Triton backend beyond the tables that all backends share: tiles, tuning, what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from cases import F32, F64, lay_out

import salkernels
from salkernels import reference
from salkernels.backends import select
from salkernels.backends import triton as backend

pytest.importorskip("triton")
from salkernels.triton_kernels import config, launch, tune
from salkernels.triton_kernels.config import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(backend.status() is not None, reason=str(backend.status()))
EPS = 1e-12


def compare(query, key, mask, window, dtype=F32):
    """Both passes against the definition in float64."""
    keys = query if key is None else key
    pairs = query.shape[0] * query.shape[1] * keys.shape[1]
    capacity = pairs if mask is None else int(mask.count_nonzero())
    actual = backend.pair_losses_forward(query, key, mask, window, EPS, capacity)
    wide = [None if x is None else x.double() for x in (query, key)]
    expected = reference.pair_losses_forward(*wide, mask, window, EPS, capacity)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(actual[2].double(), expected[2], atol=2e-6, rtol=0)
    assert torch.equal(actual[1], expected[1])
    grad = torch.randn(actual[0].shape, dtype=F64, device=query.device)
    grads = backend.pair_losses_backward(
        grad, query, key, mask, *actual[1:3], window, EPS, actual[3]
    )
    wanted = reference.pair_losses_backward(grad, *wide, mask, *expected[1:], window, EPS)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == query.dtype
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error < (5e-6 if query.dtype == F32 else 4e-3), float(error)


def maps(*shape, dtype=F32, layout="contiguous"):
    groups, samples, *rest = shape
    x = torch.randn(groups * samples, *rest, device=DEVICE).to(dtype)
    return lay_out(x, layout).unflatten(0, (groups, samples))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 rows: few samples fill several."""
    tile = Tile(32, 16, 4, 1)
    for key in list(config.TABLE):
        monkeypatch.setitem(config.TABLE, key, tile)
    monkeypatch.setattr(config, "OVERRIDES", {})
    monkeypatch.setattr(config, "INTERPRETER", tile)


@runs
@pytest.mark.parametrize("density", [0.08, 0.5])
def test_a_set_in_several_tiles(density, small_tiles):
    """17 samples at 2 x 2 are three tiles; few pairs leave tile pairs empty, many do not."""
    mask = torch.rand(1, 17, 17, device=DEVICE) < density
    compare(maps(1, 17, 5, 2, 3), None, mask, (2, 2))


@runs
def test_every_pair_of_a_set_in_several_tiles(small_tiles):
    compare(maps(1, 18, 5, 2, 2), None, None, (2, 2))


@runs
def test_groups_of_queries_and_keys_in_several_tiles(small_tiles):
    mask = torch.rand(2, 6, 5, device=DEVICE) < 0.5
    compare(maps(2, 6, 5, 2, 2), maps(2, 5, 5, 2, 2, layout="channels_last"), mask, (2, 2))


@runs
def test_many_pairs_in_one_tile(small_tiles):
    compare(maps(11, 1, 5, 2, 2), maps(11, 1, 5, 2, 2), None, (2, 2))


@runs
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_windows_larger_than_a_tile(dtype, small_tiles):
    """Streamed, with a last block that is not full and an edge window that is smaller."""
    mask = torch.tensor([[[False, True], [True, True]]], device=DEVICE)
    compare(maps(1, 2, 20, 7, 9, dtype=dtype), None, mask, (7, 6))


@runs
def test_other_keys_in_windows_larger_than_a_tile(small_tiles):
    compare(maps(2, 1, 20, 6, 7), maps(2, 2, 20, 6, 7, layout="channels_last"), None, (6, 6))


def layout_of(mask, queries, keys=None, rows=32):
    """A layout of that many nodes of 2 x 2 windows, in tiles of `rows`."""
    groups = mask.shape[0]
    query = torch.zeros(groups, queries, 1, 2, 2, device=DEVICE)
    key = None if keys is None else torch.zeros(groups, keys, 1, 2, 2, device=DEVICE)
    return launch.Layout(query, key, mask, (2, 2), rows, 4)


@runs
def test_slices_of_one_scan_come_together():
    """Views of two scans in turn: sorted, each scan is one run, and no pair crosses."""
    volume = torch.tensor([0, 1], device=DEVICE).repeat_interleave(4).repeat(4)
    mask = (volume[:, None] == volume) & ~torch.eye(32, dtype=torch.bool, device=DEVICE)
    order = launch.plan(layout_of(mask[None], 32))[1][0].long()
    assert sorted(order.tolist()) == list(range(32))
    assert len(volume[order].unique_consecutive()) == 2


@runs
@pytest.mark.parametrize(("groups", "queries", "keys"), [(1, 33, None), (3, 17, None), (2, 9, 14)])
def test_the_plan_of_one_launch_is_that_of_plain_torch(groups, queries, keys):
    mask = torch.rand(groups, queries, keys or queries, device=DEVICE) < 0.15
    layout = layout_of(mask, queries, keys)
    assert not layout.merged
    slots, order = launch.plan(layout)
    assert torch.equal(slots.flatten(), launch._slots_of_many(mask))
    assert torch.equal(order, launch._order_of_many(layout))


@runs
def test_more_nodes_than_the_plan_kernel_holds(small_tiles):
    """A band: each sample with the next, 70 of them."""
    index = torch.arange(70, device=DEVICE)
    mask = (index[:, None] + 1 == index)[None]
    compare(maps(1, 70, 3, 1, 2), None, mask, (1, 2))


@runs
def test_pairs_beyond_the_capacity_have_no_loss():
    """Nobody waits for a GPU to count: what does not fit is NaN, and nothing is overwritten."""
    x = maps(1, 3, 4, 2, 2)
    mask = torch.ones(1, 3, 3, dtype=torch.bool, device=DEVICE)
    found = backend.outputs(x, None, (2, 2), 5)
    backend.clear(found)
    launch.forward(x, None, mask, (2, 2), EPS, found)
    expected = reference.pair_losses_forward(x, None, mask, (2, 2), EPS, 9)[0].flatten()
    torch.testing.assert_close(found[0].flatten()[:5], expected[:5])
    assert found[0].flatten()[5:].isnan().all()


@runs
def test_memory_beyond_the_features_is_a_few_percent():
    """At the paper's shape: matches, norms and partial sums, in bytes."""
    query = torch.empty(1, 32, 384, 44, 44, device="meta")
    found = backend.outputs(query, None, (2, 2), 272)
    partial = 4 * 22 * 22 * 272
    kept = sum(tensor.numel() * tensor.element_size() for tensor in found)
    assert kept + partial <= 0.1 * query.numel() * query.element_size()


def test_fp64_is_refused_with_the_way_out():
    x = torch.zeros(1, 2, 3, 4, dtype=F64)
    status = {s.name: s for s in salkernels.explain(x)}["triton"]
    assert not status.available
    if backend.status() is None:
        assert "got torch.float64: use the reference" in status.reason


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


@pytest.mark.skipif(not backend.INTERPRETED, reason="Triton is not in interpreter mode")
def test_the_interpreter_runs_by_name_only():
    x = torch.randn(1, 2, 3, 4)
    assert {s.name: s for s in salkernels.explain(x)}["triton"].available
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


def test_tuning_takes_the_fastest_that_runs():
    times = {Tile(64, 16, 4, 1): 3.0, Tile(64, 32, 4, 1): 1.0, Tile(64, 64, 4, 1): None}
    tried = []

    def measure():
        tile = config.tile_for(*KEY)
        tried.append(tile)
        if times[tile] is None:
            raise RuntimeError("out of resource: shared memory")
        return times[tile]

    chosen, found = tune.best(KEY, times, measure)
    assert tried == list(times)
    assert chosen == Tile(64, 32, 4, 1)
    assert len(found) == 2
    assert config.tile_for(*KEY) == config.TABLE["match", F32], "as before"
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.best(KEY, [Tile(64, 64, 4, 1)], measure)


def test_candidates_begin_with_the_table_and_hold_nothing_twice():
    for (kernel, dtype), tile in config.TABLE.items():
        found = tune.candidates(kernel, dtype)
        assert found[0] == tile
        assert len(found) == len(set(found))


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
def test_nan_reaches_the_pixels_that_it_reaches_in_the_definition(small_tiles):
    """In no other pixel of the window, be it held by a tile or streamed."""
    for size, window in ((4, 2), (7, 7)):
        x = maps(1, 3, 4, size, size)
        x[0, 1, 2, 1, 1] = torch.nan
        mask = torch.zeros(1, 3, 3, dtype=torch.bool, device=DEVICE)
        mask[0, 0, 1] = mask[0, 1, 2] = True
        forward = backend.pair_losses_forward(x, None, mask, (window, window), EPS, 2)
        expected = reference.pair_losses_forward(x, None, mask, (window, window), EPS, 2)
        grad = torch.ones_like(forward[0])
        saved = (*forward[1:3], (window, window), EPS, forward[3])
        actual, _ = backend.pair_losses_backward(grad, x, None, mask, *saved)
        saved = (*expected[1:], (window, window), EPS)
        wanted, _ = reference.pair_losses_backward(grad, x, None, mask, *saved)
        assert torch.equal(actual.isnan(), wanted.isnan())


@runs
def test_no_pair_in_a_mask_that_nobody_counted():
    """Capacity for all, as for a mask on a GPU; NaN features that no pair touches."""
    x = maps(1, 3, 4, 2, 2)
    x[0, 1] = torch.nan
    mask = torch.zeros(1, 3, 3, dtype=torch.bool, device=DEVICE)
    loss, argmax, max_sim, norm = backend.pair_losses_forward(x, None, mask, (2, 2), EPS, 9)
    assert not loss.any()
    grad, _ = backend.pair_losses_backward(
        torch.ones_like(loss), x, None, mask, argmax, max_sim, (2, 2), EPS, norm
    )
    assert not grad.any()


@runs
def test_saved_tensors_in_another_layout():
    """As after a hook that offloads them."""
    x, y = maps(2, 1, 5, 4, 4), maps(2, 1, 5, 4, 4)
    loss, *kept = backend.pair_losses_forward(x, y, None, (2, 2), EPS, 2)
    grads = [
        backend.pair_losses_backward(
            torch.ones_like(loss), x, y, None, *saved[:2], (2, 2), EPS, saved[2]
        )
        for saved in (kept, [tensor.contiguous() for tensor in kept])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@runs
def test_a_tiny_eps_and_a_dead_vector():
    x = torch.zeros(1, 1, 2, 2, 2, device=DEVICE)
    assert backend.pair_losses_forward(x, x, None, (2, 2), 1e-40, 1)[0].item() == 1


@runs
def test_too_little_capacity_without_a_mask():
    x = maps(3, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="3 pairs, but capacity is 2"):
        backend.pair_losses_forward(x, x, None, (2, 2), EPS, 2)
