"""Data sets described by a manifest: what is read, what is refused, and training on one."""

import json
import shutil

import pytest

from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data.manifest import dataset_info, read_manifest, write_manifest
from salkernels.training.data.manifest import main as manifest
from salkernels.training.data.nifti import DataError
from salkernels.training.finetune import finetune
from salkernels.training.inputs import open_dataset

CLASSES = ["background", "RV", "myocardium", "LV"]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"not read before the cache is built")


def describe(folder, scans, **more):
    (folder / "manifest.json").write_text(json.dumps({"scans": scans, **more}))
    return folder


def row(subject="s1", image="s1.nii.gz", **more):
    return {"subject": subject, "image": image, **more}


def test_scans_are_sorted_and_carry_all_that_is_said_of_them(tmp_path):
    touch(tmp_path, "b/t2.nii.gz", "b/seg.nii.gz", "a.nii.gz", "cine.nii")
    rows = [
        row("b", "b/t2.nii.gz", label="b/seg.nii.gz", group="DCM"),
        row("a", "a.nii.gz", scan="visit2"),
        row("a", "cine.nii", scan="cine03", time_index=2),
    ]
    info = read_manifest(describe(tmp_path, rows, classes=CLASSES, name="mine"))
    scans = info.find(tmp_path)
    assert [scan.name for scan in scans] == ["a_cine03", "a_visit2", "b_scan"]
    assert [scan.label for scan in scans] == [None, None, tmp_path / "b/seg.nii.gz"]
    assert [scan.time_index for scan in scans] == [2, None, None]
    assert (scans[2].image, scans[2].group) == (tmp_path / "b/t2.nii.gz", "DCM")
    assert (info.name, info.class_names, info.above_max) == ("mine", tuple(CLASSES), "error")
    assert info.find(tmp_path, cine=True) == scans


def test_a_table_of_scans_and_a_root_elsewhere(tmp_path):
    touch(tmp_path / "share", "1.nii.gz", "1_seg.nii.gz", "2.nii.gz")
    lines = "subject, image, label\ns1,1.nii.gz,1_seg.nii.gz\ns2,2.nii.gz,\n"
    (tmp_path / "scans.csv").write_text(lines, encoding="utf-8-sig")  # as spreadsheets write it
    content = {"scans": "scans.csv", "root": "share", "classes": CLASSES, "above_max": "background"}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    info = dataset_info("manifest", path)
    first, second = info.find(path)
    assert (first.image, first.label) == (
        tmp_path / "share/1.nii.gz",
        tmp_path / "share/1_seg.nii.gz",
    )
    assert (second.subject, second.label) == ("s2", None)
    assert info.above_max == "background"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.nii.gz",
        "inside/../../secret.nii.gz",
        "{outside}/secret.nii.gz",
        "{data}/s1.nii.gz",  # in it, but only on this machine
        "link/../../secret.nii.gz",
        "C:/secret.nii.gz",
        "..\\secret.nii.gz",
    ],
)
@pytest.mark.parametrize("key", ["image", "label"])
def test_paths_do_not_leave_the_data_folder(tmp_path, path, key):
    data, outside = tmp_path / "data", tmp_path / "outside"
    touch(data, "inside/s1.nii.gz", "s1.nii.gz")
    touch(outside, "secret.nii.gz")
    touch(tmp_path, "secret.nii.gz")
    (data / "link").symlink_to(outside)
    scan = {**row(), key: path.format(data=data, outside=outside)}
    with pytest.raises(DataError, match=rf"scans\[0\]: {key}: .*(leaves|relative to)") as caught:
        read_manifest(describe(data, [scan], classes=CLASSES))
    assert str(data) in str(caught.value)


def test_the_table_of_scans_and_patterns_stay_inside_too(tmp_path):
    touch(tmp_path, "data/s1.nii.gz", "scans.csv")
    with pytest.raises(DataError, match=r"'\.\./scans\.csv' leaves"):
        read_manifest(describe(tmp_path / "data", "../scans.csv"))
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(DataError, match="leaves"):
        write_manifest(tmp_path / "data", "../{subject}.nii.gz")


