"""The slice cache when things go wrong: damage, kills, full disks, bad files, rivals."""

import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data import cache as cache_module
from salkernels.training.data.cache import VolumeCache, cache_key, open_cache
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.nifti import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.preprocess import PreprocessConfig, preprocess

ACDC = DATASETS["acdc"]
CONFIG = PreprocessConfig(size=48)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return write_phantom(root, subjects=3, slices=4, size=32, spacing=(3, 3, 8), cine_frames=4)


@pytest.fixture
def data(phantom, tmp_path):
    return shutil.copytree(phantom, tmp_path / "data")


def visible(folder):
    return sorted(
        p.name for p in folder.iterdir() if not p.name.endswith((".lock", ".digests.json"))
    )


def spoil(folder, what):
    if what == "no index":
        (folder / "index.json").unlink()
    elif what == "half an index":
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text[: len(text) // 2])
    elif what == "half the images":
        with open(folder / "images.npy", "r+b") as file:
            file.truncate(1000)
    elif what == "no labels":
        (folder / "labels.npy").unlink()
    else:
        index = json.loads((folder / "index.json").read_text())
        index["version" if what == "old version" else "key"] = 0
        (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "what",
    ["no index", "half an index", "half the images", "no labels", "old version", "another key"],
)
def test_damaged_caches_are_built_again(data, tmp_path, what):
    scans = ACDC.find(data)
    good = open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    expected = np.array(good.images)
    spoil(good.folder, what)
    if what != "another key":
        with pytest.raises(DataError, match=str(good.folder)):
            VolumeCache(good.folder, ACDC)
    again = open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    np.testing.assert_array_equal(again.images, expected)
    assert again.key == good.key
    assert visible(tmp_path / "cache") == [again.folder.name]


def test_leftovers_of_a_killed_build_are_removed(data, tmp_path):
    scans = ACDC.find(data)
    name = cache_key(scans, CONFIG, ACDC)[:16]
    dead = tmp_path / "cache" / f".{name}.0123abcd.tmp"
    dead.mkdir(parents=True)
    (dead / "images.npy").write_bytes(b"half")
    other = tmp_path / "cache" / ".ffffffffffffffff.0123abcd.tmp"  # may be another live build
    other.mkdir()
    cache = open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    assert visible(tmp_path / "cache") == sorted([other.name, cache.folder.name])


def test_an_interrupted_build_leaves_nothing(data, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **settings):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return preprocess(*args, **settings)

    monkeypatch.setattr(cache_module, "preprocess", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_the_name_appears_last_and_at_once(data, tmp_path, monkeypatch):
    def killed(source, target):
        assert not target.exists()
        VolumeCache(source, ACDC)  # complete before it is named
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_full_disk(data, tmp_path, monkeypatch):
    def full(file, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "_finish", full)
    with pytest.raises(DataError, match="disk is full"):
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the Linux device /dev/full")
def test_full_disk_is_an_error_of_the_write_and_no_signal(data, tmp_path, monkeypatch):
    """A writable memory map would die of SIGBUS here; streams must raise ENOSPC."""
    make = cache_module.Path.mkdir

    def mkdir(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.name.endswith(".tmp"):
            (self / "images.npy").symlink_to("/dev/full")

    monkeypatch.setattr(cache_module.Path, "mkdir", mkdir)
    with pytest.raises(DataError, match="disk is full"):
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    assert visible(tmp_path / "cache") == []


def test_cache_folder_that_is_a_file(data, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot be built"):
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")


def test_all_bad_files_in_one_error(data, tmp_path):
    scans = ACDC.find(data, cine=True)
    by_name = {scan.name: scan for scan in scans}
    first = by_name["patient001_frame01"]
    first.image.write_bytes(b"")
    (data / "patient001" / "patient001_4d.nii.gz").write_bytes(b"no NIfTI")
    second = by_name["patient002_frame01"]
    image = nib.load(second.label)
    labels = np.asarray(image.dataobj)
    nib.Nifti1Image(labels[:, :, :3], image.affine).to_filename(second.label)
    third = next(s for s in scans if s.subject == "patient003" and s.role == "ES")
    nib.Nifti1Image(np.full((32, 32, 4), 7, np.int16), image.affine).to_filename(third.image)
    nib.Nifti1Image(np.full((32, 32, 4), 9, np.uint8), image.affine).to_filename(third.label)
    gone = next(s for s in scans if s.subject == "patient002" and s.role == "ES")
    gone.image.unlink()
    with pytest.raises(DataError) as caught:
        open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    title, *lines = str(caught.value).splitlines()
    assert title == "5 problems with the data:"
    for line, (path, reason) in zip(
        lines,
        [
            (first.image, "empty"),
            (data / "patient001" / "patient001_4d.nii.gz", "readable"),  # once, not per frame
            (second.label, r"shape (32, 32, 3) does not fit"),
            (gone.image, "no such file"),
            (third.label, "label 9"),
        ],
        strict=True,
    ):
        assert line.strip().startswith(f"{path}:")
        assert reason in line
    assert visible(tmp_path / "cache") == []


def test_constant_images_are_named(data, tmp_path):
    scan = ACDC.find(data)[0]
    nib.Nifti1Image(np.full((32, 32, 4), 7, np.int16), np.eye(4)).to_filename(scan.image)
    with pytest.raises(DataError, match="constant") as caught:
        open_cache(ACDC.find(data), CONFIG, ACDC, tmp_path / "cache")
    assert str(scan.image) in str(caught.value)


def test_many_bad_files_are_counted(data, tmp_path):
    scan = ACDC.find(data)[0]
    scans = [replace(scan, frame=f"frame{i}", image=data / f"no{i}.nii") for i in range(50)]
    with pytest.raises(DataError) as caught:
        open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[0].startswith("50 problems")
    assert lines[-1].strip() == "... and 30 more"


def test_no_scans_and_double_scans(data, tmp_path):
    with pytest.raises(DataError, match="at least one scan"):
        open_cache([], CONFIG, ACDC, tmp_path / "cache")
    scans = ACDC.find(data)
    with pytest.raises(DataError, match="patient001_frame01"):
        open_cache([*scans, scans[0]], CONFIG, ACDC, tmp_path / "cache")


def _open_elsewhere(data, folder, start, answers):
    start.wait(60)
    cache = open_cache(ACDC.find(data), CONFIG, ACDC, folder)
    answers.put((cache.key, float(np.abs(cache.images).sum(dtype=np.float64))))


def test_two_builders_at_once(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    arguments = (data, tmp_path / "cache", start, answers)
    builders = [context.Process(target=_open_elsewhere, args=arguments) for _ in range(2)]
    for builder in builders:
        builder.start()
    results = [answers.get(timeout=120) for _ in builders]
    for builder in builders:
        builder.join(30)
        assert builder.exitcode == 0
    assert results[0] == results[1]
    assert visible(tmp_path / "cache") == [results[0][0][:16]]


def test_two_builders_without_locks(data, tmp_path, monkeypatch):
    """Where locks do not work, the slower builder takes the faster one's cache."""
    scans = ACDC.find(data)
    ready = open_cache(scans, CONFIG, ACDC, tmp_path / "ready").folder

    def overtaken(*args, **settings):
        target = tmp_path / "cache" / ready.name
        if not target.exists():
            shutil.copytree(ready, target)
        return preprocess(*args, **settings)

    monkeypatch.setattr(cache_module, "preprocess", overtaken)
    cache = open_cache(scans, CONFIG, ACDC, tmp_path / "cache")
    assert len(cache.volumes) == len(scans)
    assert visible(tmp_path / "cache") == [ready.name]
