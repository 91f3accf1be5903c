"""The phantom: reproducible, in the ACDC layout, and shaped like a heart."""

import time

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.datasets import DATASETS, read_scan
from salkernels.training.data.nifti import DataError, read_image
from salkernels.training.data.phantom import write_phantom

ACDC = DATASETS["acdc"]
RV, MYOCARDIUM, LV = 1, 2, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="module")
def pairs(root):
    return [read_scan(scan, ACDC) for scan in ACDC.find(root)]


def areas(labels):
    """(Z, 3): pixels of RV, myocardium and LV in each slice."""
    return np.stack([(labels == k).sum(axis=(0, 1)) for k in (RV, MYOCARDIUM, LV)], axis=1)


def test_layout(root):
    scans = ACDC.find(root)
    assert len(scans) == 20
    assert [s.role for s in scans] == ["ED", "ES"] * 10
    assert len({s.group for s in scans}) == 5
    for scan in scans:
        image = nib.load(scan.image)
        assert image.get_data_dtype() == np.int16
        assert image.shape == nib.load(scan.label).shape == (96, 96, 8)
        for code in ("sform_code", "qform_code"):
            assert image.header[code] == 1
        volume = read_image(scan.image)
        assert volume.spacing == (1.5, 1.5, 8.0)
        assert volume.orientation is not None
        assert volume.array.min() >= 0
        assert 1000 < volume.array.max() <= 4095


def test_classes_are_in_most_slices(pairs):
    present = np.concatenate([areas(labels) > 3 for _, labels in pairs])
    assert (present.all(axis=1)).mean() > 0.75
    for _, labels in pairs:
        assert set(np.unique(labels)) == {0, RV, MYOCARDIUM, LV}


def test_cavity_lies_inside_its_ring(pairs):
    for _, labels in pairs:
        cavity, allowed = labels == LV, (labels == LV) | (labels == MYOCARDIUM)
        for axis in (0, 1):
            for step in (-1, 1):
                assert allowed[np.roll(cavity, step, axis)].all()


def test_hearts_shrink_to_the_apex(pairs):
    for _, labels in pairs:
        area = areas(labels).sum(axis=1)
        assert (np.diff(area) <= 0.02 * area[0]).all()
        assert area[-1] < 0.5 * area[0]


def test_systole(pairs):
    for (_, ed), (_, es) in zip(pairs[::2], pairs[1::2], strict=True):
        ed_area, es_area = areas(ed).sum(axis=0), areas(es).sum(axis=0)
        assert es_area[2] < 0.85 * ed_area[2]
        assert es_area[0] < 0.95 * ed_area[0]

        def thickness(area):  # of a ring with these areas, at the base
            return np.sqrt((area[0, 1] + area[0, 2]) / np.pi) - np.sqrt(area[0, 2] / np.pi)

        assert thickness(areas(es)) > 1.05 * thickness(areas(ed))


def test_hearts_stay_inside(pairs):
    for _, labels in pairs:
        for border in (labels[:2], labels[-2:], labels[:, :2], labels[:, -2:]):
            assert not border.any()


def test_contrast_is_that_of_bssfp(pairs):
    for image, labels in pairs:
        blood = np.median(image.array[labels == LV])
        muscle = np.median(image.array[labels == MYOCARDIUM])
        assert blood > 1.7 * muscle
        assert np.median(image.array[labels == RV]) > 1.4 * muscle


def test_intensity_alone_does_not_segment(pairs):
    """Blood-bright pixels are not only blood: else the phantom would teach nothing."""
    image, labels = pairs[0]
    bright = image.array > np.percentile(image.array[(labels == LV) | (labels == RV)], 20)
    assert (labels[bright] == 0).mean() > 0.4


def test_subjects_differ(pairs):
    centres = [np.argwhere(labels == LV).mean(axis=0)[:2] for _, labels in pairs[::2]]
    assert np.std(centres, axis=0).min() > 0.8
    sizes = [(labels == LV).sum() for _, labels in pairs[::2]]
    assert max(sizes) > 1.4 * min(sizes)


def test_deterministic(tmp_path):
    settings = {"subjects": 3, "slices": 4, "size": 40}
    first = write_phantom(tmp_path / "a", **settings, seed=1)
    again = write_phantom(tmp_path / "b", **settings, seed=1)
    other = write_phantom(tmp_path / "c", **settings, seed=2)
    more = write_phantom(tmp_path / "d", **{**settings, "subjects": 4}, seed=1)
    files = sorted(p.relative_to(first) for p in first.rglob("*.nii.gz"))
    assert len(files) == 12

    def array(root, file):
        return np.asarray(nib.load(root / file).dataobj)

    for file in files:
        np.testing.assert_array_equal(array(first, file), array(again, file))
        np.testing.assert_array_equal(array(first, file), array(more, file))
    assert any(
        not (other / file).is_file() or (array(first, file) != array(other, file)).any()
        for file in files
    )


def test_cine(tmp_path):
    root = write_phantom(tmp_path / "a", subjects=1, slices=4, size=40, cine_frames=8)
    scans = ACDC.find(root, cine=True)
    assert len(scans) == 8
    series = read_image(root / "patient001" / "patient001_4d.nii.gz", ndim=4).array
    assert series.shape == (40, 40, 4, 8)
    for scan in scans:
        frame = int(scan.frame.removeprefix("frame")) - 1
        np.testing.assert_array_equal(read_scan(scan, ACDC)[0].array, series[..., frame])


def test_existing_folders(tmp_path):
    settings = {"subjects": 1, "slices": 3, "size": 32}
    root = write_phantom(tmp_path / "a", **settings)
    stamp = (root / "patient001" / "Info.cfg").stat().st_mtime_ns
    assert write_phantom(root, **settings) == root
    assert (root / "patient001" / "Info.cfg").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="not empty"):
        write_phantom(root, **settings, seed=1)
    (root / "phantom.json").unlink()  # as after a kill
    with pytest.raises(DataError, match="not a complete phantom"):
        write_phantom(root, **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not empty"):
        write_phantom(tmp_path / "file", **settings)
    (tmp_path / "empty").mkdir()
    write_phantom(tmp_path / "empty", **settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"subjects": 0},
        {"slices": 2},
        {"size": 16},
        {"cine_frames": 2},
        {"spacing": (1.5, 0, 8)},
        {"spacing": (1.5, 1.5)},
    ],
)
def test_bad_settings(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        write_phantom(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()


def test_fast(tmp_path):
    start = time.process_time()
    write_phantom(tmp_path / "a")
    assert time.process_time() - start < 6  # about 1 s alone; other processes share the cores
