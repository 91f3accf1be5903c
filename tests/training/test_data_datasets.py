"""Finding scans in the ACDC and CHD layouts."""

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.datasets import DATASETS, read_info, read_scan
from salkernels.training.data.nifti import DataError, read_image

ACDC, CHD = DATASETS["acdc"], DATASETS["chd"]
AFFINE = np.diag([1.5, 1.5, 10.0, 1.0])


def save(path, shape=(6, 5, 4), dtype=np.int16, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.arange(np.prod(shape)).reshape(shape) if value is None else np.full(shape, value)
    nib.Nifti1Image(array.astype(dtype), AFFINE).to_filename(path)


def patient(folder, *, es=9, suffix=".nii.gz", labels=True, cine=0, info=None):
    name = folder.name
    for frame in (1, es):
        save(folder / f"{name}_frame{frame:02d}{suffix}")
        if labels:
            save(folder / f"{name}_frame{frame:02d}_gt{suffix}", dtype=np.uint8, value=frame % 4)
    if cine:
        save(folder / f"{name}_4d{suffix}", (6, 5, 4, cine))
    text = f"ED: 1\nES: {es}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
    (folder / "Info.cfg").write_text(text if info is None else info)


@pytest.mark.parametrize("layout", ["", "training", "acdc/training"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_acdc_layouts(tmp_path, layout, suffix):
    for name in ("patient010", "patient002"):
        patient(tmp_path / layout / name, suffix=suffix)
    (tmp_path / layout / "notes").mkdir()
    scans = ACDC.find(tmp_path)
    assert [s.name for s in scans] == [
        "patient002_frame01",
        "patient002_frame09",
        "patient010_frame01",
        "patient010_frame09",
    ]
    assert [s.role for s in scans] == ["ED", "ES"] * 2
    assert {s.group for s in scans} == {"DCM"}
    for scan in scans:
        assert scan.image == tmp_path / layout / scan.subject / f"{scan.name}{suffix}"
        assert scan.label == tmp_path / layout / scan.subject / f"{scan.name}_gt{suffix}"
        assert scan.time_index is None


def test_acdc_official_release_has_two_parts(tmp_path):
    patient(tmp_path / "training" / "patient001")
    patient(tmp_path / "testing" / "patient101")
    assert [s.subject for s in ACDC.find(tmp_path)] == ["patient001"] * 2 + ["patient101"] * 2
    assert len(ACDC.find(tmp_path / "testing")) == 2
    assert len(ACDC.find(tmp_path / "testing" / "patient101")) == 2


def test_acdc_without_ground_truth(tmp_path):
    patient(tmp_path / "patient101", labels=False)
    assert [s.label for s in ACDC.find(tmp_path)] == [None, None]


def test_acdc_cine(tmp_path):
    patient(tmp_path / "patient001", es=3, cine=5)
    patient(tmp_path / "patient002", es=2)  # no 4D file
    assert len(ACDC.find(tmp_path)) == 4
    scans = ACDC.find(tmp_path, cine=True)
    first = [s for s in scans if s.subject == "patient001"]
    assert [s.frame for s in first] == [f"frame{t:02d}" for t in (1, 2, 3, 4, 5)]
    assert [s.role for s in first] == ["ED", "cine", "ES", "cine", "cine"]
    assert [s.time_index for s in first] == [None, 1, None, 3, 4]
    assert all((s.label is None) == (s.role == "cine") for s in first)
    assert len(scans) == 7
    image, label = read_scan(first[3], ACDC)
    np.testing.assert_array_equal(image.array, np.arange(600).reshape(6, 5, 4, 5)[..., 3])
    assert label is None
    held, _ = read_scan(first[3], ACDC, lambda path: read_image(path, ndim=4))
    np.testing.assert_array_equal(held.array, image.array)


def test_acdc_cine_shorter_than_info_says(tmp_path):
    patient(tmp_path / "patient001", es=9, cine=5)
    with pytest.raises(DataError, match=r"patient001_4d.nii.gz: 5 frames"):
        ACDC.find(tmp_path, cine=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ED"),
        ("ED: 1\n", "ES"),
        ("ED: 1\nES: twelve\n", "'twelve'"),
        ("ED: 1\nES: 0\n", "ES"),
        ("ED: 1\nES: 1\n", "same frame"),
        ("ED 1\nES 12\n", "key: value"),
        ("ED: 1\nES: 12\nNbFrame: 8\n", "NbFrame"),
        ("\x00\x01\x02", "key: value"),
    ],
)
def test_garbled_info(tmp_path, text, reason):
    (tmp_path / "Info.cfg").write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        read_info(tmp_path / "Info.cfg")
    assert str(caught.value).startswith(str(tmp_path / "Info.cfg"))


def test_info_as_released(tmp_path):
    path = tmp_path / "Info.cfg"
    path.write_bytes(b"\xef\xbb\xbfED: 1\r\nES: 12\r\nGroup: RV\r\nHeight: 184.0\r\n\r\n")
    info = read_info(path)
    assert (info.ed, info.es, info.group) == (1, 12, "RV")


def test_all_acdc_problems_in_one_error(tmp_path):
    patient(tmp_path / "patient001")
    patient(tmp_path / "patient002", info="nothing")
    patient(tmp_path / "patient003")
    (tmp_path / "patient003" / "Info.cfg").unlink()
    patient(tmp_path / "patient004")
    (tmp_path / "patient004" / "patient004_frame09.nii.gz").unlink()
    patient(tmp_path / "copy" / "patient001")
    with pytest.raises(DataError) as caught:
        ACDC.find(tmp_path)
    message = str(caught.value)
    assert message.count("\n") == 4
    for part in ("patient002/Info.cfg", "patient003/Info.cfg", "patient004_frame09", "already in"):
        assert part in message


@pytest.mark.parametrize("info", [ACDC, CHD])
def test_empty_or_wrong_roots(tmp_path, info):
    with pytest.raises(DataError, match="an empty folder"):
        info.find(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"expected .*found readme\.txt"):
        info.find(tmp_path)
    for path in (tmp_path / "nowhere", tmp_path / "readme.txt"):
        with pytest.raises(DataError, match=r"no folder there|got a file"):
            info.find(path)


def test_chd(tmp_path):
    save(tmp_path / "b" / "ct_1002_image.nii.gz")
    save(tmp_path / "ct_1001_image.nii.gz")
    save(tmp_path / "labels" / "ct_1001_label.nii.gz", dtype=np.uint8, value=9)
    save(tmp_path / "mr_1.nii.gz")
    first, second = CHD.find(tmp_path)
    assert (first.subject, first.frame, first.name) == ("ct_1001", "ct", "ct_1001_ct")
    assert first.label == tmp_path / "labels" / "ct_1001_label.nii.gz"
    assert (second.subject, second.label) == ("ct_1002", None)
    assert read_scan(first, CHD)[1].max() == 0  # above 7 is background


def test_chd_duplicates_and_lone_labels(tmp_path):
    for folder in ("a", "b"):
        save(tmp_path / folder / "ct_1001_image.nii.gz")
    save(tmp_path / "ct_1003_label.nii.gz")
    with pytest.raises(DataError) as caught:
        CHD.find(tmp_path)
    assert "b/ct_1001_image.nii.gz" in str(caught.value)
    assert "without ct_1003_image" in str(caught.value)


def test_read_scan_reports_image_and_label(tmp_path):
    patient(tmp_path / "patient001")
    scan = ACDC.find(tmp_path)[0]
    scan.image.write_bytes(b"")
    save(scan.label, dtype=np.uint8, value=9)
    with pytest.raises(DataError) as caught:
        read_scan(scan, ACDC)
    first, second = str(caught.value).splitlines()
    assert first.startswith(str(scan.image))
    assert "empty" in first
    assert second.startswith(str(scan.label))
    assert "label 9" in second


def test_classes():
    assert ACDC.class_names == ("background", "RV", "myocardium", "LV")
    assert (ACDC.num_classes, ACDC.max_label, ACDC.above_max) == (4, 3, "error")
    assert (CHD.num_classes, CHD.max_label, CHD.above_max) == (8, 7, "background")
