"""Files from strangers: settings, checkpoints, weights and caches that would run code.

Each hostile pickle below writes a file when it is loaded; afterwards that file must not be there.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

from salkernels.training.checkpoint import LAST, load_checkpoint
from salkernels.training.cli import main
from salkernels.training.data.cache import VolumeCache
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.nifti import DataError
from salkernels.training.errors import RunError
from salkernels.training.inputs import open_dataset
from salkernels.training.models import load_encoder, load_unet


class Bomb:
    """Unpickled, it runs a command."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path):
    """The file that a bomb leaves when it goes off."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the file was run"


def pickles(trace) -> dict[str, bytes]:
    """The bomb as a plain pickle, as torch.save writes it, and hidden in a state."""

    def saved(content, **settings) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **settings)
        return file.getvalue()

    return {
        "pickle": pickle.dumps(Bomb(trace)),
        "torch": saved(Bomb(trace)),
        "old torch": saved(Bomb(trace), _use_new_zipfile_serialization=False),
        "inside": saved({"step": 3, "model": {"w": torch.zeros(2)}, "extra": [Bomb(trace)]}),
    }


def test_the_bombs_are_live(tmp_path):
    for name, content in pickles(tmp_path / "executed").items():
        (tmp_path / "bomb").write_bytes(content)
        if name == "pickle":
            pickle.loads(content)
        else:
            torch.load(tmp_path / "bomb", weights_only=False)
        assert (tmp_path / "executed").exists(), name
        (tmp_path / "executed").unlink()


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "inside"])
def test_a_checkpoint_is_not_executed(kind, tmp_path, trace):
    path = tmp_path / LAST
    path.parent.mkdir()
    path.write_bytes(pickles(trace)[kind])
    with pytest.raises(RunError, match="cannot be read") as caught:
        load_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "inside"])
@pytest.mark.parametrize("load", [load_encoder, load_unet])
def test_weights_are_not_executed(load, kind, tmp_path, trace):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(pickles(trace)[kind])
    with pytest.raises(ValueError, match="damaged or not a safetensors file") as caught:
        load(path)
    assert str(path) in str(caught.value)


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**11) + b"{}",
        struct.pack("<Q", 2) + b"{",
        struct.pack("<Q", 4) + b"null",
        header(),
        header(__metadata__={"salkernels": "null"}),
        header(__metadata__={"salkernels": "[]"}),
        header(__metadata__={"salkernels": "{"}),
        header(__metadata__={"salkernels": '{"format": 1}'}),
        header(__metadata__={"salkernels": '{"format": 1, "kind": "encoder", "model": 3}'}),
        header(
            __metadata__={"salkernels": '{"format": 1, "kind": "encoder", "model": {"width": -1}}'}
        ),
        header(w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        header(w={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0" * 4,
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [load_encoder, load_unet])
def test_malformed_weights_are_a_value_error_with_the_name(load, content, tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        load(path)


@pytest.mark.parametrize(
    "text",
    [
        "out: !!python/object/apply:os.system ['touch {trace}']\n",
        "out: !!python/object/new:os.system ['touch {trace}']\n",
        "seed: !!python/name:os.system\n",
        "!!python/object/apply:subprocess.check_call [[touch, {trace}]]\n",
        "model: !!python/object:salkernels.training.models.unet.UNetConfig {{width: 3}}\n",
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_yaml_with_python_tags_is_refused(command, text, tmp_path, trace, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(text.format(trace=trace))
    with pytest.raises(SystemExit) as caught:
        main([command, f"--config={settings}", f"--data={tmp_path}", f"--out={tmp_path / 'run'}"])
    assert caught.value.code == 2
    assert "python/" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_with_objects_in_its_arrays_is_refused(trace, pretrain_config, tmp_path):
    folder = shutil.copytree(open_dataset(pretrain_config()).folder, tmp_path / "copy")
    VolumeCache(folder, DATASETS["acdc"])
    np.save(folder / "images.npy", np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"images\.npy: damaged"):
        VolumeCache(folder, DATASETS["acdc"])


@pytest.mark.parametrize("frame", ["../../secret", "/etc/passwd", "1/../..", "01", "1e3", "-1", ""])
def test_info_cfg_cannot_name_a_file_elsewhere(frame, tmp_path):
    """The only text from which file names are made: frame numbers, and nothing else."""
    patient = tmp_path / "data" / "patient001"
    patient.mkdir(parents=True)
    (patient / "Info.cfg").write_text(f"ED: {frame}\nES: 2\nNbFrame: 9\n")
    with pytest.raises(DataError, match="frame number"):
        DATASETS["acdc"].find(tmp_path / "data")


def test_a_scan_is_looked_for_in_its_patient_s_folder_only(tmp_path):
    patient = tmp_path / "data" / "patient001"
    patient.mkdir(parents=True)
    (patient / "Info.cfg").write_text("ED: 1\nES: 2\nGroup: ../../x\n")
    (tmp_path / "patient001_frame01.nii.gz").write_bytes(b"not here")
    with pytest.raises(DataError, match=r"patient001_frame01\.nii\.gz: no such file"):
        DATASETS["acdc"].find(tmp_path / "data")
