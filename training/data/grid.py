"""Where the voxels of a file lie in the world, and a label map brought to its image's grid.

What a header says, in the order in which it is believed:

1. sform and qform agree in scale (or only one of them has a code): that is the grid. A unit matrix
   at the origin is what tools write when they know nothing, so it counts as no matrix.
2. They differ in scale, or the sform does from pixdim: pixdim is the size of a voxel in the
   standard, and other readers take it, so the qform holds; without one, the sform's directions at
   pixdim's scale. The scan is named.
3. No matrix, but a pixdim other than 1 x 1 x 1: the spacing is known, the orientation is not.
4. Neither: nothing is known. A pixdim of 0 is not recorded, though nibabel makes 1 mm of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from .errors import DataError
from .stream import Steps

Affine = npt.NDArray[np.float64]
_UNIT_IN_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: metre, mm, micron; others count as mm
_UNIT_NAMES = {1: "metres", 3: "microns"}
SCALE_TOLERANCE = 1e-3  # relative: float32 headers and text formats round to 1e-4 and less
STEP_TOLERANCE = 1e-3  # of a voxel, for each step along an axis
CORNER_TOLERANCE = 0.05  # of a voxel at the farthest corner, where rounded steps add up


@dataclass(frozen=True)
class Grid:
    """The grid of a volume.

    shape: (X, Y, Z).
    affine: (4, 4), voxel to world in mm; a default where `orientation` is None.
    spacing: mm per voxel along X, Y, Z; None when the header does not record it.
    orientation: where the axes point, "RAS" or "LPS" for example; None when not recorded.
    rejected: the affine that was not believed, where the header contradicts itself.
    note: the contradiction in words, else "".
    unit: of the header where it is not mm, else "".
    """

    shape: tuple[int, int, int]
    affine: Affine
    spacing: Steps | None
    orientation: str | None
    rejected: Affine | None = None
    note: str = ""
    unit: str = ""


def grid_of(path: Path, header: Any, shape: tuple[int, int, int], stored: Steps) -> Grid:
    """What a header says of its grid; see the rules at the top.

    stored: pixdim before nibabel's repairs.

    Raises:
        DataError: a spacing that is not finite.
    """
    code = int(header["xyzt_units"]) & 7
    unit, name = _UNIT_IN_MM.get(code, 1.0), _UNIT_NAMES.get(code, "")
    in_mm = np.diag([unit, unit, unit, 1.0])
    pixdim = tuple(abs(step) for step in stored) if all(stored) else None
    sform = _matrix(header.get_sform)
    qform = _matrix(header.get_qform) if pixdim else None
    chosen, rejected, note = (sform if sform is not None else qform), None, ""
    if sform is not None and pixdim and np.isfinite(pixdim).all():
        known = qform is not None or pixdim != (1, 1, 1)
        scale = np.linalg.norm(sform[:3, :3], axis=0)
        if known and not np.allclose(scale, pixdim, rtol=SCALE_TOLERANCE, atol=0):
            says = " x ".join(f"{step:.4g}" for step in scale)
            takes = " x ".join(f"{step:.4g}" for step in pixdim)
            note = f"the sform says voxels of {says}, the qform and pixdim {takes}, which is taken"
            chosen, rejected = _rescaled(sform, scale, pixdim) if qform is None else qform, sform
    if chosen is None:
        steps = None if pixdim == (1, 1, 1) else pixdim
        chosen, orientation = np.asarray(header.get_best_affine(), dtype=np.float64), None
    else:
        steps = tuple(float(step) for step in np.linalg.norm(chosen[:3, :3], axis=0))
        orientation = "".join(nib.aff2axcodes(chosen))  # type: ignore[no-untyped-call]
    spacing = None if steps is None else _spacing(path, steps, unit)
    other = None if rejected is None else in_mm @ rejected
    return Grid(shape, in_mm @ chosen, spacing, orientation, other, note, name)


def _matrix(get: Any) -> Affine | None:
    """A matrix that has a code and says something."""
    try:
        matrix, _ = get(coded=True)
    except (HeaderDataError, ValueError):  # a quaternion that is none
        return None
    if matrix is None or not np.isfinite(matrix).all() or not abs(np.linalg.det(matrix)) > 0:
        return None
    if None in nib.aff2axcodes(matrix):  # type: ignore[no-untyped-call]  # axes of nearly no length
        return None
    # nibabel and SimpleITK write an identity (theirs is in LPS) with a code > 0 when they know
    # nothing: unit voxels, no rotation, origin exactly 0. No scanner produces that.
    default = not matrix[:3, 3].any() and (np.abs(matrix[:3, :3]) == np.eye(3)).all()
    return None if default else np.asarray(matrix, dtype=np.float64)


def _rescaled(affine: Affine, scale: npt.NDArray[Any], steps: tuple[float, ...]) -> Affine:
    return affine @ np.diag([*(np.asarray(steps) / scale), 1.0])


def _spacing(path: Path, steps: tuple[float, ...], unit: float) -> Steps:
    # Headers hold float32: 1.5 rotated comes back as 1.49999999, and means 1.5.
    x, y, z = (float(f"{step * unit:.6g}") for step in steps)
    if not all(np.isfinite(step) and step > 0 for step in (x, y, z)):
        raise DataError(f"{path}: voxel spacing {(x, y, z)} mm; expected positive numbers")
    return x, y, z


def on_grid(
    path: Path, labels: npt.NDArray[Any], own: Grid, image: Grid
) -> tuple[npt.NDArray[Any], str]:
    """A label map (X, Y, Z) turned to its image's axes, and a note on it, or "".

    Axes in another order or direction are turned back. Where one of the two headers does not
    record a place, the voxels are taken as they lie.

    Raises:
        DataError: another shape or spacing, or voxels that do not fall on those of the image.
    """
    if own.orientation is None or image.orientation is None:
        if own.shape != image.shape:
            raise _other_shape(path, own, image)
        if own.spacing and image.spacing and not _close(own.spacing, image.spacing):
            raise DataError(
                f"{path}: voxels of {own.spacing} mm, but its image's are {image.spacing} mm; "
                "correct the header that is wrong"
            )
        if own.orientation == image.orientation:  # None
            return labels, ""
        which = "label map" if own.orientation is None else "image"
        return labels, f"the {which}'s header records no place, so labels are taken as they lie"
    errors = []
    for mine, its in itertools.product(_affines(own), _affines(image)):
        try:
            return _turned(path, labels, mine, its, image.shape), ""
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _affines(grid: Grid) -> list[Affine]:
    """The affine; also the one not believed, for a partner that was made from that one."""
    return [grid.affine] if grid.rejected is None else [grid.affine, grid.rejected]


def _turned(
    path: Path, labels: npt.NDArray[Any], own: Affine, image: Affine, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    to_image = np.linalg.inv(image) @ own  # label voxels to image voxels
    follows = [int(axis) for axis in np.abs(to_image[:3, :3]).argmax(axis=0)]
    if sorted(follows) != [0, 1, 2]:
        raise DataError(f"{path}: turned against its image; resample it onto the image's grid")
    axes = [follows.index(axis) for axis in range(3)]
    turned = labels.transpose(axes)
    if turned.shape != shape:
        got = f"shape {labels.shape} does not fit the image's {shape}"
        raise DataError(f"{path}: {got}, with axes in any order; resample it onto the image")
    # What voxel of the label map each voxel of the turned one is.
    source = np.zeros((4, 4))
    source[3, 3] = 1
    steps = [slice(None)] * 3
    for axis, old in enumerate(axes):
        back = to_image[axis, old] < 0
        source[old, axis] = -1 if back else 1
        source[old, 3] = shape[axis] - 1 if back else 0
        steps[axis] = slice(None, None, -1) if back else slice(None)
    off = to_image @ source - np.eye(4)
    off[:, :3] *= np.array(shape) > 1  # how thick a single slice is decides nothing
    corners = np.array([(*c, 1) for c in itertools.product(*[(0, n - 1) for n in shape])])
    far = float(np.abs(corners @ off[:3].T).max())
    if np.abs(off[:3, :3]).max() > STEP_TOLERANCE or far > CORNER_TOLERANCE:
        raise DataError(
            f"{path}: its header puts it up to {far:.3g} voxels away from its image; expected the "
            f"image's grid, with axes in any order; correct the header that is wrong, or resample"
        )
    return np.ascontiguousarray(turned[tuple(steps)])


def _other_shape(path: Path, own: Grid, image: Grid) -> DataError:
    return DataError(f"{path}: shape {own.shape} does not fit the image's {image.shape}")


def _close(one: Steps, other: Steps) -> bool:
    return bool(np.allclose(one, other, rtol=SCALE_TOLERANCE, atol=0))
