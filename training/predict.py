"""Label maps of scans, on the scans' own grid: of an array, or of NIfTI files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .callable_module import make_callable
from .config import RunConfig
from .data.errors import listed
from .data.images import find_images
from .data.nifti import DataError
from .data.preprocess import PreprocessConfig
from .data.saying import counted
from .data.text import printable
from .device import Device
from .errors import RunError
from .evaluate import predict_file, segment
from .models import UNet, load_unet
from .preparing import prepare


def predict(
    model: str | Path | tuple[UNet, Mapping[str, Any]],
    scan: str | Path | npt.NDArray[Any] | Tensor,
    *,
    spacing: Sequence[float] | float | None = None,
    affine: npt.NDArray[Any] | None = None,
    device: str = "auto",
) -> npt.NDArray[np.uint8]:
    """Segments one scan with a fine-tuned U-Net.

    Args:
        model: run folder of `finetune` or its model.safetensors; or what `load_unet` returned,
            which is not read again for every scan.
        scan: voxels (X, Y, Z), slices along the last axis; or the path of a NIfTI image.
        spacing: of the voxels in mm, as in `prepare`.
        affine: (4, 4), of an array, as in `prepare`.
        device: "auto", "cpu", "cuda", ...; a model that was loaded before is moved there.

    Returns:
        (X, Y, Z) uint8, the class of each voxel on the scan's own grid, an index into
        `about["class_names"]`. The command `predict` writes the same for files.

    Raises:
        ValueError: as `prepare`; not a U-Net.
        DataError: the scan cannot be read, or has nothing to see.
    """
    unet, about = load_unet(model) if isinstance(model, (str, Path)) else model
    ready = prepare(scan, about, spacing=spacing, affine=affine)
    where = Device.of(RunConfig(device=device, precision="fp32")).exact()
    slices = ready.slices[:, 0].numpy()
    return segment(where.to(unet), slices, ready.geometry, where)


def predict_files(
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
    about = {**about, "preprocess": asdict(settings)}
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for image, target in zip(counted(images, "predicting", "image"), targets, strict=True):
        try:
            predict_file(model, about, image, target, device)
        except DataError as error:
            failures.append(str(error))
    print(printable(f"{(n := len(images) - len(failures))} label map{'s' * (n != 1)} in {out}"))
    if failures:
        raise DataError("these files were left out:\n" + "\n".join(failures))


make_callable(__name__)  # so that `salkernels.training.predict` is this module, and the function
