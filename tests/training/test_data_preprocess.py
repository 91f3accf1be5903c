"""Preprocessing: the numbers that come out."""

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.nifti import DataError, Volume
from salkernels.training.data.preprocess import (
    IGNORE,
    PreprocessConfig,
    for_display,
    plan,
    preprocess,
)


def volume(shape, spacing=(2.8, 2.8, 8.0), orientation="RAS", array=None):
    if array is None:
        array = np.random.default_rng(1).normal(100, 20, shape)
    affine = np.eye(4)
    if orientation is not None:
        affine[:3, :3] = 0
        for axis, code in enumerate(orientation):
            world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
            affine[world, axis] = spacing[axis] * (1 if code in "RAS" else -1)
    header = nib.Nifti1Header()
    return Volume(array.astype(np.float32), affine, spacing, orientation, header)


@pytest.mark.parametrize(
    ("shape", "spacing", "plane"),
    [
        ((100, 80, 3), (1.4, 1.4, 10.0), (50, 40)),
        ((100, 80, 3), (1.4, 2.8, 10.0), (50, 80)),
        ((101, 33, 3), (1.4, 1.4, 10.0), (51, 17)),  # 50.5 and 16.5 both up
        ((216, 256, 3), None, (108, 128)),
        ((288, 200, 3), None, (144, 100)),  # 288 is still not too long
        ((428, 512, 3), None, (107, 128)),
        ((512, 154, 3), None, (128, 39)),
    ],
)
def test_resampled_plane(shape, spacing, plane):
    done = preprocess(volume(shape, spacing, None), None, PreprocessConfig(), num_classes=4)
    assert done.geometry.plane == plane
    assert done.images.shape == (3, 128, 128)


def test_normalised_over_the_volume_and_padded_dark():
    image = volume((40, 60, 5))
    image.array[20, 30, 2] = 1e6  # one hot pixel must not rule the scale
    done = preprocess(image, None, PreprocessConfig(size=64), num_classes=4)
    assert done.images.dtype == np.float32
    inside = done.images[:, 12:52, 2:62]
    assert inside.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert inside.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    low, high = np.percentile(image.array, (0.5, 99.5))
    expected = np.clip(image.array, low, high)
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(inside, expected.transpose(2, 0, 1), atol=2e-4)
    assert (done.images[:, :12] == inside.min()).all()
    assert (done.images[..., 62:] == inside.min()).all()
    assert done.images.min() == inside.min()


def test_centre_crop_counts_lost_voxels():
    image = volume((20, 20, 2))
    labels = np.zeros((20, 20, 2), np.uint8)
    labels[4:16, 4:16] = 2
    done = preprocess(image, labels, PreprocessConfig(size=8), num_classes=4)
    assert done.geometry.offset == (6, 6)
    assert (done.labels == 2).all()
    assert done.lost_voxels == 2 * (12 * 12 - 8 * 8)
    kept = preprocess(image, labels, PreprocessConfig(size=12), num_classes=4)
    assert kept.lost_voxels == 0


def test_lost_voxels_are_native_ones():
    image = volume((40, 40, 1), spacing=(1.4, 1.4, 8.0))  # 20 x 20 after resampling
    labels = np.ones((40, 40, 1), np.uint8)
    done = preprocess(image, labels, PreprocessConfig(size=16), num_classes=4)
    assert done.lost_voxels == 40 * 40 - 32 * 32


def test_lost_voxels_go_by_their_centres():
    image = volume((42, 42, 1), spacing=(2.0, 2.0, 8.0))  # 30 x 30: voxels straddle the edge
    done = preprocess(
        image, np.ones((42, 42, 1), np.uint8), PreprocessConfig(size=16), num_classes=4
    )
    assert done.geometry.offset == (7, 7)
    assert done.lost_voxels == 42 * 42 - 22 * 22  # 7 <= (i + 0.5) * 30 / 42 < 23: i = 10 .. 31


def test_resampling_is_antialiased():
    """Stripes of period 3 at a zoom of 1 / 4: without a low pass they come back as wide ones."""
    stripes = np.tile(np.arange(96)[:, None, None] % 3 == 0, (1, 96, 2)) * 100.0
    stripes[:, :48] += 300  # sets the scale
    image = volume((96, 96, 2), (0.7, 0.7, 8), array=stripes)
    done = preprocess(image, None, PreprocessConfig(), num_classes=4)
    assert done.geometry.plane == (24, 24)
    left = done.images[:, 54:74, 54:62]
    assert left.std() < 0.05


