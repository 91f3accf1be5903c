"""ContrastiveCrop: boxes of heat maps, centres drawn in them, when and on what they are found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Beta

from salkernels.training.augment import AugmentConfig, placement, sampling_grid
from salkernels.training.methods.ccrop import (
    CCrop,
    CCropConfig,
    fit_stride,
    heat_boxes,
    symmetric_beta,
)
from salkernels.training.models import UNetConfig

MODEL = UNetConfig(width=4, depth=3)
WHOLE = [-1.0, -1, 1, 1]


def slow_box(heat, threshold):
    low, high = min(map(min, heat)), max(map(max, heat))
    hot = [
        (r, c)
        for r, row in enumerate(heat)
        for c, value in enumerate(row)
        if high == low or (value - low) / (high - low) > threshold
    ]
    rows, columns = zip(*hot, strict=True)
    height, width = len(heat), len(heat[0])
    left, right = 2 * min(columns) / width - 1, 2 * (max(columns) + 1) / width - 1
    return [left, 2 * min(rows) / height - 1, right, 2 * (max(rows) + 1) / height - 1]


@pytest.mark.parametrize("threshold", [0, 0.1, 0.8])
@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (1, 3)])
def test_boxes_against_a_loop(shape, threshold):
    generator = torch.Generator().manual_seed(0)
    heat = torch.randint(-3, 4, (20, *shape), generator=generator).double()  # with ties
    heat[0] = 2.5
    got = heat_boxes(heat, threshold)
    expected = torch.tensor([slow_box(h.tolist(), threshold) for h in heat])
    torch.testing.assert_close(got.float(), expected)
    assert got[0].tolist() == WHOLE


def test_one_hot_pixel_is_its_own_box():
    heat = torch.zeros(1, 4, 8)
    heat[0, 1, 6] = 1  # x from 6/8 to 7/8, y from 1/4 to 2/4
    assert heat_boxes(heat, 0.1).tolist() == [[0.5, -0.5, 0.75, 0.0]]


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
def test_draws_are_of_the_symmetric_beta_distribution(alpha):
    count = 20_000
    generator = torch.Generator().manual_seed(1)
    drawn = symmetric_beta(torch.empty(count), alpha, generator)
    assert drawn.mean() == pytest.approx(0.5, abs=0.015)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    # Kolmogorov-Smirnov with torch's own; 1.95 · sqrt(2 / count) is exceeded in 0.1 % of draws.
    torch.manual_seed(2)
    other = Beta(torch.tensor(alpha, dtype=torch.double), alpha).sample((count,)).float()
    points = torch.cat((drawn, other)).sort().values
    shares = [
        torch.searchsorted(d.sort().values, points, right=True) / count for d in (drawn, other)
    ]
    assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / count) ** 0.5


def method(boxes, **settings):
    boxes = torch.tensor(boxes)
    total = len(boxes)
    seen = SimpleNamespace(num_samples=total, samples=torch.arange(total))
    made = CCrop(MODEL, CCropConfig(**settings), seen)
    made.boxes.copy_(boxes)
    return made


def test_centres_lie_in_the_box_where_a_crop_lies_on_the_slice():
    made = method([WHOLE, [-0.1, 0.0, 0.2, 0.9], [0.6, -0.9, 0.8, -0.7]])
    sample = torch.tensor([0, 1, 2]).repeat(2000)
    centres = made.centres(sample, 0.25, torch.Generator().manual_seed(3)).view(2000, 3, 2)
    limits = [[[-0.25, 0.25]] * 2, [[-0.1, 0.2], [0.0, 0.25]], [[0.25, 0.25], [-0.25, -0.25]]]
    for k, box in enumerate(limits):
        for axis, (low, high) in enumerate(box):
            drawn = centres[:, k, axis]
            assert drawn.min() >= low
            assert drawn.max() <= high
            assert drawn.min() == pytest.approx(low, abs=0.01)
            assert drawn.max() == pytest.approx(high, abs=0.01)
    # U-shaped: with α = 0.6 the outer fifths hold more than the two fifths that they would evenly.
    outer = (centres[:, 0, 0].abs() > 0.6 * 0.25).float().mean()
    assert outer == pytest.approx(
        float(2 * Beta(0.6, 0.6).sample((100_000,)).lt(0.2).float().mean()), abs=0.03
    )
    assert outer > 0.45


def test_a_crop_within_the_room_lies_on_its_slice():
    still = AugmentConfig(rotation=0, scale=1, shift=0, jitter=0)
    images, room = torch.zeros(2, 1, 64, 64), 1 - 48 / 64
    centres = torch.tensor([[room, -room], [-room, 0]])
    theta, bend = placement(images, 48, still, torch.Generator(), None, centres)
    grid = sampling_grid(theta, bend, 48)
    pixel = 1 / 64  # centres of pixels are half a pixel inside
    assert grid.abs().max() == pytest.approx(1 - pixel, abs=1e-6)


class Canvases:
    """Slices that are dark but for a square, and a record of what was asked for."""

    def __init__(self, total, unseen):
        self.num_samples, self.asked = total, []
        self.samples = torch.tensor([i for i in range(total) if i not in unseen])

    def canvases(self, samples):
        self.asked += samples.tolist()
        images = torch.zeros(len(samples), 1, 24, 24)
        images[:, :, 4:12, 16:24] = 1
        return images


def test_boxes_are_found_evenly_over_training_for_the_slices_that_it_sees():
    corpus = Canvases(6, unseen={2, 4})
    torch.manual_seed(0)
    made = CCrop(MODEL, CCropConfig(updates=4), corpus)
    assert made.boxes.tolist() == [WHOLE] * 6
    found = []
    for step in range(101):
        asked = len(corpus.asked)
        made.before_step(step, 100, corpus)
        if len(corpus.asked) > asked:
            found.append(step)
    assert found == [20, 40, 60, 80]
    assert set(corpus.asked) == {0, 1, 3, 5}
    assert made.boxes[2].tolist() == made.boxes[4].tolist() == WHOLE
    assert made.training  # as before

    made.encoder.forward = lambda images: [images]  # the heat is the picture
    made.localise(corpus)
    # 24 pixels: the square is in columns 16 to 24 and rows 4 to 12.
    torch.testing.assert_close(made.boxes[3], torch.tensor([2 * 16 / 24 - 1, 2 * 4 / 24 - 1, 1, 0]))


@pytest.mark.parametrize(("steps", "updates"), [(3, 4), (100, 0)])
def test_an_untrained_network_is_not_asked(steps, updates):
    corpus = Canvases(4, unseen={})
    made = CCrop(MODEL, CCropConfig(updates=updates), corpus)
    made.before_step(0, steps, corpus)
    assert not corpus.asked


def test_canvases_are_made_to_fit_the_encoder():
    images = torch.rand(2, 1, 24, 20)
    assert fit_stride(images, 4) is images
    assert fit_stride(images, 16).shape == (2, 1, 32, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 1}, r"ccrop.threshold must be in \[0, 1\), got 1"),
        ({"alpha": 0}, r"ccrop.alpha must be in \(0, 1\], got 0"),
        ({"alpha": 1.5}, r"ccrop.alpha must be in \(0, 1\], got 1.5"),
        ({"updates": -1}, "ccrop.updates"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CCropConfig(**changes)
