"""Going back: labels on the canvas to labels of the stored volume."""

import json
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salkernels.training.data.nifti import Volume
from salkernels.training.data.preprocess import Geometry, PreprocessConfig, preprocess

CODES = ["RAS", "LPS", "ASR", "PIL", "SLA", None]


def volume(shape, codes, pixel):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    affine = np.eye(4)
    if codes is not None:
        affine[:3, :3] = 0
        for axis, code in enumerate(codes):
            world = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
            affine[world, axis] = pixel * (1 if code in "RAS" else -1)
    return Volume(array, affine, (pixel,) * 3, codes, nib.Nifti1Header())


def scores(labels, classes=4):
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), classes)
    return one_hot.permute(0, 3, 1, 2).float()


def round_trip(labels, codes, pixel, config):
    image = volume(labels.shape, codes, pixel)
    done = preprocess(image, labels, config, num_classes=4)
    geometry = Geometry.from_dict(json.loads(json.dumps(asdict(done.geometry))))
    assert geometry == done.geometry
    restored = geometry.restore(scores(done.labels))
    assert restored.dtype == np.uint8
    assert restored.shape == labels.shape
    return restored, done


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 33)] * 3),
    codes=st.sampled_from(CODES),
    orientation=st.sampled_from(["native", "RAS"]),
    seed=st.integers(0, 99),
)
def test_exact_when_nothing_is_resampled_or_cropped(shape, codes, orientation, seed):
    labels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    config = PreprocessConfig(spacing=2.0, size=33, orientation=orientation)
    restored, done = round_trip(labels, codes, 2.0, config)
    assert done.lost_voxels == 0
    np.testing.assert_array_equal(restored, labels)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 33)] * 3),
    size=st.integers(8, 40),
    codes=st.sampled_from(CODES),
)
def test_crop_loses_exactly_what_is_counted(shape, size, codes):
    labels = np.random.default_rng(2).integers(0, 4, shape).astype(np.uint8)
    config = PreprocessConfig(spacing=2.0, size=size, orientation="RAS")
    restored, done = round_trip(labels, codes, 2.0, config)
    kept = restored != 0
    np.testing.assert_array_equal(restored[kept], labels[kept])
    assert np.count_nonzero(labels) - np.count_nonzero(kept) == done.lost_voxels


def heart(shape):
    """An RV beside an LV in its ring, off the centre, along the last axis."""
    x, y = np.meshgrid(*[np.arange(n) for n in shape[:2]], indexing="ij")
    labels = np.zeros(shape, np.uint8)
    for z in range(shape[2]):
        labels[np.hypot(x - 70, y - 62) < 30 - z, z] = 1
        rho = np.hypot(x - 100, y - 70)
        labels[rho < 32 - z, z] = 2
        labels[rho < 22 - z, z] = 3
    return labels


def dice(a, b, label):
    return 2 * np.sum((a == label) & (b == label)) / (np.sum(a == label) + np.sum(b == label))


@pytest.mark.parametrize("pixel", [0.9, 1.4, 2.8, 4.0])
@pytest.mark.parametrize("codes", ["RAS", "LPS", None])
def test_resampled_labels_come_back(pixel, codes):
    labels = heart((171, 130, 3))
    restored, done = round_trip(labels, codes, pixel, PreprocessConfig(orientation="RAS"))
    assert done.geometry.size == 128
    assert all(dice(restored, labels, label) > 0.9 for label in (1, 2, 3))


def test_restored_labels_do_not_drift():
    """Half a pixel lost in the resampling, native or coarse, would move the centre of mass.

    The bound leaves room for the RV's tips, which the coarse grid rounds off.
    """
    labels = heart((171, 130, 3))
    restored, _ = round_trip(labels, "RAS", 1.1, PreprocessConfig())
    for label in (1, 2, 3):
        centres = [np.argwhere(volume == label).mean(axis=0) for volume in (labels, restored)]
        np.testing.assert_allclose(centres[0], centres[1], atol=0.3)


def test_outside_the_canvas_is_background():
    labels = np.full((40, 40, 2), 3, np.uint8)
    restored, _ = round_trip(labels, "RAS", 2.0, PreprocessConfig(spacing=2.0, size=16))
    assert (restored[12:28, 12:28] == 3).all()
    assert np.count_nonzero(restored) == 16 * 16 * 2


def test_the_edge_of_the_canvas_is_sharp():
    """Interpolation must not let a class that touches the edge grow over it."""
    labels = np.full((80, 80, 1), 3, np.uint8)
    restored, _ = round_trip(labels, "RAS", 1.0, PreprocessConfig(spacing=2.0, size=16))
    assert (restored[24:56, 24:56] == 3).all()
    assert np.count_nonzero(restored) == 32 * 32


def test_logits_of_any_sign_leave_the_outside_alone():
    image = volume((40, 40, 2), "RAS", 2.0)
    config = PreprocessConfig(spacing=2.0, size=16)
    geometry = preprocess(image, None, config, num_classes=4).geometry
    logits = torch.full((2, 4, 16, 16), -9.0)
    logits[:, 2] = -4
    restored = geometry.restore(logits)
    assert (restored[12:28, 12:28] == 2).all()
    assert np.count_nonzero(restored) == 16 * 16 * 2


def test_large_volumes_go_in_chunks(monkeypatch):
    labels = heart((171, 130, 5))
    whole, _ = round_trip(labels, "LPS", 1.4, PreprocessConfig(orientation="RAS"))
    monkeypatch.setattr("salkernels.training.data.preprocess._CHUNK_PIXELS", 4 * 171 * 130 * 2)
    pieces, _ = round_trip(labels, "LPS", 1.4, PreprocessConfig(orientation="RAS"))
    np.testing.assert_array_equal(pieces, whole)


def test_wrong_scores_are_refused():
    image = volume((20, 24, 3), "RAS", 2.0)
    geometry = preprocess(image, None, PreprocessConfig(size=16), num_classes=4).geometry
    for shape in [(2, 4, 16, 16), (3, 4, 16, 17), (3, 16, 16)]:
        with pytest.raises(ValueError, match="expected scores"):
            geometry.restore(torch.zeros(shape))
    broken = torch.zeros(3, 4, 16, 16)
    broken[1, 1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        geometry.restore(broken)