def test_links_are_followed_as_in_the_other_layouts(tmp_path):
    """Into the folder, or to a store elsewhere; ".." stays what it is in the text."""
    data = tmp_path / "data"
    touch(data, "store/abc.nii.gz", "s2.nii.gz")
    touch(tmp_path, "elsewhere/annex/xyz.nii.gz", "elsewhere/s2.nii.gz")
    (data / "s1.nii.gz").symlink_to("store/abc.nii.gz")
    (data / "s3.nii.gz").symlink_to(tmp_path / "elsewhere/annex/xyz.nii.gz")
    (data / "link").symlink_to(tmp_path / "elsewhere/annex")
    rows = [row(), row("s3", "s3.nii.gz"), row("s4", "link/xyz.nii.gz", scan="b")]
    with pytest.raises(DataError, match="belongs to s3 and to s4"):
        read_manifest(describe(data, rows)).find(data)
    scans = read_manifest(describe(data, [row(), row("s2", "link/../s2.nii.gz")])).find(data)
    assert [scan.image for scan in scans] == [data / "s1.nii.gz", data / "s2.nii.gz"]


@pytest.mark.parametrize(
    ("scans", "more", "reason"),
    [
        ([], {}, "at least one"),
        ({"a": 1}, {}, "a list, or the name of a CSV file"),
        ([row()], {"clases": CLASSES}, "unknown clases"),
        ([row(imge="s1.nii.gz")], {}, r"scans\[0\]: unknown imge"),
        ([row(7)], {}, r"subject: expected text, got 7"),
        ([row("a/b")], {}, "subject: expected no slash, got 'a/b'"),
        ([row(scan="../x")], {}, "scan: expected no slash"),
        ([{"subject": "s1"}], {}, "image: expected text"),
        ([row(image="gone.nii.gz")], {}, "no such file: .*gone.nii.gz"),
        ([row(label="s1.nii.gz")], {"classes": CLASSES}, "image and label are one file"),
        ([row(), row()], {}, r"scans\[1\]: s1_scan is there twice"),
        ([row(time_index=-1)], {}, "frame number from 0, got -1"),
        ([row(time_index=True)], {}, "frame number from 0, got True"),
        (["s1.nii.gz"], {}, "expected an object"),
        ([row(label="seg.nii.gz")], {}, "classes: expected 2 to 254 different names"),
        ([row()], {"classes": ["background", "a", "a"]}, "different names"),
        ([row()], {"classes": "LV"}, "different names"),
        ([row()], {"above_max": "ignore"}, "above_max: expected 'error' or 'background'"),
        ([row()], {"root": "nowhere"}, "no such folder"),
        ("scans.csv", {}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, scans, more, reason):
    touch(tmp_path, "s1.nii.gz", "seg.nii.gz")
    with pytest.raises(DataError, match=reason):
        read_manifest(describe(tmp_path, scans, **more))


def test_all_problems_in_one_message_with_their_lines(tmp_path):
    (tmp_path / "scans.csv").write_text("subject,image\ns1,a.nii\ns2,b.nii,more\n")
    with pytest.raises(DataError) as caught:
        read_manifest(describe(tmp_path, "scans.csv"))
    assert "scans.csv line 2: image: no such file" in str(caught.value)
    assert "scans.csv line 3: unknown cells beyond the header" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "\x00"])
