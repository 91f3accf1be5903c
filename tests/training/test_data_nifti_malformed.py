"""Files that must be refused: damaged, absurd, or not what they are called."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.nifti import DataError, read_image, read_labels

LPS = np.diag([-1.5, -2.0, 8.0, 1.0])
LPS[:3, 3] = (40.0, 50.0, -60.0)


def save(path, array, affine):
    nib.Nifti1Image(array, affine).to_filename(path)
    return path


def noise(shape=(5, 6, 4), dtype=np.int16):
    return np.random.default_rng(0).integers(0, 1000, shape).astype(dtype)


def with_header(path, dims, *, affine=None, payload=64):
    """A file whose header claims `dims`, with next to nothing behind it."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_sform(LPS, code=1)
    header["dim"] = [len(dims), *dims, *[1] * (7 - len(dims))]
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    if affine is not None:
        header["srow_x"] = affine
    raw = header.binaryblock + bytes(4 + payload)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def bad_missing(path):
    pass


def bad_folder(path):
    path.mkdir()


def bad_empty(path):
    path.write_bytes(b"")


def bad_text(path):
    path.write_bytes(b"this is not an image\n" * 40)


def bad_truncated(path):
    save(path, noise((40, 40, 10)), LPS)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bad_nan_voxel(path):
    save(path, np.where(noise() > 990, np.nan, 1.0).astype(np.float32), LPS)


def bad_overflow(path):
    save(path, np.full((4, 4, 4), 1e300), LPS)


def bad_extent(path):
    with_header(path, (30000, 30000, 4))


def bad_voxels(path):
    with_header(path, (4000, 4000, 4000))


def bad_promise(path):
    with_header(path, (4000, 4000, 30))


def bad_negative(path):
    with_header(path, (5, -6, 4))


def bad_zero(path):
    with_header(path, (5, 0, 4))


def bad_flat(path):
    with_header(path, (5, 6))


def bad_affine_nan(path):
    with_header(path, (4, 4, 2), affine=(np.nan, 0, 0, 0))


def bad_affine_singular(path):
    with_header(path, (4, 4, 2), affine=(0, 0, 0, 0))


def bad_complex(path):
    save(path, noise().astype(np.complex64), LPS)


def bad_rgb(path):
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(path, rgb, LPS)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bad_missing, "no such file"),
        (bad_folder, "is a folder"),
        (bad_empty, "empty"),
        (bad_text, "not a readable NIfTI"),
        (bad_truncated, "not a readable NIfTI|truncated"),
        (bad_nan_voxel, "NaN"),
        (bad_overflow, "infinite"),
        (bad_extent, "absurd"),
        (bad_voxels, "absurd"),
        (bad_promise, "truncated"),
        (bad_negative, "absurd|readable"),
        (bad_zero, "absurd|readable"),
        (bad_flat, "expected 3 dimensions"),
        (bad_affine_nan, "affine"),
        (bad_affine_singular, "affine"),
        (bad_complex, "complex64"),
        (bad_rgb, "RGB"),
    ],
)
def test_unusable_files_are_named_in_one_line(tmp_path, suffix, make, reason):
    path = tmp_path / f"scan{suffix}"
    make(path)
    with pytest.raises(DataError, match=reason) as caught:
        read_image(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_absurd_headers_are_refused_before_voxels_are_read(tmp_path, monkeypatch):
    def read(*_, **__):
        pytest.fail("voxels were read")  # not an Exception: read_image cannot swallow it

    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "_get_unscaled", read)
    for make in (bad_extent, bad_voxels, bad_promise):
        make(tmp_path / "scan.nii.gz")
        with pytest.raises(DataError):
            read_image(tmp_path / "scan.nii.gz")


def test_other_formats_are_refused(tmp_path):
    path = tmp_path / "scan.mgz"
    nib.MGHImage(noise(dtype=np.float32), LPS).to_filename(path)
    with pytest.raises(DataError, match="expected a NIfTI file"):
        read_image(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(9, "label 9"), (300, "label 300"), (-1, "label -1"), (1.5, "fractions"), (np.nan, "NaN")],
)
def test_bad_labels(tmp_path, value, reason):
    labels = (noise(dtype=np.float32)) % 4
    labels[1, 1, 1] = value
    path = save(tmp_path / "a.nii.gz", labels, LPS)
    with pytest.raises(DataError, match=reason) as caught:
        read_labels(path, max_label=3)
    assert str(path) in str(caught.value)
