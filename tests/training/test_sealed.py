"""Checksums: a flipped bit anywhere is seen, and what is healthy survives what is not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from salkernels._shared import files
from salkernels._shared.files import remove_temporaries, temporary_name, write_atomically
from salkernels.training.checkpoint import LAST, PREVIOUS, load_checkpoint, save_checkpoint
from salkernels.training.data import cache as cache_module
from salkernels.training.data.cache import NoCache, VolumeCache, open_cache
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.digests import MEMORY, scan_digests
from salkernels.training.data.nifti import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.errors import RunError
from salkernels.training.models import (
    Encoder,
    UNet,
    UNetConfig,
    load_encoder,
    load_unet,
    save_encoder,
    save_unet,
)

ACDC = DATASETS["acdc"]
FLIPS = 300


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def places(path, count=FLIPS):
    """Bits all over a file, its ends included."""
    last = 8 * path.stat().st_size - 1
    return [0, last, *random.Random(0).sample(range(last), count)]


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    state = {"step": 3, "module": {"w": torch.randn(40, 30)}, "sums": {"loss": 0.5}, "text": "x"}
    save_checkpoint(tmp_path, state)
    last = tmp_path / LAST
    for bit in places(last):
        flip(last, bit)
        with pytest.raises(RunError, match=r"last\.pt cannot be read"):
            load_checkpoint(tmp_path)
        flip(last, bit)
    assert load_checkpoint(tmp_path)["step"] == 3


def test_a_damaged_last_checkpoint_does_not_take_the_place_of_the_good_one(tmp_path, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "x": torch.zeros(100)})
    flip(tmp_path / LAST, 4000)
    assert load_checkpoint(tmp_path)["step"] == 1
    said = capsys.readouterr().err
    assert str(tmp_path / LAST) in said
    assert str(tmp_path / PREVIOUS) in said
    # The run goes on from there and saves; dies in the middle of it; saves again.
    save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path)["step"] == 3
    flip(tmp_path / LAST, 80)
    assert load_checkpoint(tmp_path)["step"] == 1


def test_the_one_before_is_never_missing(tmp_path, monkeypatch):
    """A kill at any rename leaves a whole checkpoint under each name that there was."""
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    original = os.replace
    for killed in (0, 1):
        calls = []

        def dies(source, target, calls=calls, killed=killed):
            if len(calls) == killed:
                raise KeyboardInterrupt
            calls.append(target)
            original(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {"step": 9})
        monkeypatch.setattr(os, "replace", original)
        assert load_checkpoint(tmp_path)["step"] == 2
        (tmp_path / LAST).rename(tmp_path / "kept")
        assert load_checkpoint(tmp_path)["step"] in (1, 2)
        (tmp_path / "kept").rename(tmp_path / LAST)
    assert not list((tmp_path / LAST).parent.glob(".*"))


@pytest.mark.parametrize("kind", ["encoder", "unet"])
def test_every_flipped_bit_of_weights_is_seen(kind, tmp_path):
    path, config = tmp_path / "w.safetensors", UNetConfig(width=1, depth=2)
    about = {"identity": {"data": "0123"}, "labelled": ["p1"]}
    if kind == "encoder":
        save_encoder(path, Encoder(config), about)
        load = load_encoder
    else:
        save_unet(path, UNet(config, 2), about)
        load = load_unet
    assert load(path)[1] == about
    for bit in places(path):
        flip(path, bit)
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            load(path)
        flip(path, bit)
    load(path)


def test_weights_of_the_version_before_are_read(tmp_path):
    """They had no checksum."""
    path, config = tmp_path / "w.safetensors", UNetConfig(width=1, depth=2)
    save_encoder(path, Encoder(config), {"step": 1})
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    description = json.loads(header["__metadata__"]["salkernels"])
    del description["checksum"]
    header["__metadata__"]["salkernels"] = json.dumps({**description, "format": 1})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    assert load_encoder(path)[1] == {"step": 1}
    # With the number of this version a checksum may not be missing.
    again = text.replace(b'\\"format\\": 1', b'\\"format\\": 2')
    path.write_bytes(struct.pack("<Q", len(again)) + again + content[8 + size :])
    with pytest.raises(ValueError, match="checksum"):
        load_encoder(path)


@pytest.mark.parametrize(
    "model",
    [
        {"width": 4096},
        {"width": 2**20, "depth": 16},
        {"depth": 10**9},
        {"depth": 40},
        {"width": 4.0},
        {"width": True},
        {"in_channels": 2**40},
        {"norm": ["batch"]},
    ],
)
@pytest.mark.parametrize("load", [load_encoder, load_unet])
def test_a_small_file_that_claims_a_large_network_costs_nothing(load, model, tmp_path):
    import resource

    path = tmp_path / "w.safetensors"
    entry = {"format": 1, "kind": "unet", "model": model, "classes": 4, "about": {}}
    text = json.dumps({"__metadata__": {"salkernels": json.dumps(entry)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load(path)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kB


@pytest.mark.parametrize("given", ["file", "folder", "text", "text of the folder"])
def test_weights_are_taken_by_file_or_folder_and_come_in_eval_mode(given, tmp_path):
    encoder = Encoder(UNetConfig(width=2, depth=2))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    where = tmp_path if "folder" in given else tmp_path / "encoder.safetensors"
    loaded, _ = load_encoder(str(where) if "text" in given else where)
    assert not any(part.training for part in loaded.modules())
    expected = encoder.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in loaded.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match=r"run of pre-training.*finetune --encoder"):
        load_unet(tmp_path)
    with pytest.raises(ValueError, match="folder of no run"):
        load_unet(tmp_path / "..")


@pytest.fixture
def built(tmp_path):
    data = write_phantom(tmp_path / "data", subjects=2, slices=3, size=32, spacing=(3, 3, 8))
    scans = ACDC.find(data)
    settings = PreprocessConfig(size=32)
    return scans, settings, open_cache(scans, settings, ACDC, tmp_path / "cache")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.json"])
def test_every_flipped_bit_of_a_cache_is_seen_and_mended(name, built, tmp_path, capsys):
    scans, settings, cache = built
    path = cache.folder / name
    expected, images = path.read_bytes(), np.array(cache.images)
    for bit in places(path, 40):
        flip(path, bit)
        if name == "index.json" and json.loads(_text(path, "{}")) == json.loads(expected):
            flip(path, bit)  # white space
            continue
        with pytest.raises(NoCache):
            VolumeCache(cache.folder, ACDC)
        flip(path, bit)
    flip(path, 8 * path.stat().st_size // 2)
    again = open_cache(scans, settings, ACDC, tmp_path / "cache", progress=False)
    assert str(again.folder) in capsys.readouterr().err
    np.testing.assert_array_equal(again.images, images)


def _text(path, default):
    try:
        return json.dumps(json.loads(path.read_bytes()))
    except ValueError:
        return default


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENFILE, errno.EACCES])
@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "index.json"])
def test_a_passing_error_leaves_a_healthy_cache(number, name, built, tmp_path, monkeypatch):
    scans, settings, cache = built
    before = {p.name: p.stat().st_ino for p in cache.folder.iterdir()}
    opened = open
    path = cache.folder / name

    def failing(file, *args, **kwargs):
        if os.fspath(file) == os.fspath(path):
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    monkeypatch.setattr("io.open", failing)
    with pytest.raises(DataError, match="left as it is") as caught:
        open_cache(scans, settings, ACDC, tmp_path / "cache")
    assert not isinstance(caught.value, NoCache)
    monkeypatch.undo()
    monkeypatch.setattr(cache_module, "read_scan", None)  # to build again would fail
    again = open_cache(scans, settings, ACDC, tmp_path / "cache")
    assert again.key == cache.key
    assert {p.name: p.stat().st_ino for p in cache.folder.iterdir()} == before


def test_contents_are_remembered_only_while_nothing_changed(built, tmp_path, monkeypatch):
    scans, _, _ = built
    for scan in scans:
        for path in (scan.image, scan.label):
            os.utime(path, (1, 1))
    monkeypatch.setattr("salkernels.training.data.digests.YOUNG", -(10**12))
    first = scan_digests(scans, tmp_path / "memory")
    read = []
    monkeypatch.setattr(
        "salkernels.training.data.digests.file_digest", lambda p: read.append(p) or "f" * 64
    )
    assert scan_digests(scans, tmp_path / "memory") == first
    assert read == []
    # Same size, same date: the change time tells.
    path = scans[0].image
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert scan_digests(scans, tmp_path / "memory")[0].image == "f" * 64
    assert read == [path]
    (tmp_path / "memory" / MEMORY).write_text("{")  # damaged: read again, no error
    read.clear()
    scan_digests(scans, tmp_path / "memory")
    assert len(read) == 2 * len(scans)


def test_young_files_are_read_again(built, tmp_path):
    """A file may change twice within a tick of the clock."""
    scans, _, _ = built
    scan_digests(scans, tmp_path / "memory")
    assert not (tmp_path / "memory" / MEMORY).exists()


def test_temporaries_of_dead_processes_are_swept(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c",
         "import os, sys; from pathlib import Path; from salkernels._shared.files import *\n"
         "temporary_name(Path(sys.argv[1])).write_text('half'); os.kill(os.getpid(), 9)",
         str(tmp_path / "a.json")],
    )  # fmt: skip
    assert dead.returncode == -9
    alive, foreign = temporary_name(tmp_path / "b.json"), tmp_path / ".c.json.other-1.0a1b2c3d.tmp"
    alive.write_text("being written")
    foreign.write_text("who knows")
    assert len(list(tmp_path.glob(".a.json*"))) == 1
    write_atomically(tmp_path / "new.json", "{}")
    assert {p.name for p in tmp_path.iterdir()} == {alive.name, foreign.name, "new.json"}
    remove_temporaries(tmp_path, all_of_them=True)  # by whoever holds the folder
    assert {p.name for p in tmp_path.iterdir()} == {"new.json"}


def test_odd_names_are_left_alone_and_an_error_says_where(tmp_path, monkeypatch):
    host = temporary_name(tmp_path / "x").name.split(".")[2].rpartition("-")[0]
    odd = tmp_path / f".x.{host}-{10**30}.0a1b2c3d.tmp"  # no such process number
    odd.write_text("")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "a.txt", "x")
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert [*tmp_path.iterdir()] == [odd]


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    path = tmp_path / ("ä" * 120 + ".nii.gz")
    write_atomically(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_says(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_temporaries_are_no_images_and_no_caches(tmp_path):
    name = temporary_name(tmp_path / "scan_pred.nii.gz").name
    assert name.startswith(".")
    assert name.endswith(".tmp")
    assert files._TEMPORARY.fullmatch(name)
    shutil.rmtree(tmp_path)