def test_labels_keep_areas_and_stay_classes():
    labels = np.zeros((60, 60, 1), np.uint8)
    labels[10:40, 12:38] = 1
    labels[20:30, 20:30] = 3
    image = volume((60, 60, 1), (1.4, 1.4, 8))
    done = preprocess(image, labels, PreprocessConfig(size=32), num_classes=4)
    assert set(np.unique(done.labels)) == {0, 1, 3}
    assert (done.labels == 3).sum() == 25
    assert (done.labels > 0).sum() == 15 * 13
    assert (done.labels[0, :1] == 0).all()


def test_unlabelled_slices_are_ignored():
    done = preprocess(volume((30, 30, 3)), None, PreprocessConfig(size=40), num_classes=4)
    assert done.labels.dtype == np.uint8
    assert (done.labels == IGNORE).all()
    assert done.lost_voxels == 0


def test_constant_and_mismatched_volumes_are_refused():
    flat = volume((20, 20, 2), array=np.full((20, 20, 2), 7.0))
    with pytest.raises(DataError, match="some/file: constant"):
        preprocess(flat, None, PreprocessConfig(), num_classes=4, name="some/file")
    with pytest.raises(DataError, match=r"\(20, 20, 2\) but label \(20, 20, 3\)"):
        preprocess(
            volume((20, 20, 2)), np.zeros((20, 20, 3), np.uint8), PreprocessConfig(), num_classes=4
        )


@pytest.mark.parametrize("pixel", [0.0015, 1500.0])
def test_implausible_spacing_is_refused(pixel):
    with pytest.raises(DataError, match="check its header"):
        plan(volume((20, 20, 2), (pixel, pixel, 8.0)), PreprocessConfig())


@pytest.mark.parametrize(
    ("codes", "orientation", "axes"),
    [
        ("RAS", "RAS", (2, 0, 1)),
        ("LPS", "RAS", (2, 0, 1)),
        ("LAS", "RAS", (2, 0, 1)),
        ("RPS", "RAS", (2, 0, 1)),
        ("ASR", "RAS", (1, 2, 0)),
        ("PSR", "RAS", (1, 2, 0)),
        ("PIL", "RAS", (1, 2, 0)),
        ("PIL", "native", (2, 0, 1)),
        (None, "RAS", (2, 0, 1)),
    ],
)
def test_orientation(codes, orientation, axes):
    shape, spacing = (20, 24, 28), (2.8, 2.8, 2.8)
    image = volume(shape, spacing, codes)
    done = preprocess(
        image, None, PreprocessConfig(orientation=orientation, size=32), num_classes=4
    )
    assert done.geometry.axes == axes
    turned = orientation == "RAS" and codes is not None
    assert done.geometry.orientation == ("RAS" if turned else "native")
    expected = image.array[..., ::-1] if (codes, orientation) == ("PIL", "native") else image.array
    if turned:
        nifti = nib.as_closest_canonical(nib.Nifti1Image(image.array, image.affine))
        expected = np.asarray(nifti.dataobj)
    np.testing.assert_array_equal(done.geometry.to_slices(image.array), expected.transpose(2, 0, 1))


def test_spacing_turns_with_the_axes():
    image = volume((20, 24, 28), (2.8, 1.4, 5.6), "ASR")
    assert plan(image, PreprocessConfig(orientation="RAS")).plane == (56, 20)
    assert plan(image, PreprocessConfig()).plane == (20, 12)


def test_display():
    ras = np.zeros((4, 6))
    ras[3, 5] = 1  # right, anterior
    picture = for_display(ras, "RAS")
    assert picture.shape == (6, 4)
    assert picture[0, 0] == 1  # top, on the viewer's left
    np.testing.assert_array_equal(for_display(ras), ras.T)


@pytest.mark.parametrize(
    "wrong",
    [
        {"spacing": 0.0},
        {"spacing": -1.0},
        {"spacing": float("nan")},
        {"unknown_zoom": 0.0},
        {"size": 0},
        {"size": 96.0},
        {"size": True},
        {"unknown_extent": -256},
        {"clip_low": 99.5},
        {"clip_high": 101.0},
        {"clip_low": float("nan")},
        {"orientation": "LPS"},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreprocessConfig(**wrong)
