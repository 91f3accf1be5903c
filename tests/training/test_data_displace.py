"""A displaced copy: each subject elsewhere, image and labels alike, and nothing else changed."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.datasets import DATASETS, read_scan
from salkernels.training.data.displace import displace, main, moved, offset_of
from salkernels.training.data.nifti import DataError
from salkernels.training.data.phantom import write_phantom


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acdc")
    write_phantom(folder, subjects=3, seed=0)
    return folder


def centre(label):
    """Of the labelled pixels, along the first two axes."""
    return np.array([axis.mean() for axis in np.nonzero(label)[:2]])


def test_anatomy_moves_by_the_offset_of_its_subject(data, tmp_path):
    info = DATASETS["acdc"]
    assert displace(data, tmp_path / "copy", share=0.1) == len(info.find(data))
    offsets = set()
    pairs = zip(info.find(data), info.find(tmp_path / "copy"), strict=True)
    for before, after in pairs:
        assert (before.name, before.role, before.group) == (after.name, after.role, after.group)
        (image, label), (image_after, label_after) = (read_scan(s, info) for s in (before, after))
        assert image.array.shape == image_after.array.shape
        offset = offset_of(before.subject, image.array.shape, 0.1, 0)
        offsets.add(offset)
        assert np.abs(centre(label) - centre(label_after) - offset).max() < 1e-6
        x, y = (max(0, -d) for d in offset)
        kept = image_after.array[x : x + 20, y : y + 20]
        dx, dy = offset
        assert np.array_equal(kept, image.array[x + dx : x + dx + 20, y + dy : y + dy + 20])
        # A voxel's place in the scanner is what it was.
        there, here = (nib.load(s.image).affine for s in (before, after))
        assert np.allclose(here @ [0, 0, 0, 1], there @ [dx, dy, 0, 1], atol=1e-4)
    assert len(offsets) == 3


def test_what_enters_is_a_mirror_image_and_background():
    volume = np.arange(4 * 3 * 2).reshape(4, 3, 2) + 1
    image, label = (moved(volume, (-1, 1), label) for label in (False, True))
    assert np.array_equal(image[1:, :2], volume[:3, 1:])
    assert np.array_equal(image[0, :2], volume[0, 1:])
    assert (label[0] == 0).all()
    assert (label[:, 2] == 0).all()


def test_offsets_hang_on_the_subject_alone_and_fill_their_range():
    names = [f"patient{n:03d}" for n in range(400)]
    found = np.array([offset_of(name, (100, 200, 9), 0.2, 0) for name in names])
    assert np.abs(found).max(axis=0).tolist() == [20, 40]
    assert np.abs(found.mean(axis=0) / [100, 200]).max() < 0.02
    assert (found[7] == offset_of("patient007", (100, 200, 9), 0.2, 0)).all()
    assert (found[7] != offset_of("patient007", (100, 200, 9), 0.2, 1)).any()


def test_errors_are_told_and_write_nothing(data, tmp_path, capsys):
    with pytest.raises(DataError, match=r"0 < share < 0\.5, got 0\.5"):
        displace(data, tmp_path / "copy", share=0.5)
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="exists"):
        displace(data, tmp_path / "there")
    assert main([str(tmp_path / "none"), str(tmp_path / "copy")]) == 2
    assert "displace: error:" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()
