"""Which images `predict` takes, 4D ones, files under another name, and how much memory it needs."""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch

from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data.errors import DataError
from salkernels.training.data.images import find_images
from salkernels.training.data.nifti import image_grid, read_image, read_labels
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.device import Device
from salkernels.training.evaluate import predict_file, subjects_to_score
from salkernels.training.finetune import finetune
from salkernels.training.inputs import open_dataset

CPU = Device(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_phantom(
        tmp_path_factory.mktemp("acdc") / "data", subjects=2, slices=3, size=32, cine_frames=4
    )


@pytest.fixture
def model(finetune_config):
    finetune(finetune_config(optim=OptimConfig(steps=1)))
    return finetune_config().out


def found(*inputs):
    return [f"{image.folder}/{image.path.name}" for image in find_images(inputs)[0]]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"-")
    return root


def test_one_map_for_each_image_of_a_root_and_of_a_patient(data, model, tmp_path, capsys):
    command = ["predict", f"--model={model}", "--device=cpu", "--out"]
    for given, expected in ((data, 6), (data / "patient002", 3)):
        out = tmp_path / given.name
        assert main([*command, str(out), "--input", str(given)]) == 0
        maps = sorted(path.name for path in out.rglob("*.nii.gz"))
        assert len(maps) == expected
        assert not [name for name in maps if "_gt" in name]
        assert "label maps are left out, by their names" in capsys.readouterr().err
    assert (tmp_path / "data" / "patient001" / "patient001_frame01_pred.nii.gz").is_file()
    assert (tmp_path / "patient002" / "patient002_frame01_pred.nii.gz").is_file()


@pytest.mark.parametrize(
    ("files", "images"),
    [
        (["ct_1_image.nii.gz", "ct_1_label.nii.gz", "b/ct_2_image.nii"],
         ["./ct_1_image.nii.gz", "b/ct_2_image.nii"]),
        (["imagesTr/la_3_0000.nii.gz", "labelsTr/la_3.nii.gz", "imagesTs/la_4_0000.nii.gz"],
         ["imagesTr/la_3_0000.nii.gz", "imagesTs/la_4_0000.nii.gz"]),
        (["p1/t2.nii", "p1/t2_seg.nii", "p1/label.nii"], ["p1/t2.nii"]),
        (["sub-1/anat/sub-1_T2w.nii.gz", "derivatives/masks/sub-1_dseg.nii.gz"],
         ["sub-1/anat/sub-1_T2w.nii.gz"]),
        (["a.nii", "a_pred.nii.gz", "._a.nii", ".1f.nii.gz", "__MACOSX/a.nii"], ["./a.nii"]),
    ],
)  # fmt: skip
def test_label_maps_and_remains_are_left_out(tmp_path, files, images):
    assert found(touch(tmp_path, *files)) == images


def test_a_file_that_is_named_itself_is_taken_as_it_is(tmp_path):
    touch(tmp_path, "a_gt.nii", "b.nii")
    assert found(tmp_path / "a_gt.nii", tmp_path / "b.nii") == ["/a_gt.nii", "/b.nii"]
    assert found(tmp_path / "b.nii", tmp_path) == ["/b.nii"]  # once


def test_lists_and_manifests(tmp_path):
    touch(tmp_path, "x/a.nii", "x/b.nii", "x/b_gt.nii")
    (tmp_path / "some.txt").write_text("# of today\nx/b.nii\n\n  x/a.nii\n")
    assert found(tmp_path / "some.txt") == ["/b.nii", "/a.nii"]
    rows = [{"subject": "p1", "image": "x/a.nii", "spacing": [1, 1, 8]}]
    (tmp_path / "manifest.json").write_text(json.dumps({"scans": rows}))
    for given in (tmp_path, tmp_path / "manifest.json"):
        assert found(given) == ["p1/a.nii"]
        assert find_images([given])[0][0].spacing == (1, 1, 8)


@pytest.mark.parametrize("files", [[], ["a_gt.nii"], ["notes.txt"]])
def test_folders_without_an_image(tmp_path, files):
    with pytest.raises(DataError, match="holds no NIfTI file"):
        find_images([touch(tmp_path, *files)])


def test_a_name_that_leaves_no_room_is_refused_before_the_work(data, model, tmp_path, capsys):
    image = next(data.rglob("patient001_frame01.nii.gz"))
    long = tmp_path / ("n" * 245 + ".nii")
    long.write_bytes(gzip.decompress(image.read_bytes()))
    command = ["predict", f"--model={model}", "--device=cpu", f"--out={tmp_path / 'o'}"]
    assert main([*command, f"--input={long}"]) == 2
    assert "its name is too long for one with _pred" in capsys.readouterr().err


class Bright(torch.nn.Module):
    """Class 1 where the slice is brighter than its volume's mean."""

    def forward(self, x):
        return torch.cat((torch.zeros_like(x), 9 * x), dim=1)


ABOUT = {
    "class_names": ["background", "block"],
    "preprocess": asdict(PreprocessConfig(spacing=2.0, size=48)),
}
AFFINE = np.diag([-2.0, 2.0, 8.0, 1.0])
AFFINE[:3, 3] = 9, 8, 7


