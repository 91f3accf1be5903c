"""Segmentation of whole scans, and their Dice against the labels, at native resolution."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import csv_text

from .data.cache import VolumeCache
from .data.datasets import DatasetInfo, read_truth
from .data.errors import DataError, listed
from .data.images import Image
from .data.nifti import Volume, frame_count, read_image, write_labels
from .data.preprocess import Geometry, PreprocessConfig, preprocess
from .data.review import require_scale_of_training
from .data.saying import counted
from .data.text import printable
from .device import Device
from .models import UNet

MAX_FILE_NAME = 255  # bytes, on every common file system
ALL = "all"  # in place of the names of subjects
BATCH = 16  # slices per forward pass at most: a CT has hundreds ...
BATCH_PIXELS = 2**20  # ... and no more than this at once: 16 of 256 x 256, 4 of 512 x 512


class Overlap(NamedTuple):
    """Voxels of a class that label map and prediction share, and the sum of what each has."""

    both: int
    either: int

    @property
    def dice(self) -> float:
        """NaN where neither has any."""
        return 2 * self.both / self.either if self.either else float("nan")


@dataclass
class Scores:
    """Dice of some scans.

    rows: one per scan: subject, frame, role and the Dice of each class but background; NaN where
        neither the label map nor the prediction holds the class.
    overlaps: for each scan and class, the voxels that label map and prediction share, and the sum
        of those that each of them has.
    pooled: report Dice over the voxels of all scans together, and not the mean over scans.
    """

    class_names: tuple[str, ...]  # without background
    rows: list[dict[str, Any]]
    overlaps: list[list[Overlap]] = field(default_factory=list)
    pooled: bool = False

    def per_class(self) -> dict[str, float]:
        """Mean over the scans that have a value, of each class; NaN where none has. Or pooled."""
        return self.over_voxels() if self.pooled else self.over_scans()

    def over_scans(self) -> dict[str, float]:
        """Of each class the mean over the scans that have a value; NaN where none has."""
        return {name: _mean([row[name] for row in self.rows]) for name in self.class_names}

    def over_voxels(self) -> dict[str, float]:
        """Of each class the Dice of all scans' voxels as one; NaN where none holds it."""
        totals = (
            np.sum(self.overlaps, axis=0)
            if self.overlaps
            else [Overlap(0, 0)] * len(self.class_names)
        )
        return {
            name: Overlap(*(int(count) for count in total)).dice
            for name, total in zip(self.class_names, totals, strict=True)
        }

    @property
    def mean(self) -> float:
        """Mean over the classes."""
        return _mean(list(self.per_class().values()))


def segment(
    model: nn.Module, slices: npt.NDArray[np.float32], geometry: Geometry, device: Device
) -> npt.NDArray[np.uint8]:
    """Labels (X, Y, Z) at native resolution of preprocessed slices (Z, size, size).

    model: (B, 1, size, size) -> (B, K, size, size) scores; the class is that of the highest.
    """
    model.eval()
    labels = np.empty(geometry.native_slices, dtype=np.uint8)
    batch = max(1, min(BATCH, BATCH_PIXELS // geometry.size**2))
    with torch.inference_mode(), device.autocast():
        for start in range(0, len(slices), batch):
            part = torch.from_numpy(np.array(slices[start : start + batch]))[:, None]
            part = part.to(device.device, memory_format=torch.channels_last)
            # Probabilities of a few slices at a time: those of a CT with hundreds take gigabytes.
            scores = model(part).float().softmax(dim=1).cpu()
            if not torch.isfinite(scores).all():
                raise ValueError("expected finite scores, got NaN or Inf")
            labels[start : start + batch] = geometry.restore_slices(scores, 0.0, 1.0)
    return geometry.stored(labels)


def evaluate(
    model: nn.Module, cache: VolumeCache, subjects: Sequence[str], device: Device, *, progress: bool
) -> Scores:
    """3D Dice of every labelled scan of the subjects, against the label map as it was stored."""
    info = cache.info
    scans = [i for s in subjects for i in cache.of_subject(s) if cache.volumes[i].labelled]
    rows, overlaps = [], []
    for scan in counted(scans, "evaluating", "scan", shown=progress):
        entry = cache.volumes[scan]
        predicted = segment(model, cache.image(scan), entry.geometry, device)
        truth = read_truth(entry, info)
        if truth is None:
            raise DataError(f"{entry.name}: its label map has gone since the cache was built")
        overlaps.append(overlap_per_class(predicted, truth, info))
        dice = [overlap.dice for overlap in overlaps[-1]]
        rows.append(
            {"subject": entry.subject, "frame": entry.frame, "role": entry.role}
            | dict(zip(info.class_names[1:], dice, strict=True))
        )
    return Scores(tuple(info.class_names[1:]), rows, overlaps)


def dice_per_class(
    predicted: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], info: DatasetInfo
) -> list[float]:
    """3D Dice of each class but background.

    A class that only one of the two holds scores 0, so an invented structure costs as much as a
    missed one; NaN where neither holds it.
    """
    return [overlap.dice for overlap in overlap_per_class(predicted, truth, info)]


def overlap_per_class(
    predicted: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8], info: DatasetInfo
) -> list[Overlap]:
    """The voxels behind the Dice of each class but background."""
    found = []
    for label in range(1, info.num_classes):  # one by one: a volume of each at once is too much
        guess, answer = predicted == label, truth == label
        either = int(np.count_nonzero(guess)) + int(np.count_nonzero(answer))
        found.append(Overlap(int(np.count_nonzero(guess & answer)), either))
    return found


