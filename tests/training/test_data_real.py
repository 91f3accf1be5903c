"""Real ACDC and CT, where they are at hand."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from salkernels.training.data.cache import open_cache, require_labels
from salkernels.training.data.datasets import DATASETS, read_scan
from salkernels.training.data.nifti import read_image
from salkernels.training.data.preprocess import PreprocessConfig

DATA = Path(os.environ.get("SALKERNELS_TEST_DATA", "does-not-exist"))
WHERE = "set SALKERNELS_TEST_DATA to a folder that has one, see docs/environment.md"
needs_acdc = pytest.mark.skipif(not (DATA / "acdc").is_dir(), reason=f"no acdc/: {WHERE}")
needs_ct = pytest.mark.skipif(not (DATA / "ct").is_dir(), reason=f"no ct/: {WHERE}")
ACDC, CHD = DATASETS["acdc"], DATASETS["chd"]


@needs_acdc
def test_acdc_scans():
    scans = ACDC.find(DATA / "acdc")
    assert scans == ACDC.find(DATA / "acdc" / "training")
    assert len(scans) == 160
    assert len({s.subject for s in scans}) == 80
    groups = [s.group for s in scans if s.role == "ED"]
    assert {g: groups.count(g) for g in groups} == dict.fromkeys(
        ["DCM", "HCM", "MINF", "NOR", "RV"], 16
    )
    volume = read_image(scans[0].image)
    assert (volume.spacing, volume.orientation) == (None, None)  # a placeholder in its header


@needs_acdc
def test_acdc_cache_and_back(tmp_path):
    subjects = {f"patient{i:03d}" for i in (1, 12, 23, 61)}
    scans = [s for s in ACDC.find(DATA / "acdc") if s.subject in subjects]
    cache = open_cache(scans, PreprocessConfig(), ACDC, tmp_path)
    assert len(cache.images) == sum(nib.load(s.image).shape[2] for s in scans)
    require_labels(cache, cache.subjects)
    for index, scan in enumerate(scans):
        entry = cache.volumes[index]
        assert entry.lost_voxels == 0
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(cache.label(index).astype("i8")), 4)
        restored = entry.geometry.restore(one_hot.permute(0, 3, 1, 2))
        labels = read_scan(scan, ACDC)[1]
        for label, bound in ((1, 0.88), (2, 0.83), (3, 0.91)):
            # The lowest of all 160 volumes at half size: 0.895, 0.847, 0.922.
            both = np.sum((restored == label) & (labels == label))
            dice = 2 * both / (np.sum(restored == label) + np.sum(labels == label))
            assert dice > bound, (scan.name, label)


@needs_ct
def test_ct(tmp_path):
    scans = CHD.find(DATA / "ct")
    assert [(s.subject, s.label is None) for s in scans] == [("ct_1001", False), ("ct_1002", True)]
    image, labels = read_scan(scans[0], CHD)
    assert (image.spacing, image.orientation) == ((3.0, 3.0, 3.0), "RAS")
    assert image.array.min() < -900  # Hounsfield units of air
    stored = np.asarray(nib.load(scans[0].label).dataobj)
    assert stored.max() == 117
    np.testing.assert_array_equal(labels, np.where(stored > 7, 0, stored))
    cache = open_cache(scans, PreprocessConfig(**CHD.preprocess_defaults()), CHD, tmp_path)
    assert [cache.num_slices(v) for v in range(2)] == [30, 164]
    assert [v.geometry.plane for v in cache.volumes] == [(131, 108), (64, 68)]
    assert [v.labelled for v in cache.volumes] == [True, False]


@needs_ct
def test_lps():
    volume = read_image(DATA / "ct" / "mr_lps.nii.gz")
    assert volume.orientation == "LPS"
    assert volume.spacing == (3.0, 3.0, 3.0)
