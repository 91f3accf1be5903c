"""Scans of one slice or few, and what cannot be learnt from them."""

from dataclasses import replace

import nibabel as nib
import pytest

from salkernels.training.config import FinetuneConfig, OptimConfig, PretrainConfig
from salkernels.training.data.errors import DataError
from salkernels.training.data.phantom import write_phantom
from salkernels.training.finetune import finetune
from salkernels.training.methods import METHODS
from salkernels.training.models import UNetConfig
from salkernels.training.pretrain import ENCODER, pretrain


def single(root, subjects):
    """A phantom cut down to the middle slice of each scan."""
    for path in write_phantom(root, subjects=subjects, slices=5, size=32).rglob("*.nii.gz"):
        image = nib.load(path)
        image.slicer[:, :, 2:3].to_filename(path.with_name(f"cut_{path.name}"))
        path.with_name(f"cut_{path.name}").replace(path)
    return root


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    return single(tmp_path_factory.mktemp("thin") / "data", subjects=4)


def deep(root, subjects=2):
    return write_phantom(root, subjects=subjects, slices=5, size=32)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_ends_well_or_says_that_more_slices_are_needed(thin, pretrain_config, method):
    config = pretrain_config(data=thin, method=method, optim=OptimConfig(steps=2))
    if METHODS[method].positional:
        with pytest.raises(DataError, match=rf"one slice, but {method} learns from where"):
            pretrain(config)
        assert not config.out.exists()
    else:
        pretrain(config)
        assert (config.out / ENCODER).is_file()


@pytest.mark.parametrize("method", ["sal", "pcl", "gcl"])
def test_single_slices_beside_deep_scans_are_learnt_from(tmp_path, pretrain_config, method):
    data = deep(tmp_path / "data", subjects=2)
    one = single(tmp_path / "one", subjects=3)
    (one / "patient003").rename(data / "patient003")
    config = pretrain_config(data=data, method=method, optim=OptimConfig(steps=2))
    pretrain(config)
    assert (config.out / ENCODER).is_file()


def test_finetuning_and_scores_on_single_slices(thin, finetune_config):
    scores = finetune(finetune_config(data=thin, num_folds=2, optim=OptimConfig(steps=1)))
    assert len(scores.rows) == 4


@pytest.mark.parametrize(("t", "told"), [(0.2, True), (0.21, False)])
def test_scans_without_a_pair_are_named(tmp_path, pretrain_config, t, told, capsys):
    """|i - j| < t V: at t V = 1 no slice has another one near."""
    base = pretrain_config(data=deep(tmp_path / "data"), optim=OptimConfig(steps=1))
    config = replace(base, sal=replace(base.sal, t=t))
    pretrain(config)
    said = "sal.t 0.2 times the number of slices is at most 1 in 4 of 4 scans"
    assert (said in capsys.readouterr().err) == told
    assert (config.out / "data.txt").exists() == told


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
@pytest.mark.parametrize("channels", [2, 3])
def test_channels_that_scans_do_not_have(kind, channels):
    with pytest.raises(ValueError, match=rf"model\.in_channels must be 1.*got {channels}"):
        kind(model=UNetConfig(in_channels=channels))
