"""Reading and writing NIfTI: every unusable file becomes a one-line DataError naming it."""

from __future__ import annotations

import gzip
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from salkernels._shared.files import write_atomically

from .errors import DataError as DataError  # the name that everyone imports from here
from .errors import raise_problems as raise_problems
from .grid import Grid, grid_of
from .stream import Steps, check_header, is_gzip, load
from .stream import check_sum as _check_sum

MAX_EXTENT = 4096  # voxels per axis: no scanner reaches it, a corrupt header does
MAX_VOXELS = 2**31
GZIP_MAX_RATIO = 1040  # deflate cannot shrink bytes further (1032:1, and some slack)
ROUNDING = 0.01  # of a label: scl_slope makes 1.00000002 of 1, and 850.006 of 850 in 16 bits
SHOWN_VALUES = 5

Spacing = tuple[float, float, float]
Values = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Volume:
    """One image or label map with what its header says.

    array: (X, Y, Z) or (X, Y, Z, T) as stored, after scl_slope and scl_inter; float32 images,
        uint8 labels.
    affine: (4, 4), voxel to world in mm, as `grid` says which of the header's is believed.
    spacing: mm per voxel along X, Y, Z; None when the header does not record it.
    orientation: where the axes point, "RAS" or "LPS" for example; None when not recorded.
    """

    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    spacing: Spacing | None
    orientation: str | None
    header: Any  # nibabel.Nifti1Header
    grid: Grid | None = None  # all that the header says; None where a volume was made in memory
    notes: tuple[str, ...] = ()  # what the user should know of it


def read_image(path: str | Path, *, ndim: int = 3, time_index: int | None = None) -> Volume:
    """Read an image as float32.

    ndim: 3 or 4 dimensions expected; singletons behind them are dropped.
    time_index: read only this frame of a 4D file; the array is (X, Y, Z).

    Raises:
        DataError: the file is missing, damaged, not NIfTI, of another shape, or not finite.
    """
    path = Path(path)
    image, shape, steps = _open(path, 4 if time_index is not None else ndim)
    stored = _frame(path, image, shape, time_index)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the finite check below reports it
            # float64 from scl_slope ends at once.
            array = np.asarray(stored(), dtype=np.float32)
        if time_index is None:
            _check_sum(path, array.size * image.get_data_dtype().itemsize)
    except Exception as error:  # zlib, gzip, struct, OS, NumPy: nibabel lets all of them through
        raise _unreadable(path, error) from error
    array = array.reshape(shape[:3] if time_index is not None else shape)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise DataError(f"{path}: {bad} of {array.size} voxels are NaN or infinite as float32")
    return _volume(path, image, array, steps)


def read_labels(
    path: str | Path,
    *,
    max_label: int,
    above: Literal["background", "error"] = "error",
    values: Values | None = None,
    time_index: int | None = None,
) -> Volume:
    """Read a label map (X, Y, Z) as uint8.

    max_label: the highest class index in use.
    above: what another value is: an "error", or another structure and so "background" (0).
    values: the stored values of each class, background first; without, a class is its own value.
    time_index: take this frame where the label map is 4D; a 3D one is that of the frame.

    Raises:
        DataError: as read_image; also a value that is not an integer, or stands for no class.
    """
    path = Path(path)
    if not 0 < max_label < 255:
        raise ValueError(f"expected max_label in 1..254, got {max_label}")
    if above not in ("background", "error"):
        raise ValueError(f"expected above='background' or 'error', got {above!r}")
    image, shape, steps = _open(path, *((3,) if time_index is None else (3, 4)))
    frame = time_index if len(shape) == 4 else None
    stored = _frame(path, image, shape, frame)
    try:
        # Without scl_slope this keeps the stored integer type, small for large CT.
        array = np.asanyarray(stored()).reshape(shape[:3])
        if frame is None:
            _check_sum(path, array.size * image.get_data_dtype().itemsize)
    except Exception as error:  # as in read_image
        raise _unreadable(path, error) from error
    if array.dtype.kind == "f":
        array = _whole(path, array, max_label)
    classes = _classes(path, array, max_label, above, values)
    return _volume(path, image, classes, steps)


def _frame(path: Path, image: Any, shape: tuple[int, ...], time_index: int | None) -> Any:
    """A function that reads the voxels, of one frame only where one is named."""
    if time_index is None:
        return lambda: image.dataobj
    if not 0 <= time_index < shape[3]:
        raise DataError(f"{path}: frame {time_index} asked for, but it has {shape[3]} frames")
    return lambda: image.dataobj[..., time_index]


def _whole(path: Path, array: npt.NDArray[Any], max_label: int) -> npt.NDArray[Any]:
    """The integers that a scaled label map means."""
    if not np.isfinite(array).all():
        raise DataError(f"{path}: a label map has NaN or infinite values; expected integers")
    whole = np.rint(array)
    if np.abs(array - whole).max() > ROUNDING:
        raise DataError(
            f"{path}: a label map has fractions; expected integers 0..{max_label}, "
            "so resample labels with nearest neighbour"
        )
    return whole


