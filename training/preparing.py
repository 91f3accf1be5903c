"""A scan as slices that a network takes, by what the network's weights say of its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .data.nifti import Volume, read_image
from .data.preprocess import Geometry, PreprocessConfig, preprocess
from .models import describe

About = Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """One scan as slices.

    slices: (Z, 1, size, size) float32, as the network's input.
    geometry: the way back: `geometry.restore(scores)` makes labels (X, Y, Z) of class scores
        (Z, K, size, size).
    """

    slices: Tensor
    geometry: Geometry


def prepare(
    scan: str | Path | npt.NDArray[Any] | Tensor,
    weights: str | Path | About,
    *,
    spacing: Sequence[float] | float | None = None,
    affine: npt.NDArray[Any] | None = None,
) -> Prepared:
    """Prepares a scan for an encoder or a U-Net, from the file of its weights alone.

    Args:
        scan: path of a NIfTI image, or its voxels (X, Y, Z) in the scanner's unit, with slices
            along the last axis.
        weights: file or run folder of the weights, or their description, as `load_encoder` and
            `load_unet` return it.
        spacing: of voxels in mm: one number for the plane, or (x, y) or (x, y, z). None: of the
            file's header; of an array not known.
        affine: (4, 4) voxel to world in mm, of an array; it turns the scan where the weights want a
            certain orientation, and has a spacing of its own.

    Raises:
        ValueError: the weights do not say how their scans were prepared, or the spacing is not
            known where it was in training.
        DataError: the scan cannot be read, or has nothing to see.
    """
    about = weights if isinstance(weights, Mapping) else describe(weights)["about"]
    settings = settings_of(about)
    name = str(scan) if isinstance(scan, (str, Path)) else "scan"
    volume = as_volume(scan, spacing, affine)
    known = volume.spacing is not None or settings.unknown_spacing > 0
    if about.get("spacing") == "recorded" and not known and not settings.mixed_spacing:
        raise ValueError(
            f"{name} has no spacing, but the scans of the training had: give spacing=, in mm"
        )
    if about.get("spacing") == "unknown" and known and not settings.mixed_spacing:
        raise ValueError(
            f"{name} has a spacing, but the scans of the training had none, so that its slices "
            f"would be at another scale: give the voxels as an array without spacing="
        )
    ready = preprocess(volume, None, settings, num_classes=2, name=name)
    return Prepared(torch.from_numpy(ready.images)[:, None], ready.geometry)


def settings_of(about: About) -> PreprocessConfig:
    """How the scans of the training were prepared."""
    if "preprocess" not in about:
        raise ValueError(
            "the weights do not say how their scans were prepared: they were written before "
            "pre-training recorded it; run it again, or add its settings to the description: "
            "{**about, 'preprocess': asdict(PreprocessConfig(...))}"
        )
    return PreprocessConfig(**about["preprocess"])


def as_volume(
    scan: str | Path | npt.NDArray[Any] | Tensor,
    spacing: Sequence[float] | float | None,
    affine: npt.NDArray[Any] | None,
) -> Volume:
    """A NIfTI file, or voxels (X, Y, Z) of an array, with what is known of their grid."""
    pixel = None if spacing is None else _spacing(spacing)
    if isinstance(scan, (str, Path)):
        if affine is not None:
            raise ValueError("affine is for arrays: a file has its own")
        volume = read_image(scan)
        if pixel is None:
            return volume
        return Volume(volume.array, volume.affine, pixel, volume.orientation, volume.header)
    array = np.asarray(scan.detach().float().cpu() if isinstance(scan, Tensor) else scan)
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"scan must be a path, or real numbers (X, Y, Z), got {type(scan).__name__} of "
            f"{array.dtype}"
        )
    array = array.astype(np.float32, copy=False)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"scan must be voxels (X, Y, Z), slices last, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("scan must hold finite numbers, got NaN or infinity")
    if affine is None:
        return Volume(array, np.diag([*(pixel or (1.0, 1.0, 1.0)), 1.0]), pixel, None, None)
    import nibabel as nib

    grid = np.asarray(affine, np.float64)
    if grid.shape != (4, 4):
        raise ValueError(f"affine must be (4, 4), got shape {grid.shape}")
    if not (np.isfinite(grid).all() and np.linalg.det(grid[:3, :3])):
        raise ValueError(f"affine must be finite and invertible, got {grid.tolist()}")
    if pixel is None:
        x, y, z = (float(n) for n in np.linalg.norm(grid[:3, :3], axis=0))
        pixel = x, y, z
    axes = "".join(nib.orientations.aff2axcodes(grid))  # type: ignore[no-untyped-call]
    return Volume(array, grid, pixel, axes, None)


def _spacing(spacing: Sequence[float] | float) -> tuple[float, float, float]:
    """Along X, Y and Z; that between slices plays no part where it is not given."""
    try:
        numbers = [float(n) for n in np.atleast_1d(np.asarray(spacing, np.float64))]
    except (TypeError, ValueError):
        numbers = []
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    if len(numbers) not in (2, 3) or not all(0 < n < np.inf for n in numbers):
        raise ValueError(f"spacing must be 1 to 3 numbers in mm, each > 0, got {spacing!r}")
    x, y, z = (*numbers, 1.0)[:3]
    return x, y, z