def test_a_file_that_is_no_manifest(tmp_path, text):
    with pytest.raises(DataError, match=r"manifest\.json: no such file; write it"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: (not readable|expected an object)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "files"),
    [
        ("imagesTr/{subject}_0000.nii.gz", "labelsTr/{subject}.nii.gz",
         ["imagesTr/p1_0000.nii.gz", "imagesTr/p2_0000.nii.gz", "imagesTr/p2_0001.nii.gz",
          "labelsTr/p1.nii.gz"]),
        ("{subject}/anat/{subject}_T2.nii", "masks/{subject}_*.nii",
         ["p1/anat/p1_T2.nii", "p2/anat/p2_T2.nii", "p2/anat/p1_T2.nii", "masks/p1_prostate.nii"]),
        ("{subject}.nii.gz", "{subject}_gt.nii.gz", ["p1.nii.gz", "p1_gt.nii.gz", "p2.nii.gz"]),
    ],
)  # fmt: skip
def test_patterns_find_pairs(tmp_path, images, labels, files):
    touch(tmp_path, *files)
    written = write_manifest(tmp_path, images, labels, CLASSES)
    assert [(scan.subject, scan.label is not None) for scan in written] == [
        ("p1", True),
        ("p2", False),
    ]
    assert read_manifest(tmp_path).find(tmp_path) == written


def test_several_scans_of_a_subject_and_the_command(tmp_path, capsys):
    touch(tmp_path, "p1/v1.nii.gz", "p1/v2.nii.gz", "p2/v1.nii.gz")
    assert manifest([str(tmp_path), "--images", "{subject}/{scan}.nii.gz"]) == 0
    assert "3 scans of 2 subjects, 0 with a label map" in capsys.readouterr().out
    names = [scan.name for scan in read_manifest(tmp_path).find(tmp_path)]
    assert names == ["p1_v1", "p1_v2", "p2_v1"]
    assert manifest([str(tmp_path), "--images", "{subject}/{scan}.nii.gz"]) == 2
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        ("{patient}.nii.gz", None, "expected fields"),
        ("*.nii.gz", None, "expected fields"),
        ("x{subject}.nii.gz", None, "no image matches"),
        ("{subject}*.nii.gz", None, "are one scan"),
        ("{subject}_t2.nii.gz", "{subject}_seg.nii.gz", "p2_seg.nii.gz: label without an image"),
    ],
)
def test_patterns_that_do_not_fit(tmp_path, images, labels, reason):
    touch(tmp_path, "p1_t2.nii.gz", "p11.nii.gz", "p2_seg.nii.gz", "p1.nii.gz")
    with pytest.raises(DataError, match=reason):
        write_manifest(tmp_path, images, labels, CLASSES)
    assert not (tmp_path / "manifest.json").exists()


def test_scans_without_any_label_serve_pretraining(phantom, pretrain_config, tmp_path):
    names = sorted(p.relative_to(phantom).as_posix() for p in phantom.glob("*/*_frame01.nii.gz"))
    rows = [row(f"s{number}", name) for number, name in enumerate(names[:2])]
    info = {"scans": rows, "root": str(phantom)}
    (tmp_path / "mine.json").write_text(json.dumps(info))
    cache = open_dataset(pretrain_config(dataset="manifest", data=tmp_path / "mine.json"))
    assert cache.subjects == ["s0", "s1"]
    assert cache.info.class_names == ("background",)
    assert (cache.label(0) == 255).all()


def test_finetune_and_evaluate_on_a_manifest(phantom, finetune_config, tmp_path, capsys):
    data = tmp_path / "data"
    for number in (1, 2, 3):
        shutil.copytree(phantom / f"patient00{number}", data / f"patient00{number}")
    images, labels = "{subject}/{subject}_{scan}.nii.gz", "{subject}/{subject}_{scan}_gt.nii.gz"
    assert manifest([str(data), "--images", images, "--labels", labels, "--classes", *CLASSES]) == 0
    config = finetune_config(dataset="manifest", data=data, optim=OptimConfig(steps=1))
    finetune(config)
    assert set(json.loads((config.out / "results.json").read_text())["dice"]) == set(CLASSES[1:])
    again = ["evaluate", f"--model={config.out}", f"--data={data}", "--device=cpu"]
    assert main([*again, f"--out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "dice.csv").read_text() == (config.out / "dice.csv").read_text()
    text = (data / "manifest.json").read_text()
    (data / "manifest.json").write_text(text.replace("myocardium", "muscle"))
    assert main([*again, f"--out={tmp_path / 'other'}"]) == 2
    assert "the model knows the classes background, RV, myocardium" in capsys.readouterr().err
