"""What a set of scans says as a whole: spacing known or not, labels lost to the canvas."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.cli import main
from salkernels.training.config import OptimConfig
from salkernels.training.data.cache import open_cache
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.manifest import read_manifest
from salkernels.training.data.nifti import DataError, read_image
from salkernels.training.data.preprocess import PreprocessConfig, plan, preprocess
from salkernels.training.data.review import notices, require_scale_of_training, spacing_recorded
from salkernels.training.finetune import finetune
from salkernels.training.inputs import open_dataset
from salkernels.training.models import load_unet

ACDC = DATASETS["acdc"]
KNOWN, UNKNOWN = np.diag([1.5, 1.5, 8.0, 1.0]), np.eye(4)
CONFIG = PreprocessConfig(size=48, spacing=3.0)
CLASSES = ["background", "one"]


def write(root, affines, shape=(60, 40, 4), where=(30, 20)):
    """Subjects p1, p2, ... with a bright block that is labelled."""
    root.mkdir(exist_ok=True)
    rows = []
    for number, affine in enumerate(affines, 1):
        label = np.zeros(shape, np.uint8)
        label[where[0] - 5 : where[0] + 5, where[1] - 5 : where[1] + 5] = 1
        noise = np.random.default_rng(number).integers(0, 99, shape)
        for name, array in (
            ("", (400 * label.astype(int) + noise).astype(np.int16)),
            ("_gt", label),
        ):
            nib.Nifti1Image(array, affine).to_filename(root / f"p{number}{name}.nii")
        rows.append(
            {"subject": f"p{number}", "image": f"p{number}.nii", "label": f"p{number}_gt.nii"}
        )
    (root / "manifest.json").write_text(json.dumps({"classes": CLASSES, "scans": rows}))
    return root


def opened(root, config=CONFIG):
    info = read_manifest(root)
    cache = root.parent / "cache"
    return open_cache(info.find(root), config, info, cache, progress=False)


def test_a_mixture_of_known_and_unknown_spacings_is_refused_by_name(tmp_path):
    root = write(tmp_path / "data", [KNOWN, UNKNOWN, KNOWN])
    with pytest.raises(DataError, match=r"1 of 3 scans record no spacing.*: p2_scan; state it"):
        opened(root)
    mixed = opened(root, replace(CONFIG, mixed_spacing=True))
    assert spacing_recorded(mixed) == "mixed"
    assert "1 of 3 scans record no spacing (p2_scan)" in notices(mixed)[0]


def test_a_spacing_that_is_stated_is_used_as_if_it_were_recorded(tmp_path):
    root = write(tmp_path / "data", [KNOWN, UNKNOWN])
    cache = opened(root, replace(CONFIG, unknown_spacing=1.5))
    assert cache.volumes[0].geometry.plane == cache.volumes[1].geometry.plane == (30, 20)
    assert spacing_recorded(cache) == "recorded"
    assert "pixels of 1.5 mm are taken, as stated" in notices(cache)[0]
    with pytest.raises(ValueError, match="unknown_spacing: expected 0 or"):
        replace(CONFIG, unknown_spacing=-1.0)


@pytest.mark.parametrize("form", [[0.75, 1.5, 8], "0.75 1.5 8", "0.75 x 1.5 x 8.0"])
def test_a_manifest_states_the_spacing_of_all_or_of_one(tmp_path, form):
    root = write(tmp_path / "data", [UNKNOWN, KNOWN])
    content = json.loads((root / "manifest.json").read_text())
    for place in (content, content["scans"][0]):
        place["spacing"] = form
        (root / "manifest.json").write_text(json.dumps(content))
        cache = opened(root)
        del place["spacing"]
        assert cache.volumes[0].spacing == (0.75, 1.5, 8.0)
        assert cache.volumes[0].geometry.plane == (15, 20)
        assert cache.volumes[1].geometry.plane == ((15, 20) if place is content else (30, 20))


@pytest.mark.parametrize("wrong", [[1, 2], "1.5", [0, 1, 1], ["a", 1, 1], {}, 1.5, [1e9, 1, 1]])
def test_a_spacing_that_is_none(tmp_path, wrong):
    root = write(tmp_path / "data", [UNKNOWN])
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**content, "spacing": wrong}))
    with pytest.raises(DataError, match="spacing: expected mm along the three stored axes"):
        read_manifest(root)


def test_a_set_without_any_spacing_says_so(tmp_path):
    cache = opened(write(tmp_path / "data", [UNKNOWN, UNKNOWN]))
    assert spacing_recorded(cache) == "unknown"
    assert notices(cache)[0].startswith("2 of 2 scans record no spacing: they are zoomed by")


def test_labels_lost_to_the_canvas_are_named_worst_first(tmp_path):
    root = write(tmp_path / "data", [KNOWN] * 3)
    write(tmp_path / "other", [KNOWN] * 3, where=(8, 20))
    for number in (1, 3):
        for name in ("", "_gt"):
            source = tmp_path / "other" / f"p{number}{name}.nii"
            (root / source.name).write_bytes(source.read_bytes())
    config = replace(CONFIG, size=16, spacing=2.25)
    cache = opened(root, config)
    (line,) = notices(cache)
    assert line.startswith(
        "labelled voxels outside the canvas, in 2 of 3 scans: p1_scan 400 of 400"
    )
    assert "(100 %)" in line
    assert "preprocess.size" in line
    assert notices(opened(root, replace(CONFIG, size=48))) == []


def test_a_run_says_it_on_the_screen_and_in_its_folder(tmp_path, finetune_config, capsys):
    root = write(tmp_path / "data", [UNKNOWN] * 4)
    config = finetune_config(data=root, dataset="manifest", labelled=1, optim=OptimConfig(steps=1))
    finetune(config)
    assert "note: 4 of 4 scans record no spacing" in capsys.readouterr().err
    assert "4 of 4 scans record no spacing" in (config.out / "data.txt").read_text()
    assert load_unet(config.out / "model.safetensors")[1]["spacing"] == "unknown"


def test_contradictions_of_headers_are_named_once_for_all_their_scans(tmp_path):
    root = write(tmp_path / "data", [KNOWN] * 3)
    for name in ("p1.nii", "p2.nii", "p1_gt.nii", "p2_gt.nii"):
        image = nib.load(root / name)
        changed = nib.Nifti1Image(np.asanyarray(image.dataobj).copy(), None)
        changed.set_qform(KNOWN, 1)
        changed.set_sform(np.diag([1.0, 1, 1, 1]) + 7 * np.eye(4, k=3), 1)
        changed.to_filename(root / name)
    (line,) = notices(opened(root))
    assert line.startswith("p1_scan, p2_scan: the sform says voxels of 1 x 1 x 1")


@pytest.mark.parametrize("trained", ["recorded", "unknown"])
def test_predict_and_evaluate_compare_with_the_training(tmp_path, finetune_config, trained, capsys):
    """A scan at another scale than the model learnt is refused by name, unless that is said."""
    affines = {"recorded": KNOWN, "unknown": UNKNOWN}
    other = affines["unknown" if trained == "recorded" else "recorded"]
    root = write(tmp_path / "data", [affines[trained]] * 4)
    config = finetune_config(data=root, dataset="manifest", labelled=1, optim=OptimConfig(steps=1))
    finetune(config)
    odd = write(tmp_path / "odd", [other] * 4)
    model = [f"--model={config.out}", "--device=cpu"]
    predict = ["predict", *model, f"--input={odd / 'p1.nii'}", f"--out={tmp_path / 'maps'}"]
    evaluate = ["evaluate", *model, f"--data={odd}", f"--out={tmp_path / 'runs' / 'e'}"]
    for command, name in ((predict, "p1.nii"), (evaluate, "p1_scan")):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert name in said
        assert "that the model learnt from did" in said
        assert main([*command, "--mixed_spacing"]) == 0
    if trained == "recorded":
        assert main([*predict, "--spacing=1.5", "--overwrite"]) == 0
        assert main([*evaluate, "--spacing=1.5", "--overwrite"]) == 0


def test_models_of_earlier_versions_do_not_say(tmp_path):
    require_scale_of_training("unknown", None, ["a"], False)
    require_scale_of_training("unknown", "mixed", ["a"], False)


def test_orientations_recorded_for_some_are_said(tmp_path):
    root = write(tmp_path / "data", [KNOWN, UNKNOWN])
    image = nib.load(root / "p2.nii")
    plain = nib.Nifti1Image(np.asanyarray(image.dataobj).copy(), None)
    plain.header.set_zooms((1.5, 1.5, 8))  # no matrix: a spacing, and no place
    plain.to_filename(root / "p2.nii")
    lines = notices(opened(root))
    assert "1 of 2 scans record no orientation" in lines[0]
    assert lines[0].endswith("p2_scan")


def test_a_window_in_hu_is_the_same_for_all_volumes(tmp_path):
    """The same tissue has the same value, whatever else is in the scan; percentiles move it."""
    config = replace(CONFIG, window=(-200.0, 600.0))
    values = []
    for bone in (1200, 3000):
        array = np.full((40, 40, 4), -1000, np.int16)
        array[10:30, 10:30] = 50
        array[10:14, 10:14] = bone
        nib.Nifti1Image(array, np.diag([3.0, 3, 8, 1])).to_filename(tmp_path / "a.nii")
        done = preprocess(read_image(tmp_path / "a.nii"), None, config, num_classes=2)
        values.append(done.images[2, 24, 24])
    assert values[0] == values[1] == pytest.approx((50 - 200) / (800 / np.sqrt(12)), abs=1e-5)
    assert done.images.min() == pytest.approx(-np.sqrt(3), abs=1e-5)
    assert replace(config, window=[-200, 600]).window == (-200.0, 600.0)  # as YAML gives it
    for wrong in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf")), (1.0,)):
        with pytest.raises(ValueError, match="window: expected two numbers"):
            replace(config, window=wrong)


def test_a_window_from_the_command_line_reaches_model_and_cache(tmp_path, phantom, cache_folder):
    out = tmp_path / "run"
    small = ["--preset=phantom", "--crop=32", "--preprocess.size=32", "--preprocess.spacing=4"]
    more = ["--model.width=4", "--model.depth=4", "--device=cpu", "--optim.steps=1"]
    window = "--preprocess.window=[0, 900]"
    data = [f"--data={phantom}", f"--cache={cache_folder}", f"--out={out}"]
    assert main(["finetune", *small, *more, *data, window]) == 0
    assert load_unet(out / "model.safetensors")[1]["preprocess"]["window"] == [0, 900]
    again = ["evaluate", f"--model={out}", f"--data={phantom}", f"--out={tmp_path / 'again'}"]
    assert main([*again, f"--cache={cache_folder}", "--device=cpu"]) == 0
    table = (out / "dice.csv").read_text()
    assert (tmp_path / "again" / "dice.csv").read_text() == table
    saved = [f"--config={out / 'config.yaml'}", f"--out={tmp_path / 'repeat'}"]
    assert main(["finetune", *saved]) == 0
    assert (tmp_path / "repeat" / "dice.csv").read_text() == table


def test_the_plan_of_an_unknown_spacing_is_that_of_the_statement():
    from salkernels.training.data.nifti import Volume

    image = Volume(np.zeros((100, 80, 3), np.float32), np.eye(4), None, None, nib.Nifti1Header())
    assert plan(image, PreprocessConfig(spacing=2.0)).plane == (50, 40)  # by unknown_zoom
    stated = PreprocessConfig(spacing=2.0, unknown_spacing=0.5)
    assert plan(image, stated).plane == (25, 20)


def test_the_phantom_has_nothing_to_tell(pretrain_config):
    assert notices(open_dataset(pretrain_config())) == []