def test_a_4d_image_gets_a_4d_label_map_of_all_frames(tmp_path):
    blocks = np.zeros((40, 32, 3, 5), np.int16)
    for frame in range(5):
        blocks[5 + 4 * frame : 15 + 4 * frame, 10:20, :, frame] = 500
    image = nib.Nifti1Image(blocks + 100, AFFINE)
    image.header.set_xyzt_units("mm", "msec")
    image.header.set_zooms((2, 2, 8, 33))
    image.to_filename(tmp_path / "cine.nii.gz")
    predict_file(Bright(), ABOUT, tmp_path / "cine.nii.gz", tmp_path / "pred.nii.gz", CPU)
    predicted = nib.load(tmp_path / "pred.nii.gz")
    np.testing.assert_array_equal(np.asarray(predicted.dataobj), blocks // 500)
    np.testing.assert_array_equal(predicted.affine, AFFINE)
    assert predicted.header.get_zooms() == (2, 2, 8, 33)
    assert predicted.get_data_dtype() == np.uint8


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_content_says_whether_it_is_compressed(tmp_path, name, kind):
    """gzip under the name .nii, and the other way round."""
    array = np.random.default_rng(0).integers(0, 4, (6, 5, 4)).astype(np.int16)
    kind(array, AFFINE).to_filename(tmp_path / "b.nii")
    raw = (tmp_path / "b.nii").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name == "a.nii" else raw)
    np.testing.assert_array_equal(read_image(tmp_path / name).array, array)
    np.testing.assert_array_equal(read_labels(tmp_path / name, max_label=3).array, array)
    np.testing.assert_array_equal(image_grid(tmp_path / name).affine, AFFINE)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)


def test_a_run_of_pretraining_is_no_model(pretrain_config, tmp_path, capsys):
    from salkernels.training.pretrain import pretrain

    pretrain(pretrain_config(optim=OptimConfig(steps=1)))
    run = tmp_path / "pretrain"
    for command in (["predict", "--input=x.nii"], ["evaluate", f"--data={tmp_path}"]):
        assert main([*command, f"--model={run}", f"--out={tmp_path / 'o'}"]) == 2
        said = capsys.readouterr().err
        assert f"{run} is a run of pre-training" in said
        assert f"finetune --encoder {run}" in said


def test_another_set_is_scored_without_typing_names(model, phantom, tmp_path, capsys):
    """Data that hold none of the held-out subjects: all of their labelled ones."""
    other = tmp_path / "other"
    for number in (1, 2, 3):
        source = phantom / f"patient00{number}"
        target = other / f"patient10{number}"
        target.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copy(path, target / path.name.replace(source.name, target.name))
    for path in (other / "patient102").glob("*_gt*"):
        path.unlink()
    command = ["evaluate", f"--model={model}", "--device=cpu", f"--data={other}"]
    assert main([*command, f"--out={tmp_path / 'e'}"]) == 0
    result = json.loads((tmp_path / "e" / "results.json").read_text())
    assert result["evaluated"] == ["patient101", "patient103"]
    images, labels = "{subject}/{subject}_frame01.nii.gz", "{subject}/{subject}_frame01_gt.nii.gz"
    from salkernels.training.data.manifest import write_manifest

    write_manifest(other, images, labels, ["background", "RV", "myocardium", "LV"])
    more = ["--dataset=manifest", "--subjects", "all", f"--out={tmp_path / 'm'}"]
    assert main([*command, *more]) == 0
    assert len((tmp_path / "m" / "dice.csv").read_text().splitlines()) == 3


def test_who_is_scored(pretrain_config):
    cache = open_dataset(pretrain_config())
    all_of_them = cache.subjects
    assert subjects_to_score(None, ["patient002"], cache) == ["patient002"]
    assert subjects_to_score(None, ["x"], cache) == all_of_them
    assert subjects_to_score(["all"], ["patient002"], cache) == all_of_them
    assert subjects_to_score(["a", "all"], [], cache) == ["a", "all"]
    with pytest.raises(DataError, match="the data lack x, which were held out"):
        subjects_to_score(None, ["patient002", "x"], cache)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from salkernels.training.device import Device
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.evaluate import predict_file
from salkernels.training.models import UNet, UNetConfig

folder, job = Path(sys.argv[1]), sys.argv[2]
model = UNet(UNetConfig(width=2, depth=2), classes=8)
names = ["background", *"abcdefg"]
settings = PreprocessConfig(spacing=1.0, size=256)
about = {"class_names": names, "preprocess": vars(settings)}
cpu = Device(torch.device("cpu"), torch.float32)
predict_file(model, about, folder / "small.nii", folder / "p.nii", cpu)  # what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if job == "predict":
    predict_file(model, about, folder / "large.nii", folder / "q.nii", cpu)
else:
    from salkernels.training.data.datasets import DATASETS, Scan
    from salkernels.training.data.cache import open_cache
    from salkernels.training.evaluate import evaluate
    info = DATASETS["chd"]
    scans = [Scan("s", "ct", "", folder / "large.nii", folder / "labels.nii")]
    cache = open_cache(scans, settings, info, folder / "cache", progress=False)
    evaluate(model, cache, ["s"], cpu, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts otherwise")
@pytest.mark.parametrize("job", ["predict", "evaluate"])
def test_memory_stays_below_twice_the_scores(tmp_path, job):
    slices = 200
    scores = slices * 8 * 256 * 256 * 4
    rng = np.random.default_rng(0)
    affine = np.diag([1.0, 1, 2, 1])
    affine[0, 3] = 5
    for name, depth in (("small", 8), ("large", slices)):
        voxels = rng.integers(-1000, 1000, (256, 256, depth), dtype=np.int16)
        nib.Nifti1Image(voxels, affine).to_filename(tmp_path / f"{name}.nii")
    labels = (voxels % 8).astype(np.uint8)
    nib.Nifti1Image(labels, affine).to_filename(tmp_path / "labels.nii")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), job], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used = int(done.stdout.split()[-1])
    assert used < scores, f"{used / scores:.2f} of the scores"  # twice is what is promised
