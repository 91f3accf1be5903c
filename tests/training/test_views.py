"""The order of a batch: scan after scan, both views of a slice together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salkernels import _pair_list, slice_pairs
from salkernels.training import cli
from salkernels.training.cli import make_parser
from salkernels.training.config import PretrainConfig
from salkernels.training.data.sampling import SliceBatch, TwoSubjects
from salkernels.training.device import step_generator
from salkernels.training.inputs import open_dataset
from salkernels.training.methods import METHODS, first, second, side_by_side
from salkernels.training.presets import PRETRAIN
from salkernels.training.views import make_views

CPU = torch.device("cpu")


def config_of(preset: str) -> PretrainConfig:
    arguments = ["pretrain", f"--preset={preset}"]
    return cli._build(PretrainConfig, make_parser(arguments).parse_args(arguments).pretrain)


class Scans:
    """Of a data set only how many slices its scans have: `_collect` reads no pixels."""

    def __init__(self, depths):
        from types import SimpleNamespace

        self.volumes = [SimpleNamespace(name=f"s{i}", offset=100 * i) for i in range(len(depths))]
        self.depths = depths

    def of_subject(self, subject):
        return [int(subject)]

    def num_slices(self, scan):
        return self.depths[scan]


@pytest.mark.parametrize("preset", PRETRAIN)
@pytest.mark.parametrize("pairs", [1, 3])
def test_scans_are_groups_of_the_operator(preset, pairs):
    """So that its kernels hold the samples of one scan together, and not those of the batch."""
    config = config_of(preset)
    depths = 2 * ([200, 180, 230] if preset == "chd" else [9, 12, 10])  # no scan comes twice
    subjects = [str(scan) for scan in range(len(depths))]
    dataset = TwoSubjects(Scans(depths), subjects, config.slices, 0, pairs, read=False)
    for step in range(5):
        batch = dataset[step]
        small = replace(config, crop=16, pairs=pairs, model=replace(config.model, width=1))
        batch = batch._replace(images=torch.zeros(len(batch.sample), 1, 16, 16))
        views = make_views(batch, small, CPU, step_generator(0, step, CPU))
        columns = views.volume, views.slice_index, views.num_slices
        assert all(column.device == CPU for column in columns)
        table = slice_pairs(*columns, config.sal.t)
        places = table.flatten().nonzero().squeeze(1)
        samples = 2 * config.slices * pairs
        assert len(table) == samples
        groups = _pair_list.count_blocks(places, samples)
        assert groups % (2 * pairs) == 0, groups  # a scan each, or parts of one
        if preset != "chd":  # there two parts of a scan may be far from each other
            assert groups == 2 * pairs
    if preset in ("acdc", "chd"):
        assert config.slices == 32  # groups of 32 samples


def test_both_views_of_a_slice_lie_side_by_side(pretrain_config):
    config = pretrain_config(slices=8)
    cache = open_dataset(config)
    batch = TwoSubjects(cache, cache.subjects, 8, 0)[0]
    views = make_views(batch, config, CPU, step_generator(0, 0, CPU))
    for column in ("volume", "slice_index", "num_slices", "sample"):
        assert torch.equal(first(getattr(views, column)), getattr(batch, column))
        assert torch.equal(second(getattr(views, column)), getattr(batch, column))
    assert views.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pairs", [1, 2])
def test_random_numbers_are_those_of_the_order_before(pretrain_config, monkeypatch, pairs):
    """First all first views, then all second ones: as recorded results were drawn."""
    config = pretrain_config(slices=8, pairs=pairs)
    cache = open_dataset(config)
    batch = TwoSubjects(cache, cache.subjects, 8, 0, pairs)[0]
    views = make_views(batch, config, CPU, step_generator(0, 0, CPU))
    monkeypatch.setattr("salkernels.training.views.side_by_side", lambda x: x)
    before = make_views(batch, config, CPU, step_generator(0, 0, CPU))
    for pair in range(pairs):
        rows = slice(16 * pair, 16 * pair + 16)
        assert torch.equal(views.images[rows], side_by_side(before.images[rows]))
        assert torch.equal(views.frame[rows], side_by_side(before.frame[rows]))


def test_views_show_the_slices_that_their_columns_name(pretrain_config):
    """Each image is of one grey value: its slice's number."""
    still = {"rotation": 0, "scale": 1, "shift": 0, "jitter": 0, "brightness": 0, "contrast": 1,
             "gamma": 1, "bias": 0, "noise": 0}  # fmt: skip
    base = pretrain_config(slices=4, pairs=2)
    config = replace(base, augment=replace(base.augment, **still))
    numbers = torch.tensor([5, 6, 11, 12, 21, 23, 30, 31])
    batch = SliceBatch(
        0, 0, numbers.float()[:, None, None, None].expand(-1, 1, 32, 32), torch.zeros(0),
        numbers // 10, numbers % 10, torch.full((8,), 10), numbers, ["s"] * 8,
    )  # fmt: skip
    views = make_views(batch, config, CPU, step_generator(0, 0, CPU))
    assert torch.equal(views.images.amax((1, 2, 3)).long(), views.sample)
    assert torch.equal(views.images.amin((1, 2, 3)).long(), views.sample)
    assert torch.equal(views.volume, views.sample // 10)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.trains])
def test_pictures_are_in_the_order_of_the_views(pretrain_config, name):
    from salkernels.training.models import UNetConfig
    from salkernels.training.pretrain import Slices

    model = UNetConfig(width=4, depth=3)
    config = pretrain_config(slices=4, method=name, model=model, sal=replace_scale())
    cache = open_dataset(config)
    method = METHODS[name](model, getattr(config, name, None), Slices(cache, cache.subjects))
    batch = TwoSubjects(cache, cache.subjects, 4, 0)[0]
    views = make_views(batch, config, CPU, step_generator(0, 0, CPU), method.centres)
    # Turning and cutting leave the grey values of an image: its brightest pixel tells which it is.
    images = torch.arange(8.0)[:, None, None, None].expand(-1, 1, 32, 32).contiguous()
    shown = method.pictures(views._replace(images=images))
    assert [int(picture.max()) for picture in shown] == list(range(8))


def replace_scale():
    from salkernels.training.methods import SALConfig

    return SALConfig(scale=3)
