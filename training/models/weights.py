"""Weights on disk: safetensors with the configuration in the header, so nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from salkernels._shared.files import write_atomically

from .unet import Encoder, UNet, UNetConfig

KEY = "salkernels"  # of the entry in the header
FORMAT = 2  # with a checksum; 1 had none
ENCODER = "encoder.safetensors"  # of a pre-training run
MODEL = "model.safetensors"  # of a fine-tuning run
MAX_DEPTH = 16  # a network of more levels has no input that is large enough
MAX_CLASSES = 255

Module = TypeVar("Module", bound=nn.Module)


def save_encoder(path: Path, encoder: Encoder, about: dict[str, Any]) -> None:
    """Writes the encoder with its configuration and `about` (JSON: method, step, ...)."""
    _save(path, encoder, {"kind": "encoder", "model": asdict(encoder.config), "about": about})


def save_unet(path: Path, model: UNet, about: dict[str, Any]) -> None:
    """Writes a fine-tuned U-Net with all that is needed to predict with it."""
    description = {"kind": "unet", "model": asdict(model.config), "classes": model.classes}
    _save(path, model, {**description, "about": about})


def load_encoder(path: str | Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a run, in eval mode, and its `about`: how it was trained, and on what.

    Args:
        path: the folder of a run (`load_encoder("runs/sal")`), or one of its files of weights. Of a
            fine-tuned U-Net it is the encoder's part.

    Returns:
        The `Encoder`, (B, 1, H, W) -> one map per scale, and a dict. Its entry "preprocess" holds
        the settings by which scans became slices; `salkernels.training.prepare` applies them.

    Raises:
        ValueError: the file is missing, cut short, damaged, or not one of ours.
    """
    path = weights_file(path, ENCODER, MODEL)
    tensors, description = _load(path)
    if description["kind"] == "unet":
        prefix = "encoder."
        tensors = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    config = _config(path, description)
    return _filled(path, lambda: Encoder(config), tensors), description["about"]


def load_unet(path: str | Path) -> tuple[UNet, dict[str, Any]]:
    """The fine-tuned U-Net of a run's folder, or of its file, in eval mode, and its `about`.

    Args:
        path: as for `load_encoder`.

    Returns:
        The `UNet`, (B, 1, H, W) -> logits (B, K, H, W), and a dict with "class_names" and
        "preprocess" among its entries.

    Raises:
        ValueError: as `load_encoder`; it is an encoder alone.
    """
    path = weights_file(path, MODEL)
    tensors, description = _load(path)
    if description["kind"] != "unet":
        raise ValueError(
            f"{path} holds a pre-trained encoder, but a fine-tuned U-Net is needed; "
            f"run `finetune --encoder {path}` first"
        )
    config, classes = _config(path, description), description["classes"]
    if not _whole(classes, 1, MAX_CLASSES):
        raise ValueError(f"{path} has no usable number of classes: {classes!r}")
    return _filled(path, lambda: UNet(config, classes), tensors), description["about"]


def load_network(path: str | Path) -> tuple[Encoder | UNet, dict[str, Any]]:
    """The encoder or the U-Net that a file or a run's folder holds, in eval mode, and its `about`;
    errors as `load_encoder`."""
    path = weights_file(path, MODEL, ENCODER)
    if describe(path)["kind"] == "unet":
        return load_unet(path)
    return load_encoder(path)


def describe(path: str | Path) -> dict[str, Any]:
    """The description of weights, without reading them: their kind, the network's configuration,
    and `about`.

    Raises:
        ValueError: the file is missing, damaged, or not one of ours.
    """
    return _read_description(weights_file(path, ENCODER, MODEL))


def weights_file(path: str | Path, *names: str) -> Path:
    """The file itself, or the first of these names that a run's folder has.

    Raises:
        ValueError: a folder without any; what it holds instead is said.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if (path / ENCODER).is_file():
        raise ValueError(
            f"{path} is a run of pre-training, which holds an encoder and no model; run `finetune "
            f"--encoder {path}` and give the folder of that run"
        )
    what = "a run that has not ended" if (path / "config.yaml").exists() else "no run"
    raise ValueError(f"{path} has no {' or '.join(names)}: it is the folder of {what}")


def _save(path: Path, module: nn.Module, description: dict[str, Any]) -> None:
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    description = {"format": FORMAT, **description}
    description["checksum"] = _checksum(tensors, description)
    # One entry only: safetensors writes several in no fixed order, and equal runs should give equal
    # files.
    header = {KEY: json.dumps(description)}
    write_atomically(path, save(tensors, metadata=header))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    description = _read_description(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    if description["format"] == FORMAT:
        expected = description.pop("checksum", None)
        if expected != _checksum(tensors, description):
            raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    return tensors, description


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected weights written by pretrain or finetune")
    try:
        with safe_open(path, framework="pt") as file:
            return _description(path, (file.metadata() or {}).get(KEY, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _checksum(tensors: dict[str, Tensor], description: dict[str, Any]) -> str:
    """sha256 of the description and of every tensor's name, type, shape and bytes."""
    # As JSON gives it back: tuples are lists.
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _description(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its description is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") not in (1, FORMAT):
        got = found.get("format") if isinstance(found, dict) else found
        raise ValueError(
            f"{path} was not written by this package: expected format {FORMAT!r} in its "
            f"header, got {got!r}"
        )
    needed = {"kind", "model", "about"} | ({"classes"} if found.get("kind") == "unet" else set())
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{path} is damaged: its description has no {', '.join(missing)}")
    if not isinstance(found["about"], dict):
        raise ValueError(f"{path} is damaged: its description is no table of entries")
    return found


def _config(path: Path, description: dict[str, Any]) -> UNetConfig:
    try:
        config = UNetConfig(**description["model"])
        for name in ("in_channels", "width", "depth"):
            value = getattr(config, name)
            if not _whole(value, 1, MAX_DEPTH if name == "depth" else 2**20):
                raise ValueError(f"{name} is {value!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has no usable model configuration: {error}") from error
    return config


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _filled(path: Path, make: Callable[[], Module], tensors: dict[str, Tensor]) -> Module:
    """The module with these weights.

    It is made without memory of its own and takes the file's: a description that claims a large
    network costs no more than the file has.
    """
    try:
        with torch.device("meta"):
            module = make()
        expected = module.state_dict()
        for name in tensors.keys() & expected.keys():
            if tensors[name].dtype != expected[name].dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}, not {expected[name].dtype}")
        module.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit its own configuration: {error}") from error
    return module.eval()
