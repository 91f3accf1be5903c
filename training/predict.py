"""Label maps of NIfTI images, on the images' own grid."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .checkpoint import RunError
from .data.errors import listed
from .data.images import Image, find_images
from .data.nifti import DataError, Volume, frame_count, read_image, write_labels
from .data.preprocess import PreprocessConfig, preprocess
from .data.review import require_scale_of_training
from .data.text import printable
from .engine import Device
from .evaluate import segment
from .models import UNet

MAX_FILE_NAME = 255  # bytes, on every common file system


def predict(
    model: UNet,
    about: dict[str, Any],
    inputs: Sequence[Path],
    out: Path,
    device: Device,
    *,
    overwrite: bool = False,
    spacing: float = 0.0,
    mixed_spacing: bool = False,
) -> None:
    """Segments the images that find_images finds, into folders of `out` as the images lie in.

    spacing: in-plane pixel size in mm of images whose header records none.
    mixed_spacing: accept images whose spacing is not recorded where that of the training was, and
        the other way round.

    Raises:
        RunError: label maps that are there already, or two of one name.
        DataError: images that could not be segmented; the others are.
    """
    images, labels = find_images(inputs)
    if labels:
        names = listed([path.name for path in labels])
        told = f"{len(labels)} label maps are left out, by their names: {names}"
        print(f"note: {printable(told)}", file=sys.stderr)
    targets = [out / image.folder / f"{image.stem}_pred.nii.gz" for image in images]
    existing = [str(target) for target in targets if target.exists()] if out.exists() else []
    if existing and not overwrite:
        raise RunError(f"already there: {listed(existing)}; pass --overwrite")
    if len(set(targets)) < len(targets):
        raise RunError("two input files have the same name; predict their folders one by one")
    settings = PreprocessConfig(**about["preprocess"])
    mixed = mixed_spacing or settings.mixed_spacing
    settings = replace(
        settings, unknown_spacing=spacing or settings.unknown_spacing, mixed_spacing=mixed
    )
    about = {**about, "preprocess": settings}
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for image, target in zip(tqdm(images, "predicting", disable=None), targets, strict=True):
        try:
            predict_file(model, about, image, target, device)
        except DataError as error:
            failures.append(str(error))
    print(printable(f"{len(images) - len(failures)} label maps in {out}"))
    if failures:
        raise DataError("these files were left out:\n" + "\n".join(failures))


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


def _segmented(
    model: UNet, about: dict[str, Any], volume: Volume, path: Path, device: Device
) -> npt.NDArray[np.uint8]:
    given = about["preprocess"]
    settings = given if isinstance(given, PreprocessConfig) else PreprocessConfig(**given)
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
