"""Dice at native resolution, and label maps on the grid of the image."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch

from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.device import Device
from salkernels.training.evaluate import (
    Scores,
    dice_per_class,
    evaluate,
    predict_file,
    write_scores,
)
from salkernels.training.figures import summary
from salkernels.training.inputs import open_dataset

ACDC = DATASETS["acdc"]
CPU = Device(torch.device("cpu"), torch.float32)


class Oracle(torch.nn.Module):
    """Answers with the labels that belong to the slices it is shown."""

    def __init__(self, cache):
        super().__init__()
        self.known = {cache.images[i].tobytes(): cache.labels[i] for i in range(len(cache.images))}

    def forward(self, x):
        labels = np.stack([self.known[image.tobytes()] for image in x[:, 0].numpy()])
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 4)
        return 20 * one_hot.permute(0, 3, 1, 2).float()


def test_dice_of_known_overlap():
    truth, guess = np.zeros((2, 4, 4, 2), np.uint8)
    truth[:2], guess[1:3] = 1, 1  # 16 voxels each, 8 shared
    truth[3, 0] = 2
    dice = dice_per_class(guess, truth, ACDC)
    assert dice[0] == pytest.approx(0.5)
    assert dice[1] == 0  # missed altogether
    assert math.isnan(dice[2])  # in neither
    guess[0, 0] = 3
    assert dice_per_class(guess, truth, ACDC)[2] == 0  # invented


def test_dice_against_counting():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    for k, value in enumerate(dice_per_class(guess, truth, ACDC), start=1):
        both = sum(a == b == k for a, b in zip(truth.flat, guess.flat, strict=True))
        either = sum(v == k for volume in (truth, guess) for v in volume.flat)
        assert value == pytest.approx(2 * both / either)


def test_perfect_slices_score_near_one_and_in_native_voxels(pretrain_config):
    cache = open_dataset(pretrain_config())
    scores = evaluate(Oracle(cache), cache, cache.subjects[:2], CPU, progress=False)
    assert len(scores.rows) == 4
    assert scores.class_names == ("RV", "myocardium", "LV")
    # Not exactly 1: a 4 mm grid cannot hold every 1.5 mm voxel of the stored labels.
    assert 0.75 < scores.per_class()["myocardium"] < scores.per_class()["LV"] < 1
    assert {row["role"] for row in scores.rows} == {"ED", "ES"}


def test_means_skip_absent_classes_and_files_say_all(tmp_path):
    rows = [
        {"subject": "a", "frame": "f", "role": "ED", "RV": 0.5, "LV": 1.0},
        {"subject": "b", "frame": "f", "role": "ES", "RV": math.nan, "LV": 0.5},
    ]
    scores = Scores(("RV", "LV"), rows)
    assert scores.per_class() == {"RV": 0.5, "LV": 0.75}
    assert scores.mean == pytest.approx(0.625)
    write_scores(tmp_path, scores, {"fold": 3})
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["fold"] == 3
    assert (result["mean_dice"], result["dice"]) == (0.625, {"RV": 0.5, "LV": 0.75})
    with (tmp_path / "dice.csv").open() as file:
        assert [row["LV"] for row in csv.DictReader(file)] == ["1.0", "0.5"]


def test_a_class_that_no_scan_holds_is_null_and_counts_nowhere(tmp_path, recwarn):
    rows = [{"subject": "a", "frame": "f", "role": "ED", "RV": math.nan, "LV": 0.5}]
    scores = Scores(("RV", "LV"), rows)
    assert scores.mean == 0.5
    write_scores(tmp_path, scores, {})
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["mean_dice"], result["dice"]) == (0.5, {"RV": None, "LV": 0.5})
    assert result["dice_pooled"] == {"RV": None, "LV": None}
    assert "RV -, LV 0.500" in summary(tmp_path)
    assert not recwarn.list


def test_prediction_has_the_grid_and_header_of_the_image(pretrain_config, tmp_path):
    config = pretrain_config()
    cache = open_dataset(config)
    entry = cache.volumes[0]
    about = {"class_names": ACDC.class_names, "preprocess": vars(config.preprocess)}
    target = tmp_path / "pred.nii.gz"
    predict_file(Oracle(cache), about, entry.image, target, CPU)
    image, predicted = nib.load(entry.image), nib.load(target)
    assert predicted.shape == image.shape
    assert predicted.get_data_dtype() == np.uint8
    np.testing.assert_allclose(predicted.affine, image.affine)
    assert predicted.header["sform_code"] == image.header["sform_code"]
    assert predicted.header.get_zooms() == image.header.get_zooms()
    truth = np.asarray(nib.load(entry.label).dataobj).astype(np.uint8)
    assert np.mean(dice_per_class(np.asarray(predicted.dataobj), truth, ACDC)) > 0.75


class Bright(torch.nn.Module):
    """Class 1 where the slice is brighter than its volume's mean."""

    def forward(self, x):
        return torch.cat((torch.zeros_like(x), 9 * x), dim=1)


@pytest.mark.parametrize("orientation", ["native", "RAS"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASR", "PIL"])
def test_prediction_lies_on_the_structure_whatever_the_axes(codes, orientation, tmp_path):
    """An off-centre ball in a volume of three different sides, stored along any axes."""
    shape = (40, 32, 24)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    ball = np.linalg.norm(grid - (10, 20, 9), axis=-1) < 7
    ornt = nib.orientations.axcodes2ornt(codes)
    affine = nib.orientations.inv_ornt_aff(ornt, shape) @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] += (-31, 17, 5)
    image = nib.Nifti1Image((500 * ball + 100).astype(np.int16), affine)
    image.header.set_slope_inter(0.5, -20)
    source, target = tmp_path / "scan.nii.gz", tmp_path / "out" / "scan_pred.nii.gz"
    image.to_filename(source)
    settings = PreprocessConfig(spacing=2.0, size=48, orientation=orientation)
    about = {"class_names": ["background", "ball"], "preprocess": asdict(settings)}
    predict_file(Bright(), about, source, target, CPU)
    predicted = nib.load(target)
    assert nib.aff2axcodes(predicted.affine) == nib.aff2axcodes(nib.load(source).affine)
    np.testing.assert_array_equal(predicted.affine, nib.load(source).affine)
    np.testing.assert_array_equal(np.asarray(predicted.dataobj), ball.astype(np.uint8))