def _classes(
    path: Path,
    stored: npt.NDArray[Any],
    max_label: int,
    above: Literal["background", "error"],
    values: Values | None,
) -> npt.NDArray[np.uint8]:
    """Stored values to classes."""
    if values is None:
        low, high = stored.min(), stored.max()
        if low >= 0 and high <= max_label:
            return stored.astype(np.uint8)
        if low < 0 or above == "error":
            raise DataError(
                f"{path}: label {low if low < 0 else high:g} found; expected integers "
                f"0..{max_label}, or 'values' in a manifest that says what stands for which class"
            )
        return np.where(stored > max_label, 0, stored).astype(np.uint8)
    classes = np.zeros(stored.shape, dtype=np.uint8)
    for label, of_class in enumerate(values):
        if label:
            classes[np.isin(stored, of_class)] = label
    if above == "error":
        rest = stored[classes == 0]
        if (other := np.setdiff1d(rest, values[0])).size:
            shown = ", ".join(f"{value:g}" for value in other[:SHOWN_VALUES])
            raise DataError(
                f"{path}: {shown} found, which stand for no class; expected the 'values' of the "
                f"manifest, or above_max 'background'"
            )
    return classes


def image_shape(path: str | Path, *, ndim: int = 3) -> tuple[int, ...]:
    """Shape by the header alone, with the checks of read_image that need no voxel.

    Raises:
        DataError: the header is missing, damaged or absurd.
    """
    return _open(Path(path), ndim)[1]


def frame_count(path: str | Path) -> int | None:
    """Frames of a 4D file, None of a volume; errors as image_shape."""
    shape = _open(Path(path), 3, 4)[1]
    return shape[3] if len(shape) == 4 else None


def image_grid(path: str | Path, *, ndim: int = 3) -> Grid:
    """Where a file's voxels lie, by the header alone; errors as image_shape."""
    image, (x, y, z, *_), steps = _open(Path(path), ndim)
    return grid_of(Path(path), image.header, (x, y, z), steps)


def write_labels(path: str | Path, labels: npt.NDArray[Any], like: Volume) -> None:
    """Write labels (X, Y, Z) or (X, Y, Z, T) as uint8 NIfTI with the grid and units of `like`.

    The file appears whole or not at all: it is written beside its place and renamed.

    Raises:
        DataError: another shape than `like`, values outside 0..255, or the disk refuses.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if labels.shape[:3] != like.array.shape[:3] or labels.ndim not in (3, 4):
        raise DataError(
            f"{path}: labels have shape {labels.shape}, the image {like.array.shape[:3]}"
        )
    as_bytes = labels.astype(np.uint8)
    if not np.array_equal(as_bytes, labels):
        raise DataError(f"{path}: labels must be integers 0..255")
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0  # the image's grey window would hide the classes
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image: Any = kind(as_bytes, header.get_best_affine(), header)  # type: ignore[no-untyped-call]
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        # No time stamp: equal labels give equal files.
        content = gzip.compress(content, compresslevel=1, mtime=0)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {_one_line(error)}") from error


def _open(path: Path, *ndims: int) -> tuple[Any, tuple[int, ...], Steps]:
    """Open a file and check its header; no voxel is read.

    ndims: dimensions that will do; singletons behind the fewest are dropped.
    Returns: nibabel's image, its shape, and pixdim as stored.
    """
    size = _size(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a NIfTI file, .nii or .nii.gz")
    if size == 0:
        raise DataError(f"{path}: the file is empty; copy it again")
    try:
        steps = check_header(path)
        image: Any = load(path)
        shape = tuple(int(extent) for extent in image.shape)
        kind = image.get_data_dtype()
        affine = np.asarray(image.affine, dtype=np.float64)
    except DataError:
        raise
    except Exception as error:  # nibabel's own errors share no base, and others pass through
        raise _unreadable(path, error) from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one too
        raise DataError(f"{path}: expected NIfTI, got {type(image).__name__}")
    if kind.kind not in "iuf":
        name = "RGB" if kind.names else str(kind)
        raise DataError(f"{path}: expected real numbers, one per voxel; got voxels of type {name}")
    dims = shape
    while len(dims) > min(ndims) and dims[-1] == 1:
        dims = dims[:-1]
    if len(dims) not in ndims:
        hint = "; name one frame by time_index in a manifest" if len(dims) == 4 else ""
        wanted = " or ".join(map(str, ndims))
        raise DataError(f"{path}: expected {wanted} dimensions, got shape {shape}{hint}")
    if any(not 0 < extent <= MAX_EXTENT for extent in dims) or math.prod(dims) > MAX_VOXELS:
        raise DataError(
            f"{path}: shape {shape} is absurd; expected 1..{MAX_EXTENT} voxels per axis "
            f"and at most {MAX_VOXELS} in all"
        )
    promised = math.prod(dims) * kind.itemsize
    if promised > size * (GZIP_MAX_RATIO if is_gzip(path) else 1):
        raise DataError(
            f"{path}: truncated: the header promises {promised} bytes of voxels, "
            f"the file has {size}; copy it again"
        )
    flat = not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0
    # Axes that differ by many orders of magnitude are none to nibabel either.
    if flat or None in nib.aff2axcodes(affine):  # type: ignore[no-untyped-call]
        raise DataError(f"{path}: the affine is not finite or not invertible; repair the header")
    return image, dims, steps


def _size(path: Path) -> int:
    try:
        found = os.stat(path)
    except (FileNotFoundError, ValueError) as error:  # the latter of NUL in a name
        raise DataError(f"{path}: no such file") from error
    except OSError as error:  # a folder that may not be entered, a name that is too long, a loop
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise DataError(f"{path}: is {what}, not a file")
    return found.st_size


def _volume(path: Path, image: Any, array: npt.NDArray[Any], steps: Steps) -> Volume:
    x, y, z = array.shape[:3]
    grid = grid_of(path, image.header, (x, y, z), steps)
    notes = (grid.note,) if grid.note else ()
    return Volume(array, grid.affine, grid.spacing, grid.orientation, image.header, grid, notes)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, MemoryError):
        return DataError(f"{path}: its voxels do not fit in memory: {_one_line(error)}")
    return DataError(f"{path}: not a readable NIfTI file: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
