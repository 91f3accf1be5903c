"""Augmentation: what it keeps, what it shares, and that labels go along."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from salkernels.training.augment import (
    AugmentConfig,
    augment,
    centre_crop,
    change_intensity,
    placement,
    sampling_grid,
    undo,
)

STILL = {"rotation": 0, "scale": 1, "shift": 0, "elastic": 0, "flip": 0}
CALM = {"brightness": 0, "contrast": 1, "gamma": 1, "bias": 0, "noise": 0}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def grid_of(images, *arguments):
    return sampling_grid(*placement(images, 48, *arguments), 48)


def smooth(batch=4, size=64):
    coarse = torch.randn(batch, 1, 8, 8, generator=rng(1))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def test_no_strength_is_the_centre_crop():
    x, labels = smooth(), torch.randint(0, 4, (4, 64, 64), generator=rng(2))
    views, moved, _ = augment(x, 48, AugmentConfig(**STILL, **CALM), rng(), labels=labels)
    torch.testing.assert_close(views, centre_crop(x, 48), atol=1e-5, rtol=0)
    assert torch.equal(moved, centre_crop(labels, 48))


def test_labels_move_with_the_image():
    # The image is its own label: after any geometry they must still agree almost everywhere.
    labels = (smooth(8) > 0).to(torch.uint8)[:, 0]
    config = AugmentConfig(elastic=0.03, flip=0.5, **CALM)
    views, moved, _ = augment(labels[:, None].float(), 48, config, rng(3), labels=labels)
    assert moved.dtype == torch.uint8
    # Nearest and thresholded linear sampling differ at edges only; a pixel of shift would be 5 %.
    assert ((views[:, 0] > 0.5) == (moved > 0)).float().mean() > 0.99
    assert (moved != centre_crop(labels, 48)).float().mean() > 0.05


def test_shared_geometry_is_one_per_group_and_jitter_is_small():
    x, group = smooth(6), torch.tensor([0, 1, 0, 1, 0, 1])
    rigid = AugmentConfig(jitter=0, elastic=0.02, flip=0.5)
    grid = grid_of(x, rigid, rng(4), group)
    assert torch.equal(grid[0], grid[2])
    assert torch.equal(grid[1], grid[5])
    assert (grid[0] - grid[1]).abs().max() > 0.05
    jittered = grid_of(x, AugmentConfig(jitter=0.05), rng(4), group)
    pixel = 2 / 64
    assert 0 < (jittered[0] - jittered[2]).abs().max() < 3 * pixel


def test_without_groups_every_view_has_its_own_geometry():
    grid = grid_of(smooth(2), AugmentConfig(), rng(5))
    assert (grid[0] - grid[1]).abs().max() > 0.05


def test_given_centres_replace_the_shift_and_leave_the_rest():
    centres = torch.tensor([[0.3, -0.2], [-0.1, 0.25]])
    grid = grid_of(smooth(2), AugmentConfig(), rng(5), None, centres)
    torch.testing.assert_close(grid.mean(dim=(1, 2)), centres, atol=1e-5, rtol=0)
    drawn = grid_of(smooth(2), AugmentConfig(), rng(5))
    still = [g - g.mean(dim=(1, 2), keepdim=True) for g in (grid, drawn)]
    torch.testing.assert_close(*still, atol=1e-5, rtol=0)


def test_rotation_by_a_known_angle(monkeypatch):
    """A quarter turn about the centre, against torch.rot90."""
    config = AugmentConfig(**{**STILL, "rotation": 90}, **CALM)
    x = smooth(1, 32)
    monkeypatch.setattr(
        "salkernels.training.augment._uniform",
        lambda rows, columns, *, like, generator: torch.ones(rows, columns),
    )
    views = augment(x, 32, config, rng()).views
    expected = torch.rot90(x, 1, (2, 3))
    torch.testing.assert_close(views, expected, atol=1e-4, rtol=0)


def test_zoom_and_shift_stay_within_their_limits():
    x = smooth(64, 64)
    config = AugmentConfig(**{**STILL, "scale": 1.25, "shift": 0.1})
    grid = grid_of(x, config, rng(6))
    extent = grid[:, 24, -1, 0] - grid[:, 24, 0, 0]
    whole = 2 * (48 / 64) * 47 / 48  # pixel centres
    assert extent.min() >= whole / 1.25 - 1e-5
    assert extent.max() <= whole * 1.25 + 1e-5
    centre = (grid[:, 23, 23] + grid[:, 24, 24]) / 2
    assert centre.abs().max() <= 2 * (48 / 64) * 0.1 + 1e-6


def test_intensity_changes_are_per_view_and_keep_order_without_noise():
    x = smooth(1).repeat(3, 1, 1, 1)
    config = AugmentConfig(**{**CALM, "gamma": 1.5, "contrast": 1.4, "brightness": 0.2})
    views = change_intensity(x, config, rng(7))
    assert not torch.equal(views[0], views[1])
    order = x[0].flatten().argsort()
    assert (views[0].flatten()[order].diff() >= -1e-6).all()


def test_bias_field_leaves_air_alone():
    x = smooth(2)
    x[..., :8] = x.amin()
    views = change_intensity(x, AugmentConfig(**{**CALM, "bias": 0.3}), rng(8))
    torch.testing.assert_close(views[..., :8], x[..., :8])
    assert (views - x).abs().max() > 0.1


def test_noise_has_the_drawn_level():
    x = torch.zeros(200, 1, 32, 32)
    views = change_intensity(x, AugmentConfig(**{**CALM, "noise": 0.2}), rng(9))
    level = views.std(dim=(1, 2, 3))
    assert level.max() < 0.22
    assert math.isclose(level.mean(), 0.1, abs_tol=0.02)


def test_same_generator_same_views_and_no_global_state():
    config = AugmentConfig(elastic=0.02, flip=0.5)
    first = augment(smooth(), 48, config, rng(10)).views
    torch.manual_seed(123)
    second = augment(smooth(), 48, config, rng(10)).views
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rotation", -1), ("scale", 0.9), ("flip", 1.5), ("gamma", 0), ("noise", -1)],
)
def test_impossible_strengths_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        AugmentConfig(**{field: value})


@pytest.mark.parametrize("grouped", [False, True])
def test_undone_views_lie_on_the_slice(grouped):
    """The centre crop of the image comes back, turned, zoomed, shifted and mirrored as it was."""
    x = smooth(6, 128)
    group = torch.tensor([0, 0, 0, 1, 1, 1]) if grouped else None
    config = AugmentConfig(**CALM, flip=0.5, jitter=0.3)
    views, _, frame = augment(x, 96, config, rng(11), group=group)
    back, expected = undo(views, frame), centre_crop(x, 96)
    seen = undo(torch.ones_like(views), frame) == 1
    assert (back - expected)[seen].abs().max() < 0.03 < (views - expected)[seen].abs().mean()
    assert 0.6 < seen.float().mean() < 1  # shifted out of some views
    assert (back[undo(torch.ones_like(views), frame) == 0] == 0).all()


def test_undoing_a_coarse_map_of_a_view_is_undoing_the_view():
    """A pixel of a feature map stands for a square of the view: both lie on the same frame."""
    x = F.interpolate(smooth(4, 64), size=(192, 192), mode="bicubic", align_corners=False)
    config = AugmentConfig(**CALM)
    views, _, frame = augment(x, 144, config, rng(12))
    coarse = undo(F.avg_pool2d(views, 4), frame)
    seen = undo(torch.ones_like(coarse), frame) == 1
    expected = F.avg_pool2d(centre_crop(x, 144), 4)
    assert (coarse - expected)[seen].abs().mean() < 0.02 * expected.std()


def test_undo_keeps_dtype_and_layout_under_autocast():
    maps = torch.randn(4, 8, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last)
    *_, frame = augment(smooth(), 48, AugmentConfig(), rng(13))
    with torch.autocast("cpu", torch.bfloat16):
        back = undo(maps, frame)
    assert back.dtype == torch.bfloat16
    assert back.shape == maps.shape
    assert back.is_contiguous(memory_format=torch.channels_last)
