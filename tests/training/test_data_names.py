"""Files and names as they may come: pipes, devices, loops of links, names that cannot be shown."""

import json
import os
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from salkernels._shared.files import write_atomically
from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data.datasets import DATASETS, read_info
from salkernels.training.data.manifest import main as manifest
from salkernels.training.data.manifest import read_manifest, write_manifest
from salkernels.training.data.nifti import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.text import MAX_TEXT, printable, read_text, unmarked
from salkernels.training.finetune import finetune

ACDC, CHD = DATASETS["acdc"], DATASETS["chd"]


def odd(path, kind):
    """A file without an end, one that never begins, a link to itself, one that is far too long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as file:
            file.truncate(2**33)  # sparse
    return path


KINDS = ["fifo", "device", "loop", "large"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_none_are_refused_at_once(tmp_path, kind):
    start = time.monotonic()
    info = odd(tmp_path / "patient001" / "Info.cfg", kind)
    for read, path in (
        (read_info, info),
        (ACDC.find, tmp_path),
        (read_manifest, odd(tmp_path / "manifest.json", kind)),
    ):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(info if read is not read_manifest else path) in str(caught.value)
    (tmp_path / "mine.json").write_text(json.dumps({"scans": "scans.csv"}))
    odd(tmp_path / "scans.csv", kind)
    with pytest.raises(DataError, match=r"scans\.csv"):
        read_manifest(tmp_path / "mine.json")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", KINDS[:3])
def test_images_that_are_no_files_are_not_there(tmp_path, kind):
    odd(tmp_path / "p1.nii.gz", kind)
    odd(tmp_path / "ct_1_image.nii.gz", kind)
    with pytest.raises(DataError, match="no image matches"):
        write_manifest(tmp_path, "{subject}.nii.gz")
    scans = {"scans": [{"subject": "p1", "image": "p1.nii.gz"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(scans))
    with pytest.raises(DataError, match=r"no such file: .*p1\.nii\.gz"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match="expected CHD"):
        CHD.find(tmp_path)


def test_brackets_without_end_in_a_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 10**6)
    with pytest.raises(DataError, match=r"manifest\.json: not readable as JSON"):
        read_manifest(tmp_path)


def test_folders_that_link_back_are_searched_once(tmp_path):
    """12 folders, each with links to all: by depth alone there would be 12^6 ways."""
    data = tmp_path / "data"
    write_phantom(data / "training", subjects=1, slices=3, size=32)
    for number in range(12):
        (data / f"f{number}").mkdir()
        for other in range(12):
            (data / f"f{number}" / f"to{other}").symlink_to(data / f"f{other}")
        (data / f"f{number}" / "up").symlink_to(data)
    start = time.monotonic()
    assert len(ACDC.find(data)) == 2
    with pytest.raises(DataError, match="expected CHD"):
        CHD.find(data)
    assert time.monotonic() - start < 5


def test_what_archives_leave_beside_the_data_is_left_out(tmp_path):
    """`__MACOSX` mirrors the folders with `._NAME` files, which are no images."""
    data = write_phantom(tmp_path / "data", subjects=2, slices=3, size=32)
    for path in list(data.rglob("*.*")):
        for rest in (data / "__MACOSX" / path.relative_to(data), path):
            rest.parent.mkdir(parents=True, exist_ok=True)
            rest.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert len(ACDC.find(data)) == 4
    patterns = "{subject}/{subject}_{scan}.nii.gz", "{subject}/{subject}_{scan}_gt.nii.gz"
    scans = write_manifest(data, *patterns, ["background", "RV", "myocardium", "LV"])
    assert [scan.name for scan in scans] == [scan.name for scan in ACDC.find(data)]
    (data / "manifest.json").unlink()
    images = [p for p in data.rglob("*.nii.gz") if "_gt" not in p.name and p.name[0] != "."]
    assert len(write_manifest(data, "*/{subject}.nii.gz")) == 2 * len(images)


def test_a_pattern_may_name_hidden_files_itself(tmp_path):
    (tmp_path / ".store").mkdir()
    (tmp_path / ".store" / "p1.nii").write_bytes(b"-")
    assert [s.subject for s in write_manifest(tmp_path, ".store/{subject}.nii")] == ["p1"]


def described(tmp_path, **scan):
    (tmp_path / "s1.nii").write_bytes(b"-")
    row = {"subject": "p1", "image": "s1.nii", **scan}
    (tmp_path / "manifest.json").write_text(json.dumps({"scans": [row]}))
    return tmp_path


BAD = ["a\nb", "a\tb", "\x1b[31m", "a\0b", "\ud800", "a\u202eb", "a/b", "a\\b", "n" * 300, "a\x85b"]


@pytest.mark.parametrize("name", BAD, ids=ascii)
@pytest.mark.parametrize("key", ["subject", "scan", "group"])
def test_names_that_cannot_be_shown_are_refused_before_training(tmp_path, key, name):
    with pytest.raises(DataError, match=rf"scans\[0\]: {key}: expected") as caught:
        read_manifest(described(tmp_path, **{key: name}))
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


@pytest.mark.parametrize("name", [*BAD, "subject", "role"], ids=ascii)
def test_classes_that_cannot_be_columns_are_refused(tmp_path, name):
    described(tmp_path)
    content = {"scans": [{"subject": "p", "image": "s1.nii"}], "classes": ["background", name]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="classes: "):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["Patient 01", "Müller", "患者1", "$^$", "a_{1}$", "x" * 100])
def test_names_with_blanks_dollars_and_letters_of_all_languages_are_names(tmp_path, name):
    assert read_manifest(described(tmp_path, subject=name)).find(tmp_path)[0].subject == name


def test_files_whose_names_cannot_be_shown(tmp_path, capsys):
    """As a disk may hold them: bytes that are no UTF-8, control characters."""
    try:
        (tmp_path / os.fsdecode(b"p\xff1.nii")).write_bytes(b"-")
    except OSError:
        pytest.skip("this file system refuses such names")
    (tmp_path / "p\x1b2.nii").write_bytes(b"-")
    assert manifest([str(tmp_path), "--images", "{subject}.nii"]) == 2
    said = capsys.readouterr().err
    assert "expected characters that can be printed" in said
    assert r"p\udcff1" in said
    assert "\x1b" not in said
    assert not (tmp_path / "manifest.json").exists()
    rows = [{"subject": "p1", "image": os.fsdecode(b"p\xff1.nii")}]
    (tmp_path / "manifest.json").write_text(json.dumps({"scans": rows}))
    with pytest.raises(DataError, match="cannot be printed; rename it"):
        read_manifest(tmp_path).find(tmp_path)


def test_messages_escape_what_a_terminal_would_obey(capsys, tmp_path):
    assert printable("a\x1b[0m\nb\ud800é") == "a\\x1b[0m\nb\\ud800é"
    data = tmp_path / "x\x1b[31m"
    assert main(["pretrain", f"--data={data}", f"--out={tmp_path / 'o'}"]) == 2
    assert r"x\x1b[31m" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["n" * 300 + ".nii", "a\0b.nii"])
def test_paths_that_no_system_has(tmp_path, name):
    with pytest.raises(DataError, match="no such file"):
        read_manifest(described(tmp_path, image=name))


def test_dollars_are_no_formula_in_pictures():
    figure = Figure()
    text = figure.text(0, 0, unmarked("$^$ and $x$"))
    figure.canvas.draw()  # the text itself would raise: "^" is no formula
    assert text._preprocess_math(text.get_text()) == ("$^$ and $x$", False)


def test_a_run_on_hostile_names_ends_well(phantom, finetune_config, tmp_path):
    """Dollars that are no formula in subjects and classes, and more classes than colours."""
    rows = []
    for number, folder in enumerate(sorted(phantom.glob("patient*"))[:4]):
        stem = f"{folder.name}/{folder.name}_frame01"
        rows.append(
            {
                "subject": f"p $^$ {number}",
                "image": f"{stem}.nii.gz",
                "label": f"{stem}_gt.nii.gz",
            }
        )
    classes = ["background", "$^$", "_hidden", "a$b", *(f"c{n}" for n in range(9))]
    content = {"root": str(phantom), "classes": classes, "scans": rows}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    data = tmp_path / "mine.json"
    steps = OptimConfig(steps=1)
    config = finetune_config(data=data, dataset="manifest", labelled=1, num_folds=2, optim=steps)
    finetune(config)
    assert (config.out / "figures" / "overlays.png").is_file()
    assert set(json.loads((config.out / "results.json").read_text())["dice"]) == set(classes[1:])


def test_one_file_of_two_subjects_is_refused_however_it_is_reached(tmp_path):
    for name in ("a.nii", "b.nii", "c.nii"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "soft.nii").symlink_to("a.nii")
    os.link(tmp_path / "a.nii", tmp_path / "hard.nii")
    for other in ("a.nii", "./a.nii", "x/../a.nii", "soft.nii", "hard.nii"):
        rows = [{"subject": "p1", "image": "a.nii"}, {"subject": "p2", "image": other}]
        (tmp_path / "manifest.json").write_text(json.dumps({"scans": rows}))
        with pytest.raises(DataError, match="belongs to p1 and to p2"):
            read_manifest(tmp_path).find(tmp_path)
    rows = [
        {"subject": s, "image": i, "label": "c.nii"} for s, i in (("p1", "a.nii"), ("p2", "b.nii"))
    ]
    content = {"scans": rows, "classes": ["background", "x"]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"c\.nii: belongs to p1 and to p2"):
        read_manifest(tmp_path).find(tmp_path)
    rows = [
        {"subject": "p1", "scan": s, "image": "a.nii", "time_index": t} for t, s in enumerate("ab")
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"scans": rows}))
    assert len(read_manifest(tmp_path).find(tmp_path)) == 2  # frames of one file


def test_a_patient_s_folder_under_two_names_is_refused(tmp_path):
    data = write_phantom(tmp_path / "data", subjects=1, slices=3, size=32)
    again = data / "patient002"
    again.mkdir()
    for path in (data / "patient001").iterdir():
        (again / path.name.replace("patient001", "patient002")).symlink_to(path)
    with pytest.raises(DataError, match="belongs to patient001 and to patient002"):
        ACDC.find(data)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["patient001_frame01", "patient001_frame12", "patient002_frame01"], True),
        (["A0S9_ED", "A0S9_ES", "B1_ED", "B1_ES"], True),
        (["la_003", "la_004", "la_007"], False),
        (["prostate_00", "prostate_01"], False),
        (["p1", "p2"], False),
        (["a_1", "b_1"], False),
    ],
)
def test_names_of_nnunet_that_would_split_a_patient_are_pointed_at(tmp_path, names, hint, capsys):
    for name in names:
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        (tmp_path / "imagesTr" / f"{name}_0000.nii.gz").write_bytes(b"-")
    assert manifest([str(tmp_path), "--images", "imagesTr/{subject}_0000.nii.gz"]) == 0
    assert ("count as two subjects" in capsys.readouterr().err) == hint
    (tmp_path / "manifest.json").unlink()
    if hint:
        scans = write_manifest(tmp_path, "imagesTr/{subject}_{scan}_0000.nii.gz")
        assert {scan.subject for scan in scans} == {name.split("_")[0] for name in names}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a" / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path / "a") == ["file"]


def test_text_is_read_to_its_limit_and_no_further(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * MAX_TEXT)
    assert len(read_text(tmp_path / "a")) == MAX_TEXT
    (tmp_path / "a").write_bytes(np.random.default_rng(0).bytes(MAX_TEXT + 1))
    with pytest.raises(DataError, match="at most 1048576 bytes"):
        read_text(tmp_path / "a")


def test_a_file_as_data_is_told_apart_from_nothing(tmp_path, capsys):
    (tmp_path / "scan.nii.gz").write_bytes(b"-")
    (tmp_path / "mine.json").write_text("{}")
    for name, reason in (("scan.nii.gz", "give the folder"), ("mine.json", "--dataset manifest")):
        assert main(["pretrain", f"--data={tmp_path / name}", f"--out={tmp_path / 'o'}"]) == 2
        assert reason in capsys.readouterr().err
