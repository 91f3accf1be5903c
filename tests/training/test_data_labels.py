"""What stands in label maps: scaled integers, frames of 4D files, values of their own."""

import json

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.cache import cache_key, open_cache
from salkernels.training.data.datasets import DATASETS, Scan, read_scan, read_truth
from salkernels.training.data.manifest import main as manifest
from salkernels.training.data.manifest import read_manifest
from salkernels.training.data.nifti import DataError, read_labels
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.data.review import notices, require_classes

ACDC = DATASETS["acdc"]
AFFINE = np.diag([1.5, 1.5, 8.0, 1.0])
AFFINE[0, 3] = 7
CLASSES = ["background", "myocardium", "LA", "LV"]
MM_WHS = [0, 205, 420, 500]


def save(path, array, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nib.Nifti1Header()
    if kind is not None:
        header.set_data_dtype(kind)
    nib.Nifti1Image(array, AFFINE, header if kind is not None else None).to_filename(path)
    return path


def labels(shape=(8, 7, 4), high=4):
    return np.random.default_rng(1).integers(0, high, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "high"), [(np.uint8, 2), (np.uint8, 4), (np.int16, 4), (np.int16, 200), (np.int32, 9)]
)
def test_scaling_of_the_header_leaves_the_integers_that_are_meant(tmp_path, kind, high):
    """nibabel saves float64 into integer files with a slope that is no round number."""
    path = save(tmp_path / "a.nii", labels(high=high).astype(np.float64), kind)
    assert nib.load(path).dataobj.slope != 1
    found = read_labels(path, max_label=max(1, high - 1)).array
    np.testing.assert_array_equal(found, labels(high=high))


@pytest.mark.parametrize("off", [0.03, 0.5, -0.1])
def test_true_fractions_are_refused(tmp_path, off):
    path = save(tmp_path / "a.nii", labels().astype(np.float32) + np.float32(off))
    with pytest.raises(DataError, match="fractions"):
        read_labels(path, max_label=3)


def test_the_frame_of_a_4d_label_map(tmp_path):
    """As in M&Ms: image and label map are 4D, and two frames are labelled."""
    image = np.random.default_rng(0).integers(0, 900, (8, 7, 4, 5)).astype(np.int16)
    label = np.zeros((8, 7, 4, 5), np.uint8)
    label[..., 2] = labels()
    scan = Scan(
        "p1", "es", "", save(tmp_path / "p1.nii", image), save(tmp_path / "gt.nii", label), 2
    )
    volume, found = read_scan(scan, ACDC)
    np.testing.assert_array_equal(volume.array, image[..., 2])
    np.testing.assert_array_equal(found, labels())
    np.testing.assert_array_equal(read_truth(scan, ACDC), labels())
    save(scan.label, labels())  # a 3D one is that frame's
    np.testing.assert_array_equal(read_scan(scan, ACDC)[1], labels())
    save(scan.label, label[..., :2])
    with pytest.raises(DataError, match=r"gt\.nii: frame 2 asked for, but it has 2 frames"):
        read_scan(scan, ACDC)


def test_a_4d_label_map_of_a_volume_is_told_what_to_name(tmp_path):
    path = save(tmp_path / "gt.nii", labels((8, 7, 4, 5)))
    with pytest.raises(DataError, match="name one frame by time_index"):
        read_labels(path, max_label=3)


def mapped(tmp_path, stored, values=MM_WHS, **more):
    for number in (1, 2):
        noise = np.random.default_rng(number).integers(0, 900, (8, 7, 4)).astype(np.int16)
        save(tmp_path / f"s{number}.nii", noise)
        save(tmp_path / f"s{number}_gt.nii", stored)
    rows = [{"subject": f"p{n}", "image": f"s{n}.nii", "label": f"s{n}_gt.nii"} for n in (1, 2)]
    content = {"classes": CLASSES, "values": values, "scans": rows, **more}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    return read_manifest(tmp_path)


def test_values_of_the_label_maps_become_classes(tmp_path):
    info = mapped(tmp_path, np.array(MM_WHS, np.int16)[labels()])
    scans = info.find(tmp_path)
    np.testing.assert_array_equal(read_scan(scans[0], info)[1], labels())
    several = mapped(
        tmp_path, np.array([0, -1, 128, 255], np.int16)[labels()], [[0, -1], 128, 255, 9]
    )
    expected = np.array([0, 0, 1, 2])[labels()]
    np.testing.assert_array_equal(read_scan(several.find(tmp_path)[0], several)[1], expected)
    config = PreprocessConfig(size=16, spacing=1.5)
    assert cache_key(scans, config, info) != cache_key(scans, config, several)


def test_values_that_stand_for_nothing_are_refused_or_background(tmp_path):
    stored = np.array([0, 205, 420, 550], np.int16)[labels()]
    info = mapped(tmp_path, stored)
    with pytest.raises(DataError, match=r"s1_gt\.nii: 550 found, which stand for no class"):
        read_scan(info.find(tmp_path)[0], info)
    info = mapped(tmp_path, stored, above_max="background")
    found = read_scan(info.find(tmp_path)[0], info)[1]
    np.testing.assert_array_equal(found, np.array([0, 1, 2, 0])[labels()])


@pytest.mark.parametrize(
    "values", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 2.5], [0, 1, [], 3], [0, 1, True, 3], "0 1 2 3"]
)
def test_values_that_do_not_fit_the_classes(tmp_path, values):
    with pytest.raises(DataError, match="values: expected for each of the 4 classes"):
        mapped(tmp_path, labels(), values)


def test_the_command_takes_values_and_spacing(tmp_path, capsys):
    save(tmp_path / "p1_t2.nii", labels())
    save(tmp_path / "p1_gt.nii", np.array(MM_WHS, np.int16)[labels()])
    patterns = ["--images", "{subject}_t2.nii", "--labels", "{subject}_gt.nii"]
    more = ["--classes", *CLASSES, "--values", *map(str, MM_WHS), "--spacing", "1.2", "1.2", "9"]
    assert manifest([str(tmp_path), *patterns, *more]) == 0
    info = read_manifest(tmp_path)
    (scan,) = info.find(tmp_path)
    assert info.values == tuple((value,) for value in MM_WHS)
    assert read_scan(scan, info)[0].spacing == (1.2, 1.2, 9)
    np.testing.assert_array_equal(read_scan(scan, info)[1], labels())


def test_without_values_the_message_says_that_there_are_such(tmp_path):
    path = save(tmp_path / "gt.nii", np.array(MM_WHS, np.int16)[labels()])
    with pytest.raises(DataError, match=r"label 500 found; .*'values' in a manifest"):
        read_labels(path, max_label=3)


def test_label_maps_without_any_class_are_named_and_not_learnt_from(tmp_path):
    """MM-WHS with `above_max`: all its values lie above the last class."""
    stored = np.array(MM_WHS, np.int16)[labels()]
    info = mapped(tmp_path, stored, None, above_max="background")
    config = PreprocessConfig(size=16, spacing=1.5)
    cache = open_cache(info.find(tmp_path), config, info, tmp_path / "cache", progress=False)
    assert notices(cache) == ["label maps without any class: p1_scan, p2_scan"]
    with pytest.raises(DataError, match="no label map holds any class, of p1_scan, p2_scan"):
        require_classes(cache, cache.subjects)
    save(tmp_path / "s2_gt.nii", labels())
    cache = open_cache(info.find(tmp_path), config, info, tmp_path / "cache", progress=False)
    require_classes(cache, cache.subjects)
    with pytest.raises(DataError, match="of p1_scan"):
        require_classes(cache, ["p1"])
