"""The training layer from Python: the settings of the command line, scans and labels as arrays."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import salkernels.training as training
from salkernels.training.cli import _build, make_parser
from salkernels.training.cli import main as command_line
from salkernels.training.config import (
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    pretrain_config,
)
from salkernels.training.data.errors import DataError
from salkernels.training.data.nifti import read_image
from salkernels.training.data.preprocess import PreprocessConfig, preprocess
from salkernels.training.models import Encoder, UNet, UNetConfig, save_encoder, save_unet
from salkernels.training.presets import PRETRAIN

MODEL = UNetConfig(width=4, depth=3)
SETTINGS = PreprocessConfig(spacing=3.0, size=48)
ABOUT = {
    "preprocess": asdict(SETTINGS),
    "spacing": "recorded",
    "class_names": ["background", "a", "b"],
}


@pytest.fixture(scope="module")
def scan(phantom) -> Path:
    return sorted(phantom.rglob("*_frame01.nii.gz"))[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Folders of runs, as they are left behind, with weights that were not trained."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name in ("sal", "m2"):
        (root / name).mkdir()
    save_encoder(root / "sal" / "encoder.safetensors", Encoder(MODEL), ABOUT)
    save_unet(root / "m2" / "model.safetensors", UNet(MODEL, 3), ABOUT)
    return root


@pytest.mark.parametrize("preset", list(PRETRAIN))
@pytest.mark.parametrize(
    ("command", "kind"),
    [("pretrain", PretrainConfig), ("finetune", FinetuneConfig), ("probe", ProbeConfig)],
)
def test_presets_are_those_of_the_command_line(command, kind, preset):
    arguments = [command, f"--preset={preset}", "--data=acdc", "--optim.steps=7", "--seed=3"]
    whole = pretrain_config() if kind is PretrainConfig else kind  # with plug-ins, if there are any
    expected = _build(whole, make_parser(arguments).parse_args(arguments)[command])
    assert kind.preset(preset, data="acdc", optim__steps=7, seed=3) == expected


def test_paths_may_be_text_and_changes_reach_the_parts():
    config = PretrainConfig.preset("desk", data="x", out="y/z", cache=Path("c"), sal__t=0.2)
    assert (config.data, config.out, config.cache) == (Path("x"), Path("y/z"), Path("c"))
    assert config.sal.t == 0.2
    assert config.sal.embedding == "none"  # of the preset
    assert PretrainConfig.preset("desk").sal.t == 0.35
    assert FinetuneConfig(encoder="runs/sal").encoder == Path("runs/sal")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PretrainConfig.preset("dask"), ValueError, "unknown preset 'dask'; expected one"),
        (
            lambda: PretrainConfig.preset("desk", slicez=1),
            TypeError,
            "slicez; did you mean slices?",
        ),
        (lambda: PretrainConfig.preset("desk", optim__step=1), TypeError, "mean optim.steps?"),
        (lambda: PretrainConfig.preset("desk", zzz__step=1), TypeError, "no setting zzz"),
        (lambda: PretrainConfig.preset("desk", optim__steps=0), ValueError, "at least 1, got 0"),
    ],
)
def test_wrong_settings(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_pretraining_and_fine_tuning_from_python(request, finetune_config, scan):
    pretraining = request.getfixturevalue("pretrain_config")()
    path = training.pretrain(pretraining)
    encoder, about = training.load_encoder(str(path.parent))
    assert not encoder.training
    assert PreprocessConfig(**about["preprocess"]) == pretraining.preprocess
    ready = training.prepare(scan, path)
    assert [len(m) for m in encoder(ready.slices)] == [6] * 4
    config = finetune_config(encoder=str(path.parent))
    scores = training.finetune(config)
    assert len(scores.rows) > 0
    assert training.predict(config.out, scan).shape == nib.load(scan).shape


def test_the_names_are_modules_and_functions():
    """Whatever was imported before, and in whichever way."""
    from salkernels.training import finetune, predict, pretrain
    from salkernels.training.predict import predict as function

    assert inspect.ismodule(pretrain)
    assert pretrain.pretrain is training.pretrain.pretrain
    assert finetune.Finetuning
    with pytest.raises(TypeError, match="missing 2 required positional"):
        predict()
    assert predict.predict is function
    for name in training.__all__:
        assert callable(getattr(training, name)), name
        assert getattr(training, name).__doc__ or inspect.ismodule(getattr(training, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        training.nothing  # noqa: B018


def test_a_scan_is_prepared_from_the_weights_alone(weights, scan):
    volume = read_image(scan)
    expected = preprocess(volume, None, SETTINGS, num_classes=2)
    folder, file = weights / "sal", weights / "m2" / "model.safetensors"
    for given in (folder, str(folder), file, ABOUT):
        ready = training.prepare(scan, given)
        assert torch.equal(ready.slices[:, 0], torch.from_numpy(expected.images))
        assert ready.geometry == expected.geometry
    as_stored = torch.from_numpy(expected.images)
    if expected.geometry.flips[0]:  # what an array alone cannot tell
        as_stored = as_stored.flip(0)
    for spacing in (volume.spacing, volume.spacing[:2], volume.spacing[0]):
        ready = training.prepare(volume.array, folder, spacing=spacing)
        assert torch.equal(ready.slices[:, 0], as_stored)
    turned = training.prepare(torch.from_numpy(volume.array), folder, affine=volume.affine)
    assert torch.equal(turned.slices[:, 0], torch.from_numpy(expected.images))
    other = training.prepare(scan, folder, spacing=2 * volume.spacing[0])
    assert other.geometry.plane == tuple(2 * n for n in expected.geometry.plane)


def test_an_affine_turns_the_scan_where_the_weights_want_that(scan):
    ras = {**ABOUT, "preprocess": asdict(PreprocessConfig(spacing=3.0, orientation="RAS"))}
    volume = read_image(scan)
    straight, turned = np.diag([1.5, 1.5, 8, 1]), np.diag([-1.5, -1.5, 8, 1])
    expected = training.prepare(volume.array, ras, affine=straight).slices
    assert not torch.equal(expected, expected.flip(2, 3))
    found = training.prepare(volume.array, ras, affine=turned).slices
    torch.testing.assert_close(found, expected.flip(2, 3), atol=1e-5, rtol=0)


def test_labels_of_an_array_are_those_of_the_command(weights, scan, tmp_path):
    volume = read_image(scan)
    arguments = [f"--model={weights / 'm2'}", f"--input={scan}", f"--out={tmp_path}"]
    assert command_line(["predict", *arguments, "--device=cpu"]) == 0
    (written,) = tmp_path.rglob("*_pred.nii.gz")
    expected = np.asarray(nib.load(written).dataobj)
    assert len(np.unique(expected)) > 1
    loaded = training.load_unet(weights / "m2")
    for model in (weights / "m2", str(weights / "m2" / "model.safetensors"), loaded):
        found = training.predict(model, volume.array, spacing=volume.spacing, device="cpu")
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
    assert np.array_equal(training.predict(loaded, scan, device="cpu"), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scan": np.ones((4, 4))}, ValueError, "(X, Y, Z), slices last, got shape (4, 4)"),
        ({"scan": np.full((9, 9, 2), np.nan)}, ValueError, "finite numbers"),
        ({"scan": np.ones((9, 9, 2))}, DataError, "constant intensities"),
        ({"spacing": None}, ValueError, "has no spacing, but the scans of the training had"),
        ({"spacing": (1.0, -1.0)}, ValueError, "1 to 3 numbers in mm, each > 0"),
        ({"spacing": (1.0,) * 4}, ValueError, "1 to 3 numbers"),
        ({"affine": np.eye(3)}, ValueError, "affine must be (4, 4), got shape (3, 3)"),
        ({"affine": np.diag([1.5, 1.5, 0, 1])}, ValueError, "must be finite and invertible"),
        ({"affine": np.full((4, 4), np.nan)}, ValueError, "must be finite and invertible"),
        ({"scan": np.ones((9, 9, 2), complex)}, TypeError, "real numbers (X, Y, Z)"),
        ({"spacing": ["a", "b"]}, ValueError, "1 to 3 numbers in mm"),
        ({"scan": "nowhere.nii"}, DataError, "nowhere.nii"),
        ({"weights": {}}, ValueError, "do not say how their scans were prepared"),
        ({"weights": {**ABOUT, "spacing": "unknown"}}, ValueError, "had none"),
        ({"weights": "nowhere"}, ValueError, "nowhere is not a file"),
    ],
)
def test_what_cannot_be_prepared(arguments, error, words):
    noise = np.random.default_rng(0).normal(size=(9, 9, 2))
    given = {"scan": noise, "weights": ABOUT, "spacing": 1.5} | arguments
    with pytest.raises(error) as caught:
        training.prepare(**given)
    assert words in str(caught.value)


@pytest.mark.parametrize("spacing", [np.float32(1.5), np.array(1.5), torch.tensor(1.5), (1.5, 1.5)])
def test_one_spacing_may_be_any_number(spacing):
    noise = np.random.default_rng(0).normal(size=(9, 9, 2))
    expected = training.prepare(noise, ABOUT, spacing=1.5).slices
    assert torch.equal(training.prepare(noise, ABOUT, spacing=spacing).slices, expected)


def test_settings_are_numbers_of_their_kind():
    config = training.PretrainConfig.preset("phantom", optim__steps=np.int64(2), crop=np.int32(32))
    assert [type(config.optim.steps), type(config.crop)] == [int, int]
    with pytest.raises(TypeError, match=r"optim\.steps must be a whole number, got 2\.5"):
        training.PretrainConfig.preset("phantom", optim__steps=2.5)


def test_a_run_refuses_the_configuration_of_another():
    with pytest.raises(TypeError, match="must be a PretrainConfig, got FinetuneConfig"):
        training.pretrain(training.FinetuneConfig.preset("phantom", data="nowhere"))
    with pytest.raises(TypeError, match="must be a FinetuneConfig, got PretrainConfig"):
        training.finetune(training.PretrainConfig.preset("phantom", data="nowhere"))
