"""Every file of a generated corpus is read, or refused in one line that names it: no crash, no
hang, no other exception, and half a gigabyte at most, though some of them inflate to four."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import nibabel as nib
import nifti_corpus
import numpy as np
import pytest

from salkernels.training.data import nifti
from salkernels.training.data.nifti import DataError, read_image, read_labels

MEGABYTES = 512


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(name, outcome, message, seconds) twice for each file: as an image, as labels."""
    folder = tmp_path_factory.mktemp("corpus")
    count = nifti_corpus.write(folder)
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory limit reads /proc")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", nifti_corpus.__file__, str(folder), str(MEGABYTES)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2 * count > 5000
    return folder, answers


def test_each_file_is_read_or_refused_in_one_line_that_names_it(answers):
    folder, rows = answers
    for name, outcome, message, _ in rows:
        assert outcome in ("read", "DataError"), f"{name}: {outcome}: {message}"
        if outcome == "DataError":
            assert message.startswith(f"{folder / name}: "), message
            assert "\n" not in message
            assert len(message) < len(str(folder / name)) + 400


def test_none_takes_long(answers):
    """The bombs would take a minute to inflate; the limit leaves room for a busy machine."""
    assert max(seconds for *_, seconds in answers[1]) < 20


def test_what_is_right_is_read_and_what_is_cut_or_flipped_in_gzip_is_not(answers):
    rows = answers[1]
    right = {message for name, outcome, message, _ in rows if name == "right.nii"}
    assert len(right) == 2, "the image and the labels"
    assert {m for n, _, m, _ in rows if n == "right.nii.gz"} == right
    for name, outcome, message, _ in rows:
        if name.startswith("cut-"):
            assert outcome == "DataError", name
        if name.startswith("stream-"):  # a flip may fall on a byte without a meaning
            assert outcome == "DataError" or message in right, f"{name} was read as other voxels"


def test_bombs_are_refused_and_what_lies_behind_the_voxels_is_ignored(answers):
    rows = [row for row in answers[1] if row[0].startswith("bomb-")]
    assert {n for n, outcome, *_ in rows if outcome == "read"} == {"bomb-behind.nii.gz"}
    for name, _, message, _ in rows:
        assert "voxels" not in name or "do not fit in memory" in message


@pytest.mark.parametrize("damage", ["le1-magic-3", "le2-dim-1", "be1-srow_x-3", "le1-datatype-6"])
def test_headers_that_nothing_can_be_made_of(answers, damage):
    assert {row[1] for row in answers[1] if row[0].startswith(f"{damage}.")} == {"DataError"}


def test_both_byte_orders_and_versions_are_read(tmp_path):
    expected = np.frombuffer(nifti_corpus.good()[1], "<i2").reshape(nifti_corpus.SHAPE, order="F")
    for endian, version in (("<", 1), (">", 1), ("<", 2), (">", 2)):
        path = tmp_path / "a.nii"
        path.write_bytes(b"".join(nifti_corpus.good(endian, version)))
        assert np.array_equal(read_image(path).array, expected)


def test_an_extension_of_the_usual_kind_is_read(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.int16), np.diag([1.5, 1.5, 3, 1]))
    for code in (6, 40):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, b"a comment" * 50))
    for name in ("a.nii", "a.nii.gz"):
        image.to_filename(tmp_path / name)
        assert len(read_image(tmp_path / name).header.extensions) == 2


def test_files_that_are_no_files(tmp_path):
    folder = tmp_path / "folder.nii.gz"
    folder.mkdir()
    os.mkfifo(tmp_path / "pipe.nii.gz")  # opening it would wait for ever
    (tmp_path / "device.nii").symlink_to("/dev/zero")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere.nii")
    names = ["folder.nii.gz", "pipe.nii.gz", "device.nii", "loop.nii", "dangling.nii"]
    for name in [*names, "n" * 300 + ".nii", "nul\0.nii"]:
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_files_that_may_not_be_read(tmp_path, what):
    """By another user: root may read everything."""
    for parent in [tmp_path, *tmp_path.parents][:4]:
        parent.chmod(parent.stat().st_mode | 0o011)
    folder = tmp_path / "closed"
    folder.mkdir()
    path = folder / "scan.nii.gz"
    path.write_bytes(b"something")
    (path if what == "file" else folder).chmod(0o000)
    report, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            read_image(path)
            answer = "read"
        except DataError as error:
            answer = f"DataError {error}"
        except BaseException as error:
            answer = repr(error)
        os.write(say, answer.encode())
        os._exit(0)
    os.close(say)
    os.waitpid(child, 0)
    with os.fdopen(report) as file:
        answer = file.read()
    folder.chmod(0o700)
    assert answer.startswith(f"DataError {path}: "), answer
    assert "ermission" in answer


def test_the_check_of_the_sum_is_what_finds_flipped_voxels(tmp_path, monkeypatch):
    """nibabel stops at the last voxel and never sees the checksum behind it."""
    header = nifti_corpus.edited("<", 1, nifti_corpus.set_dims((3, 20, 20, 10)))[:352]
    packed = bytearray(gzip.compress(header + bytes(8000), 0))  # stored: a flip changes one voxel
    packed[-60] ^= 0x10
    path = tmp_path / "a.nii.gz"
    path.write_bytes(bytes(packed))
    with pytest.raises(DataError, match="CRC"):
        read_image(path)
    with pytest.raises(DataError, match="CRC"):
        read_labels(path, max_label=3)
    monkeypatch.setattr(nifti, "_check_sum", lambda *_: None)
    assert read_image(path).array.max() > 0
