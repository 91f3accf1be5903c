"""Slices in the memory of the training device give the run that slices read one by one give."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from salkernels.training import finetune, resident
from salkernels.training.checkpoint import load_checkpoint
from salkernels.training.data.cache import VolumeCache
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import read_metrics


def refuse(*_):
    raise AssertionError("a slice was read in training")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_the_same_wherever_its_slices_lie(pretrain_config, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    host = pretrain_config(out=tmp_path / "host", cache_on="host")
    device = pretrain_config(out=tmp_path / "device", cache_on="device", workers=workers)
    pretrain(host)
    monkeypatch.setattr(VolumeCache, "image", refuse)
    pretrain(device)
    assert read_metrics(host.out) == read_metrics(device.out)
    expected, got = (load_checkpoint(config.out)["module"] for config in (host, device))
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_fine_tuning_finds_its_labels_there(finetune_config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "finetuning_figures", lambda *_: None)
    host, device = (
        finetune_config(out=tmp_path / where, cache_on=where) for where in ("host", "device")
    )
    assert finetune.finetune(host).rows == finetune.finetune(device).rows
    assert read_metrics(host.out) == read_metrics(device.out)


def test_slices_go_to_a_gpu_where_they_take_a_quarter_of_its_free_memory(monkeypatch):
    cache = SimpleNamespace(images=np.zeros(20, np.float32), labels=np.zeros(20, np.uint8))
    for free, fits in ((400, True), (399, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1000))
        assert resident._fits(cache, torch.device("cuda")) is fits
    assert not resident._fits(cache, torch.device("cpu"))
