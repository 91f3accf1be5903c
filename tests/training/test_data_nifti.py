"""Reading and writing NIfTI: what headers say, and what comes back."""

import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.nifti import (
    DataError,
    image_shape,
    read_image,
    read_labels,
    write_labels,
)

LPS = np.diag([-1.5, -2.0, 8.0, 1.0])
LPS[:3, 3] = (40.0, 50.0, -60.0)


def save(path, array, affine, *, sform=1, qform=1, units="mm", pixdim=None, scaling=None):
    """Write by nibabel, then patch what nibabel would "repair" while writing."""
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units(units)
    image.to_filename(path)
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rb") as file:
        raw = bytearray(file.read())
    struct.pack_into("<hh", raw, 252, qform, sform)
    if pixdim is not None:
        struct.pack_into("<fff", raw, 80, *pixdim)
    if scaling is not None:
        struct.pack_into("<ff", raw, 112, *scaling)
    with opened(path, "wb") as file:
        file.write(raw)
    return path


def noise(shape=(5, 6, 4), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 1000, shape).astype(dtype)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("affine", "orientation", "spacing"),
    [
        (LPS, "LPS", (1.5, 2.0, 8.0)),
        (np.array([[3.0, 0, 0, 9], [0, 2, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1]]), "RAS", (3, 2, 1)),
        (np.array([[0, 0, 7.0, 0], [2, 0, 0, 0], [0, 3, 0, 5], [0, 0, 0, 1]]), "ASR", (2, 3, 7)),
    ],
)
def test_header_gives_spacing_and_orientation(tmp_path, name, affine, orientation, spacing):
    volume = read_image(save(tmp_path / name, noise(), affine))
    assert volume.spacing == pytest.approx(spacing)
    assert volume.orientation == orientation
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, noise())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_spacing_of_an_oblique_stack_is_clean(tmp_path):
    c, s = np.cos(0.4), np.sin(0.4)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * [1.4, 1.4, 10]
    affine[:3, 3] = 5
    assert read_image(save(tmp_path / "a.nii", noise(), affine)).spacing == (1.4, 1.4, 10.0)


def test_qform_alone_counts(tmp_path):
    volume = read_image(save(tmp_path / "a.nii", noise(), LPS, sform=0))
    assert (volume.orientation, volume.spacing) == ("LPS", (1.5, 2.0, 8.0))


@pytest.mark.parametrize(
    ("affine", "codes", "pixdim", "spacing"),
    [
        (np.eye(4), 0, None, None),
        (np.eye(4), 0, (1.5, 1.5, 10.0), (1.5, 1.5, 10.0)),  # the official ACDC files
        (np.eye(4), 2, None, None),  # nibabel's placeholder: a code, and nothing behind it
        (np.diag([-1.0, -1.0, 1.0, 1.0]), 1, None, None),  # SimpleITK's
    ],
)
def test_unknown_headers(tmp_path, affine, codes, pixdim, spacing):
    path = save(tmp_path / "a.nii", noise(), affine, sform=codes, qform=0, pixdim=pixdim)
    volume = read_image(path)
    assert volume.orientation is None
    assert volume.spacing == spacing


def test_one_millimetre_with_an_origin_is_recorded(tmp_path):
    affine = np.eye(4)
    affine[0, 3] = -80
    volume = read_image(save(tmp_path / "a.nii", noise(), affine))
    assert (volume.spacing, volume.orientation) == ((1.0, 1.0, 1.0), "RAS")


