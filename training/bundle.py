"""A fine-tuned U-Net as a MONAI bundle, which `python -m monai.bundle` runs by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import salkernels
from salkernels._shared.files import write_atomically

from . import bundle_slices
from .data.preprocess import PreprocessConfig
from .errors import RunError
from .export import basic_unet, to_monai
from .models import load_unet
from .preparing import settings_of

COMMAND = (
    "python -m monai.bundle run --config_file configs/inference.json "
    "--dataset_dir SCANS --output_dir LABELS"
)
README = """# {title}

A 2D U-Net with {classes} classes ({names}), applied slice by slice. {start}
In this folder, with MONAI and `fire` installed:

    {command}

segments every `*.nii.gz` of SCANS into LABELS. `--weights`, `--device` and `--pattern` change what
their names say. The network is MONAI's `BasicUNet`; `scripts/slices.py` prepares the slices as they
were in training and brings the labels back to the grid of each scan.
"""


def to_bundle(weights: str | Path, folder: str | Path, *, name: str = "salkernels_unet") -> Path:
    """Writes a MONAI bundle of a fine-tuned network.

    Args:
        weights: run folder of `finetune`, or its model.safetensors.
        folder: of the bundle; it must not exist, or be empty.
        name: of the bundle, for its metadata.

    Returns:
        The folder, with configs/metadata.json and inference.json, models/model.pt,
        scripts/slices.py and docs/README.md. In it, with MONAI and fire installed,

            python -m monai.bundle run --config_file configs/inference.json
                --dataset_dir SCANS --output_dir LABELS

        segments every *.nii.gz of SCANS; nothing of this package is needed there. Labels are those
        that `predict` gives.

    Raises:
        ValueError: not a U-Net; its levels are not those of MONAI's BasicUNet; or scans of the
            training had no spacing, or were turned to RAS, which the bundle does not do.
        RunError: `folder` holds something.
    """
    folder = Path(folder)
    model, about = load_unet(weights)
    network = {"_target_": "BasicUNet", **basic_unet(model.config, model.classes)}
    settings = settings_of(about)
    if about.get("spacing") == "unknown" and not settings.unknown_spacing:
        raise ValueError("the scans of the training recorded no spacing; those of a bundle must")
    if settings.orientation != "native":
        raise ValueError(f"a bundle takes slices as stored, not in {settings.orientation}")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; give a new folder")
    for part in ("configs", "models", "scripts", "docs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    torch.save(to_monai(model).state_dict(), folder / "models" / "model.pt")
    source = Path(bundle_slices.__file__).read_text(encoding="utf-8")
    write_atomically(folder / "scripts" / "slices.py", source)
    write_atomically(folder / "scripts" / "__init__.py", "")
    for file, content in (
        ("inference.json", _inference(network, settings)),
        ("metadata.json", _metadata(name, about, settings)),
    ):
        write_atomically(folder / "configs" / file, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / "docs" / "README.md", _readme(name, about))
    return folder


def _inference(network: dict[str, Any], settings: PreprocessConfig) -> dict[str, Any]:
    """Reads, prepares, segments and writes one scan after the other."""
    reader = {"_target_": "LoadImaged", "keys": ["image"], "ensure_channel_first": True}
    slices, writer = _slices(settings), _writer()
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "pattern": "*.nii.gz",
        "weights": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "files": "$sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                reader,
                slices,
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$list(map(lambda file: {'image': file}, @files))",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SliceInferer",
            "roi_size": [settings.size, settings.size],
            "sw_batch_size": 8,
            "spatial_dim": 2,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "scripts.slices.ToLabelsd", "keys": ["pred"]}, writer],
        },
        "segment": {
            "_target_": "scripts.slices.Segment",
            "network": "@network",
            "inferer": "@inferer",
            "device": "@device",
            "postprocessing": "@postprocessing",
        },
        "run": [
            "$@network.load_state_dict("
            "torch.load(@weights, map_location=@device, weights_only=True))",
            "$list(map(@segment, @dataset))",
        ],
    }


def _slices(settings: PreprocessConfig) -> dict[str, Any]:
    return {
        "_target_": "scripts.slices.ToSlicesd",
        "keys": ["image"],
        "spacing": settings.spacing,
        "size": settings.size,
        "clip": [settings.clip_low, settings.clip_high],
        "window": None if settings.window is None else list(settings.window),
    }


def _writer() -> dict[str, Any]:
    return {
        "_target_": "SaveImaged",
        "keys": ["pred"],
        "output_dir": "@output_dir",
        "output_postfix": "pred",
        "separate_folder": False,
        "resample": False,
        "output_dtype": "$torch.uint8",
    }


def _metadata(name: str, about: dict[str, Any], settings: PreprocessConfig) -> dict[str, Any]:
    import monai
    import numpy as np

    side = [settings.size, settings.size]
    names = dict(enumerate(about["class_names"]))
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": salkernels.__version__,
        "changelog": {salkernels.__version__: "written by salkernels"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__,
        "numpy_version": np.__version__,
        "required_packages_version": {"nibabel": "5.2", "fire": "0.5"},
        "name": name,
        "task": f"Segmentation of {', '.join(about['class_names'][1:])}",
        "description": "A 2D U-Net, pre-trained without labels and fine-tuned on few of them",
        "authors": "",
        "copyright": "",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "n/a",
                    "num_channels": 1,
                    "spatial_shape": side,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(names),
                    "spatial_shape": side,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(label): what for label, what in names.items()},
                }
            },
        },
        "salkernels": {
            key: about[key]
            for key in ("dataset", "labelled", "held_out", "preprocess", "seed", "steps")
            if key in about
        },
    }


def _readme(name: str, about: dict[str, Any]) -> str:
    names = about["class_names"]
    pretraining = about.get("pretraining") or {}
    start = "Its encoder started from random weights."
    if "method" in pretraining:
        start = f"Its encoder was pre-trained without labels (`{pretraining['method']}`)."
    return README.format(
        title=name, classes=len(names), names=", ".join(names), start=start, command=COMMAND
    )
