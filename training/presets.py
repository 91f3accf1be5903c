"""Named settings: from a phantom that a laptop trains in minutes to the paper's scale.

A preset is the configuration's own defaults with some values replaced; a file and the command line
replace more.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np

PresetName = Literal["phantom", "mini", "desk", "acdc", "chd", "pcl"]

# Phantoms have 96 x 96 pixels of 1.5 mm; 64 pixels of 2.25 mm show the same field.
_PHANTOM = {
    "preprocess.spacing": 2.25,
    "preprocess.size": 64,
    "crop": 48,
    "model.width": 8,
}
# 256 pixels of about 1.4 mm at half resolution; 96 pixels give 12 x 12 at scale 4, which windows of
# 2, 3, 4 and 6 divide.
_DESK = {
    "preprocess.spacing": 2.8,
    "preprocess.size": 128,
    "crop": 96,
    "model.width": 16,
}
# The field of the desk at 5/8 of its resolution: pre-training takes about a minute of one core.
# For screening: an order of arms found here must be confirmed with `desk`.
_MINI = {
    "preprocess.spacing": 4.48,
    "preprocess.unknown_zoom": 0.3125,
    "preprocess.size": 80,
    "crop": 64,
    "model.width": 8,
}
# Resolution, width, batch and rate of the public code of PCL (github.com/dewenzeng/positional_cl).
# 18,000 steps of 32 slices are 300 passes over the frames ED and ES; that code passes over all
# frames of the cine, which makes about 240,000 (preset `pcl`). A batch here is two scans, as in the
# paper: of ten slices each they give 32 only with repetition, so half of a batch is different
# (`--slices 16 --pairs 2` repeats none). Maps of scale 4 have 44 x 44 pixels, which windows of 3
# and 6 do not tile evenly (those at the edges are smaller); --crop 384 gives 48 x 48, which 2, 3, 4
# and 6 do.
_ACDC = {
    "preprocess.spacing": 1.25,
    "preprocess.unknown_zoom": 1.0,
    "preprocess.unknown_max_extent": 400,
    "preprocess.unknown_extent": 352,
    "preprocess.size": 384,
    "crop": 352,
    "model.width": 48,
    "workers": 4,
}
_CHD = {
    "dataset": "chd",
    "preprocess.spacing": 0.5,
    "preprocess.unknown_zoom": 1.0,
    "preprocess.unknown_max_extent": 512,
    "preprocess.unknown_extent": 512,
    "preprocess.size": 512,
    "preprocess.clip_low": 1.0,
    "preprocess.clip_high": 99.0,
    "preprocess.orientation": "RAS",
    "crop": 512,
    "model.width": 32,
    "workers": 4,
}
# The public code of PCL on ACDC, as far as settings go; docs/training/experiments.md lists what
# still differs. Its elastic displacements are white noise, smoothed with a deviation of 14 to 17
# pixels and multiplied by 100 to 350: 2.3 of 352 pixels on average. Drawn at points 39 pixels apart
# and interpolated they have the same slope.
_PCL = {
    "preprocess.spacing": 1.25,
    "preprocess.unknown_zoom": 1.0,
    "preprocess.unknown_max_extent": 400,
    "preprocess.unknown_extent": 352,
    "preprocess.size": 352,
    "preprocess.clip_low": 0.0,
    "preprocess.clip_high": 100.0,
    "crop": 352,
    "model.width": 48,
    "model.bottleneck": "plain",
    "workers": 4,
    "augment.rotation": 180.0,
    "augment.scale": 1.3,
    "augment.zoom": "linear",
    "augment.shift": 0.0,
    "augment.elastic": 0.008,
    "augment.elastic_nodes": 10,
    "augment.probability": 0.67,
    "augment.flip": 0.5,
    "augment.brightness": 0.0,
    "augment.contrast": 1.0,
    "augment.gamma": 1.0,
    "augment.bias": 0.0,
    "augment.noise": 0.0,
    "optim.weight_decay": 1e-5,
    "optim.decay_all": True,
    "optim.warmup": 0.0,
    "optim.clip": 0.0,
}
_SCALE = 0.1 / 0.07  # τ over the base temperature of that code's loss

PRETRAIN: dict[PresetName, dict[str, Any]] = {
    "phantom": {
        **_PHANTOM,
        "sal.lambda_": 0.3,  # of 1 the control falls with LA, on 64 channels
        "optim.steps": 400,
        "checkpoint_every": 200,
        "monitor_every": 20,
    },
    "mini": {**_MINI, "optim.steps": 300},
    "desk": {**_DESK, "optim.steps": 2500},
    "acdc": {**_ACDC, "slices": 32, "optim.lr": 0.1, "optim.steps": 18000},
    "chd": {
        **_CHD,
        "slices": 32,
        "optim.lr": 0.1,
        "optim.steps": 100000,
        "sal.t": 0.1,
        "pcl.t": 0.1,
    },
    "pcl": {
        **_PCL,
        "method": "pcl",
        "cine": True,
        "sampling": "slices",
        "slices": 32,
        "optim.lr": 0.1,
        "optim.nesterov": False,
        "optim.steps": 1,
        "optim.epochs": 300.0,
        **{
            f"{method}.{name}": value
            for method in ("simclr", "gcl", "pcl")
            for name, value in (("loss_scale", _SCALE), ("projection_dim", 512))
        },
        "sal.projection_dim": 512,
    },
}

# What `pretrain` starts from beyond the paper's own settings, where a comparison says so
# (docs/training/collapse.md). Experiments do not: their arms name what they change.
_BEST = {
    "sal.embedding": "none",
    "sal.common_frame": True,
    "augment.geometry": "independent",
}
BEST: dict[PresetName, dict[str, Any]] = {"phantom": _BEST, "mini": _BEST, "desk": _BEST}

# Fine-tuning moves each slice by itself, and adapts pre-trained weights with a small rate. Its
# length follows the number of labelled subjects: 500 steps of ten slices are 130 passes over two
# subjects of ACDC and 3 over 80, so that small and large M would not be comparable.
_FINETUNE = {
    "augment.elastic": 0.02,
    "optim.name": "adamw",
    "optim.lr": 1e-3,
    "optim.weight_decay": 1e-4,
}
# As in the public code of PCL, whose authors found that none is better on CHD.
_NO_AUGMENTATION = {
    "augment.rotation": 0.0,
    "augment.scale": 1.0,
    "augment.shift": 0.0,
    "augment.elastic": 0.0,
    "augment.brightness": 0.0,
    "augment.contrast": 1.0,
    "augment.gamma": 1.0,
    "augment.bias": 0.0,
    "augment.noise": 0.0,
}
FINETUNE: dict[PresetName, dict[str, Any]] = {
    "phantom": {**_PHANTOM, **_FINETUNE, "optim.steps": 100},
    "mini": {**_MINI, **_FINETUNE, "optim.steps": 500, "optim.epochs": 30.0},
    "desk": {**_DESK, **_FINETUNE, "optim.steps": 500, "optim.epochs": 30.0},
    "acdc": {**_ACDC, **_FINETUNE, "optim.steps": 8000, "optim.epochs": 200.0},
    "chd": {
        **_CHD,
        **_FINETUNE,
        **_NO_AUGMENTATION,
        "optim.steps": 20000,
        "optim.epochs": 100.0,
    },
    # The repository has commands for CHD (rate 5e-5, at least 1e-6 or 5e-6, 100 epochs) and none
    # for ACDC; these are what its issue 3 quotes.
    "pcl": {
        **_PCL,
        "optim.name": "adam",
        "optim.lr": 5e-4,
        "optim.final_lr": 0.01,
        "optim.steps": 1,
        "optim.epochs": 200.0,
        "loss": "ce",
        "select": "best-on-test",
        "select_every": 20,
        "dice": "pooled",
    },
}

# What the command line starts from, by stage.
STARTS: dict[str, dict[PresetName, dict[str, Any]]] = {
    "pretrain": {name: {**values, **BEST.get(name, {})} for name, values in PRETRAIN.items()},
    "finetune": FINETUNE,
}

Config = TypeVar("Config")


def build(
    kind: type[Config],
    presets: Mapping[Any, Mapping[str, Any]],
    name: str,
    changes: Mapping[str, Any],
) -> Config:
    """A configuration by a preset and changes: fields, those of a part as a.b or a__b.

    Raises:
        ValueError: there is no such preset, or a value does not do.
        TypeError: there is no such setting.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(presets)}")
    whole: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    # A probe has no loss and the like, which presets set for those that have.
    settings = {key: v for key, v in presets[name].items() if key.partition(".")[0] in known}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in settings.items():
        head, _, rest = key.partition(".")
        if rest:
            parts.setdefault(head, {})[rest] = value
        else:
            whole[head] = _number(known[head], value) if head in known else value
    _require_known(set(whole) | set(parts), set(known), "")
    for head, inner in parts.items():
        make: Any = known[head].default_factory
        base = whole.get(head) or make()
        own = {field.name: field for field in fields(base)}
        _require_known(set(inner), set(own), f"{head}.")
        inner = {key: _number(own[key], value, f"{head}.") for key, value in inner.items()}
        whole[head] = replace(base, **inner)
    return kind(**whole)


def _number(of: Field[Any], value: Any, prefix: str = "") -> Any:
    """A value as the records of a run hold it: no number of NumPy's, and of the setting's type."""
    value = value.item() if isinstance(value, np.generic) else value
    whole = type(value) is int
    if of.type in ("int", int) and not whole:
        raise TypeError(f"{prefix}{of.name} must be a whole number, got {value!r}")
    if of.type in ("float", float) and not (whole or isinstance(value, float)):
        raise TypeError(f"{prefix}{of.name} must be a number, got {value!r}")
    return value


def _require_known(given: set[str], known: set[str], prefix: str) -> None:
    for name in sorted(given - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        raise TypeError(f"there is no setting {prefix}{name}{hint}")
