"""A tiny phantom and configurations that train on it in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nibabel", reason="the training extra is not installed")

from salkernels.training.config import FinetuneConfig, OptimConfig, PretrainConfig
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.models import UNetConfig

COMMON: dict[str, Any] = {
    "crop": 32,
    "device": "cpu",
    "log_every": 2,
    "checkpoint_every": 3,
    "preprocess": PreprocessConfig(spacing=4.0, size=32),
    "model": UNetConfig(width=4, depth=4),
}


@pytest.fixture(scope="session")
def common() -> dict[str, Any]:
    """Settings of every run here, for those who make configurations of their own."""
    return COMMON


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "data", subjects=6, slices=6)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pretrain_config(
    phantom: Path, cache_folder: Path, tmp_path: Path
) -> Callable[..., PretrainConfig]:
    """Makes a configuration of a few steps; keyword arguments replace fields."""
    base = PretrainConfig(
        data=phantom,
        out=tmp_path / "pretrain",
        cache=cache_folder,
        slices=8,
        monitor_every=4,
        optim=OptimConfig(steps=6),
        **COMMON,
    )
    return lambda **changes: replace(base, **changes)


@pytest.fixture
def finetune_config(
    phantom: Path, cache_folder: Path, tmp_path: Path
) -> Callable[..., FinetuneConfig]:
    base = FinetuneConfig(
        data=phantom,
        out=tmp_path / "finetune",
        cache=cache_folder,
        num_folds=3,
        labelled=2,
        batch_size=4,
        optim=OptimConfig(name="adamw", lr=1e-3, steps=4),
        **COMMON,
    )
    return lambda **changes: replace(base, **changes)