@pytest.mark.parametrize(("units", "factor"), [("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_units_become_mm(tmp_path, units, factor):
    volume = read_image(save(tmp_path / "a.nii", noise(), LPS, units=units))
    assert volume.spacing == pytest.approx([1.5 * factor, 2 * factor, 8 * factor])


def test_scaled_integers_and_floats_end_as_float32(tmp_path):
    path = save(tmp_path / "scaled.nii.gz", noise(), LPS, scaling=(0.5, -100.0))
    volume = read_image(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, noise() * 0.5 - 100)
    floats = noise(dtype=np.float64) / 7
    volume = read_image(save(tmp_path / "double.nii", floats, LPS))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, floats, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_cine_whole_and_by_frame(tmp_path, name):
    path = save(tmp_path / name, noise((5, 6, 4, 7)), LPS)
    assert image_shape(path, ndim=4) == (5, 6, 4, 7)
    np.testing.assert_array_equal(read_image(path, ndim=4).array, noise((5, 6, 4, 7)))
    frame = read_image(path, time_index=3)
    np.testing.assert_array_equal(frame.array, noise((5, 6, 4, 7))[..., 3])
    with pytest.raises(DataError, match="frame 7 asked for, but it has 7"):
        read_image(path, time_index=7)
    with pytest.raises(DataError, match="expected 3 dimensions"):
        read_image(path)


def test_trailing_singletons_are_dropped_and_no_others(tmp_path):
    path = save(tmp_path / "a.nii", noise((5, 6, 4, 1, 1)), LPS)
    assert read_image(path).array.shape == (5, 6, 4)
    assert read_image(path, ndim=4).array.shape == (5, 6, 4, 1)
    assert read_image(path, time_index=0).array.shape == (5, 6, 4)
    assert read_image(save(tmp_path / "b.nii", noise((5, 6, 1)), LPS)).array.shape == (5, 6, 1)


def test_labels(tmp_path):
    labels = (noise() % 4).astype(np.int16)
    for dtype in (np.uint8, np.int32, np.float32, np.float64):
        volume = read_labels(save(tmp_path / "a.nii", labels.astype(dtype), LPS), max_label=3)
        assert volume.array.dtype == np.uint8
        np.testing.assert_array_equal(volume.array, labels)


def test_other_structures_become_background(tmp_path):
    labels = noise() % 300
    expected = np.where(labels > 7, 0, labels)
    volume = read_labels(save(tmp_path / "a.nii", labels, LPS), max_label=7, above="background")
    np.testing.assert_array_equal(volume.array, expected)


@pytest.mark.parametrize("name", ["out.nii", "deep/out.nii.gz"])
@pytest.mark.parametrize("codes", [(1, 2), (0, 0), (2, 0)])
def test_written_labels_keep_the_header(tmp_path, name, codes):
    source = save(tmp_path / "a.nii.gz", noise(), LPS, sform=codes[0], qform=codes[1])
    like = read_image(source)
    labels = (noise() % 4).astype(np.int64)
    write_labels(tmp_path / name, labels, like)
    written, original = nib.load(tmp_path / name), nib.load(source)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    np.testing.assert_allclose(written.affine, original.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim"):
        np.testing.assert_array_equal(written.header[field], original.header[field])
    back = read_labels(tmp_path / name, max_label=3)
    assert (back.spacing, back.orientation) == (like.spacing, like.orientation)
    assert [p.name for p in (tmp_path / name).parent.glob(".*")] == []


def test_written_labels_drop_the_scaling_of_the_image(tmp_path):
    path = save(tmp_path / "a.nii", noise(), LPS, scaling=(0.5, -100.0))
    like = read_image(path)
    like.header.set_slope_inter(0.5, -100)  # nibabel takes it out of a header that it reads
    write_labels(tmp_path / "out.nii", noise() % 4, like)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), noise() % 4)
    raw = (tmp_path / "out.nii").read_bytes()
    assert struct.unpack_from("<ff", raw, 112) == (1, 0)  # not NaN, which not every reader knows


def test_write_refuses_and_leaves_nothing(tmp_path, monkeypatch):
    like = read_image(save(tmp_path / "a.nii", noise(), LPS))
    with pytest.raises(DataError, match="shape"):
        write_labels(tmp_path / "out.nii", np.zeros((5, 6, 3)), like)
    with pytest.raises(DataError, match="integers"):
        write_labels(tmp_path / "out.nii", np.full((5, 6, 4), 0.5), like)
    with pytest.raises(DataError, match=r"ends in \.nii"):
        write_labels(tmp_path / "out.png", np.zeros((5, 6, 4)), like)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_labels(tmp_path / "out.nii", np.zeros((5, 6, 4)), like)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii"]
