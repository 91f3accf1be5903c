"""Weights on disk: safetensors with the configuration in the header, so nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..files import write_atomically
from .unet import Encoder, UNet, UNetConfig

KEY = "salkernels"  # of the entry in the header
FORMAT = 1


def save_encoder(path: Path, encoder: Encoder, about: dict[str, Any]) -> None:
    """Writes the encoder with its configuration and `about` (JSON: method, step, ...)."""
    _save(path, encoder, {"kind": "encoder", "model": asdict(encoder.config), "about": about})


def save_unet(path: Path, model: UNet, about: dict[str, Any]) -> None:
    """Writes a fine-tuned U-Net with all that is needed to predict with it."""
    description = {"kind": "unet", "model": asdict(model.config), "classes": model.classes}
    _save(path, model, {**description, "about": about})


def load_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder of a file written by `save_encoder` or `save_unet`, and its `about`.

    Raises:
        ValueError: the file is missing, cut short, or not one of ours.
    """
    tensors, description = _load(path)
    encoder = Encoder(_config(path, description))
    if description["kind"] == "unet":
        prefix = "encoder."
        tensors = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    _fill(path, encoder, tensors)
    return encoder, description["about"]


def load_unet(path: Path) -> tuple[UNet, dict[str, Any]]:
    """The U-Net of a file written by `save_unet`, and its `about`; errors as `load_encoder`."""
    tensors, description = _load(path)
    if description["kind"] != "unet":
        raise ValueError(
            f"{path} holds a pre-trained encoder, but a fine-tuned U-Net is needed; "
            f"run `finetune --encoder {path}` first"
        )
    model = UNet(_config(path, description), description["classes"])
    _fill(path, model, tensors)
    return model, description["about"]


def _save(path: Path, module: nn.Module, description: dict[str, Any]) -> None:
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    # One entry only: safetensors writes several in no fixed order, and equal runs should give equal
    # files.
    header = {KEY: json.dumps({"format": FORMAT, **description})}
    write_atomically(path, save(tensors, metadata=header))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected weights written by pretrain or finetune")
    try:
        with safe_open(path, framework="pt") as file:
            description = _description(path, (file.metadata() or {}).get(KEY, "{}"))
        return load_file(path), description
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _description(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its description is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format") if isinstance(found, dict) else found
        raise ValueError(
            f"{path} was not written by this package: expected format {FORMAT!r} in its "
            f"header, got {got!r}"
        )
    needed = {"kind", "model", "about"} | ({"classes"} if found.get("kind") == "unet" else set())
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{path} is damaged: its description has no {', '.join(missing)}")
    return found


def _config(path: Path, description: dict[str, Any]) -> UNetConfig:
    try:
        return UNetConfig(**description["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has no usable model configuration: {error}") from error


def _fill(path: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own configuration: {error}") from error
