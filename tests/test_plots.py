"""The picture of the matches: what is drawn where, and what it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import salkernels

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the training extra)")


def example(height=6, width=8):
    """Every pixel has a direction of its own; keys are moved by one column within windows of 2."""
    unique = torch.eye(height * width).reshape(1, height * width, height, width)
    key = unique.unflatten(3, (width // 2, 2)).flip(4).flatten(3)
    return salkernels.align(unique, key, 2)


def test_dots_lie_on_matches():
    figure = salkernels.plot_matches(
        torch.rand(24, 32), torch.rand(1, 24, 32), example(), 2, every=1
    )
    query, key, distance = figure.axes[:3]
    dots = {tuple(map(float, (d.get_xdata()[0], d.get_ydata()[0]))) for d in query.lines}
    assert dots == {(float(x), float(y)) for x in range(8) for y in range(6)}
    joined = [line for line in key.lines if len(line.get_xdata()) == 2]
    assert len(joined) == 48
    for line in joined:
        (x, to_x), (y, to_y) = line.get_xdata(), line.get_ydata()
        assert to_y == y
        assert to_x == x + 1 - 2 * (x % 2)
    assert len(query.patches) == 12
    assert query.images[0].get_extent() == [-0.5, 7.5, 5.5, -0.5]  # of the map, not of the image
    assert distance.images[0].get_array().max() == pytest.approx(0, abs=1e-6)
    assert "the loss, 0.000" in distance.get_title()


def test_what_takes_no_part_has_no_dot_and_no_distance():
    x, y = torch.randn(2, 2, 4, 6, 6)
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    valid[1, :, :3] = False
    found = salkernels.align(x, y, 3, valid=valid)
    figure = salkernels.plot_matches(x[1, 0], y[1, 0], found, 3, pair=1, every=1)
    assert all(dot.get_xdata()[0] >= 3 for dot in figure.axes[0].lines)
    assert figure.axes[2].images[0].get_array().mask[:, :3].all()
    loss = salkernels.wla_loss(x, y, 3, valid=valid, reduction="none")[1]
    assert f"the loss, {loss:.3f}" in figure.axes[2].get_title()


def test_it_can_be_saved(tmp_path):
    salkernels.plot_matches(torch.rand(6, 8), torch.rand(6, 8), example(), (2, 2)).savefig(
        tmp_path / "matches.png"
    )
    assert (tmp_path / "matches.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.rand(3, 6, 8)}, ValueError, "query must be one grey picture"),
        ({"key": [1.0]}, TypeError, "key must be a torch.Tensor"),
        ({"matches": torch.rand(6, 8)}, TypeError, "align_set returns, got Tensor"),
        ({"pair": 1}, IndexError, "one of the 1 rows of matches, got 1"),
        ({"window_size": 9}, ValueError, "larger than the 6 x 8"),
        ({"every": 0}, ValueError, "every must be at least 1"),
    ],
)
def test_bad_calls(change, error, words):
    arguments = {
        "query": torch.rand(6, 8),
        "key": torch.rand(6, 8),
        "matches": example(),
        "window_size": 2,
    }
    with pytest.raises(error, match=words):
        salkernels.plot_matches(**arguments | change)


def test_matplotlib_is_loaded_when_a_picture_is_drawn():
    code = """
import sys, salkernels, torch
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = None
try:
    salkernels.plot_matches(None, None, None, 2)
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "plot_matches needs matplotlib: pip install matplotlib"
