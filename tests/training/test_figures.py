"""Figures: what is drawn is what was matched, and drawing a large scan fits into memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from salkernels.training import figures
from salkernels.training.config import OptimConfig
from salkernels.training.figures import match_field
from salkernels.training.inputs import open_dataset
from salkernels.training.models import UNetConfig
from salkernels.training.pretrain import pretrain


class Fixed(nn.Module):
    """An encoder whose only map is the input."""

    def forward(self, x):
        return [x]


@pytest.mark.parametrize("window", [2, 4, 5])  # 5 does not divide the map
def test_matches_are_where_the_most_similar_pixel_is(window):
    torch.manual_seed(0)
    pair = torch.randn(2, 3, 8, 12)
    similarity, where, of_any_two = match_field(Fixed(), 1, pair, window)
    first, second = F.normalize(pair, dim=1)
    pixels = [slice_.flatten(1).T for slice_ in (first, second)]
    cosines = [a @ b for a, b in itertools.product(*pixels)]
    assert of_any_two == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    for row, column in itertools.product(range(8), range(12)):
        top, left = row // window * window, column // window * window
        inside = [
            (r, c)
            for r in range(top, min(top + window, 8))
            for c in range(left, min(left + window, 12))
        ]
        best = max(inside, key=lambda at: float(first[:, row, column] @ second[:, at[0], at[1]]))
        assert tuple(where[row, column].tolist()) == best
        expected = first[:, row, column] @ second[:, best[0], best[1]]
        torch.testing.assert_close(similarity[row, column], expected)


def test_a_scan_of_many_slices_goes_through_the_network_in_part(pretrain_config, monkeypatch):
    config = pretrain_config(optim=OptimConfig(steps=1))
    seen = []
    monkeypatch.setattr(figures, "MOST_SLICES", 4)
    monkeypatch.setattr(figures, "_settle_norms", lambda encoder, slices: seen.append(len(slices)))
    pretrain(config)  # of scans with 6 slices
    assert seen == [3, 3]
    assert open_dataset(config).num_slices(0) == 6


@pytest.mark.parametrize(
    ("method", "size", "words"),  # size: of the second view; 3 pieces of 8 pixels with borders of 1
    [("rotation", 32, "turned"), ("pirl", 30, "in pieces"), ("simclr", 32, "two views each")],
)
def test_the_batch_is_drawn_as_the_method_shows_it(
    pretrain_config, monkeypatch, method, size, words
):
    shallow = UNetConfig(width=4, depth=3)  # shallower than sal.scale, which is SAL's business
    config = pretrain_config(method=method, model=shallow, optim=OptimConfig(steps=1), slices=4)
    pictures, panels, titles = [], {}, []
    original = figures._image
    monkeypatch.setattr(
        figures,
        "_image",
        lambda axes, picture, cache: pictures.append(picture) or original(axes, picture, cache),
    )
    monkeypatch.setattr(figures, "matches", lambda *_: None)

    def save(figure, path):
        panels[path.name] = [axes.get_title() for axes in figure.axes]
        titles.append(figure.get_suptitle())

    monkeypatch.setattr(figures, "_save", save)
    pretrain(config)
    assert len(pictures) == 8
    assert pictures[0].shape == (32, 32)
    assert pictures[2].shape == (size, size)
    assert words in titles[-1]
    expected = {
        "rotation": ["cross-entropy of the turns", "share of turns told right"],
        "pirl": ["noise-contrastive losses"],
        "simclr": ["NT-Xent"],
    }[method]
    rest = ["mean cosine of arbitrary pixels", "effective rank", "learning rate"]
    assert panels["curves.png"] == expected + rest


def test_matches_of_a_network_with_fewer_levels_than_the_scale_of_sal(pretrain_config):
    shallow = UNetConfig(width=4, depth=3)
    config = pretrain_config(method="simclr", model=shallow, optim=OptimConfig(steps=1), slices=4)
    pretrain(config)
    assert (config.out / "figures" / "matches.png").stat().st_size > 5_000