def write_scores(out: Path, scores: Scores, about: dict[str, Any]) -> None:
    """results.json (means and conditions) and dice.csv (one row per scan)."""
    pooled = scores.over_voxels()
    result = {
        **about,
        "dice_over": "voxels of all scans" if scores.pooled else "scans",
        "mean_dice": _or_null(scores.mean),
        "dice": {name: _or_null(value) for name, value in scores.per_class().items()},
        "mean_dice_pooled": _or_null(_mean(list(pooled.values()))),
        "dice_pooled": {name: _or_null(value) for name, value in pooled.items()},
    }
    write_atomically(out / "results.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    columns = ["subject", "frame", "role", *scores.class_names]
    rows = [columns, *([row[column] for column in columns] for row in scores.rows)]
    write_atomically(out / "dice.csv", csv_text(rows))


def subjects_to_score(
    given: Sequence[str] | None, held_out: Sequence[str], cache: VolumeCache
) -> list[str]:
    """Those given, of which "all" is every labelled one; by default the model's held-out subjects.

    Data that hold none of these are another set than the model's: all of its labelled subjects.

    Raises:
        DataError: no subject with labels, or only some of the held-out ones.
    """
    found = [subject for subject in held_out if subject in cache.subjects]
    if given is not None and list(given) != [ALL]:
        return list(given)
    if given is None and found:
        if len(found) < len(held_out):
            missing = listed([subject for subject in held_out if subject not in found])
            raise DataError(
                f"the data lack {missing}, which were held out in fine-tuning; pass --subjects "
                f"NAME ..., or --subjects {ALL} for every labelled subject"
            )
        return list(held_out)
    if not cache.labelled_subjects:
        raise DataError("no scan of the data has a label map, so there is nothing to score")
    return cache.labelled_subjects


def predict_file(
    model: UNet, about: dict[str, Any], image: Path | Image, target: Path, device: Device
) -> None:
    """Segments one NIfTI file, of a 4D one every frame, and writes the labels with its header."""
    if not isinstance(image, Image):
        image = Image(image)
    if len(os.fsencode(target.name)) > MAX_FILE_NAME:  # before the work, not after it
        raise DataError(f"{image.path}: its name is too long for one with _pred; shorten it")
    frames = frame_count(image.path)
    volume = read_image(image.path, ndim=3 if frames is None else 4)
    for note in volume.notes:
        tqdm.write(printable(f"note: {image.path}: {note}"), file=sys.stderr)
    if image.spacing is not None:
        volume = replace(volume, spacing=image.spacing)
    if frames is None:
        labels = _segmented(model, about, volume, image.path, device)
    else:
        single = (replace(volume, array=volume.array[..., t]) for t in range(frames))
        each = [_segmented(model, about, frame, image.path, device) for frame in single]
        labels = np.stack(each, axis=-1)
    write_labels(target, labels, volume)


def _or_null(value: float) -> float | None:
    """JSON has no NaN: a class that no scan holds is null."""
    return None if np.isnan(value) else value


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are not NaN, and NaN of none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _segmented(
    model: UNet, about: dict[str, Any], volume: Volume, path: Path, device: Device
) -> npt.NDArray[np.uint8]:
    settings = PreprocessConfig(**about["preprocess"])
    recorded = volume.spacing is not None or settings.unknown_spacing > 0
    require_scale_of_training(
        "recorded" if recorded else "unknown",
        about.get("spacing"),
        [str(path)],
        settings.mixed_spacing,
    )
    classes = len(about["class_names"])
    ready = preprocess(volume, None, settings, num_classes=classes, name=str(path))
    return segment(model, ready.images, ready.geometry, device)
