"""The slice cache: built once, whole or not at all."""

import os
import pickle
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data import cache as cache_module
from salkernels.training.data.cache import cache_key, open_cache, require_labels
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.nifti import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.preprocess import IGNORE, PreprocessConfig, preprocess

ACDC = DATASETS["acdc"]
CONFIG = PreprocessConfig(size=48)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return write_phantom(root, subjects=3, slices=4, size=32, spacing=(3, 3, 8), cine_frames=4)


@pytest.fixture
def data(phantom, tmp_path):
    return shutil.copytree(phantom, tmp_path / "data")


def test_content(data, tmp_path):
    scans = ACDC.find(data, cine=True)
    cache = open_cache(list(reversed(scans)), CONFIG, ACDC, tmp_path / "cache")
    assert cache.images.shape == cache.labels.shape == (3 * 4 * 4, 48, 48)
    assert (cache.images.dtype, cache.labels.dtype) == (np.float32, np.uint8)
    assert cache.subjects == ["patient001", "patient002", "patient003"]
    assert cache.size == 48
    assert cache.info.class_names == ACDC.class_names
    assert cache.config == CONFIG
    assert [v.name for v in cache.volumes] == [s.name for s in scans]
    for index, (entry, scan) in enumerate(zip(cache.volumes, scans, strict=True)):
        image = nib.load(scan.image)
        assert (entry.image, entry.label, entry.role, entry.group) == (
            scan.image,
            scan.label,
            scan.role,
            scan.group,
        )
        assert entry.spacing == (3, 3, 8)
        assert cache.num_slices(index) == entry.num_slices == 4
        assert entry.offset == 4 * index
        array = np.asarray(image.dataobj)
        if scan.time_index is not None:
            array = array[..., scan.time_index]
        volume = cache_module.read_image(scan.image, ndim=array.ndim, time_index=scan.time_index)
        labels = None if scan.label is None else np.asarray(nib.load(scan.label).dataobj)
        done = preprocess(volume, labels, CONFIG, num_classes=4)
        np.testing.assert_array_equal(cache.image(index), done.images)
        np.testing.assert_array_equal(cache.label(index), done.labels)
        assert entry.geometry == done.geometry
        assert entry.labelled == (scan.role != "cine")
        assert (cache.label(index) == IGNORE).all() == (scan.role == "cine")
    assert cache.of_subject("patient002") == [4, 5, 6, 7]
    with pytest.raises(DataError, match="patient9"):
        cache.of_subject("patient9")
    with pytest.raises(ValueError, match="read-only"):
        cache.images[0] = 0


def test_reuse(data, tmp_path, monkeypatch):
    scans = ACDC.find(data)
    first = open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "read_scan", None)  # any reading would fail
    again = open_cache(list(reversed(scans)), CONFIG, ACDC, tmp_path / "cache")
    assert again.key == first.key
    moved = data.rename(tmp_path / "elsewhere")
    third = open_cache(ACDC.find(moved), CONFIG, ACDC, tmp_path / "cache")
    assert third.key == first.key
    assert third.volumes[0].image.is_file()


def test_the_key_follows_files_and_settings(data):
    scans = ACDC.find(data, cine=True)
    keys = {cache_key(scans, CONFIG, ACDC)}

    def changed(scans=scans, config=CONFIG, info=ACDC):
        key = cache_key(scans, config, info)
        fresh = key not in keys
        keys.add(key)
        return fresh

    assert not changed()
    for name, value in {
        "spacing": 2.0,
        "unknown_max_extent": 300,
        "unknown_extent": 200,
        "unknown_zoom": 0.4,
        "size": 64,
        "clip_low": 1.0,
        "clip_high": 99.0,
        "orientation": "RAS",
        "unknown_spacing": 1.0,
        "mixed_spacing": True,
        "window": (0.0, 500.0),
    }.items():
        assert changed(config=replace(CONFIG, **{name: value})), name
    assert changed(info=replace(ACDC, name="other"))
    assert changed(info=replace(ACDC, above_max="background"))
    assert changed(info=replace(ACDC, values=((0,), (1,), (2,), (3,))))
    assert changed(scans=scans[1:])
    for name, value in {
        "subject": "patient9",
        "frame": "frame99",
        "role": "",
        "group": "X",
        "stated_spacing": (1.0, 1.0, 8.0),
    }.items():
        assert changed(scans=[replace(scans[0], **{name: value}), *scans[1:]]), name
    assert changed(scans=[replace(scans[0], label=None), *scans[1:]])
    for path in (scans[0].image, scans[0].label):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert not changed(), path
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert changed(), path


def test_pickles_are_small_and_reopen(data, tmp_path):
    cache = open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    text = pickle.dumps(cache)
    assert len(text) < cache.images.nbytes / 10
    copy = pickle.loads(text)
    np.testing.assert_array_equal(copy.images, cache.images)
    np.testing.assert_array_equal(copy.labels, cache.labels)
    assert copy.volumes == cache.volumes
    shutil.rmtree(cache.folder)
    with pytest.raises(DataError, match=r"images\.npy"):
        pickle.loads(text)


def test_require_labels(data, tmp_path):
    """A subject with labels for some of its scans is learnt from, and scored, by those."""
    (data / "patient002" / "patient002_frame01_gt.nii.gz").unlink()
    for path in (data / "patient003").glob("*_gt.nii.gz"):
        path.unlink()
    cache = open_cache(ACDC.find(data, cine=True), CONFIG, ACDC, tmp_path / "cache")
    assert cache.labelled_subjects == ["patient001", "patient002"]
    require_labels(cache, ["patient001", "patient002"])
    with pytest.raises(DataError, match="pre-training only") as caught:
        require_labels(cache, ["patient001", "patient003"])
    assert str(caught.value).splitlines()[1:] == ["  patient003"]
