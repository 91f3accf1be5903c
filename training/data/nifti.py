"""Reading and writing NIfTI: every unusable file becomes a one-line DataError naming it."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt

from ..files import write_atomically

MAX_EXTENT = 4096  # voxels per axis: no scanner reaches it, a corrupt header does
MAX_VOXELS = 2**31
GZIP_MAX_RATIO = 1040  # deflate cannot shrink bytes further (1032:1, and some slack)
MAX_OFFSET = 2**24  # bytes before the voxels: header extensions are a few kB
MAX_EXTENSIONS = 1000
SHOWN_PROBLEMS = 20

Spacing = tuple[float, float, float]
_UNIT_IN_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: metre, mm, micron; others count as mm


class DataError(ValueError):
    """The data cannot be used as they are; the message says what to do."""


def raise_problems(title: str, problems: Sequence[str]) -> None:
    """Raise one DataError that lists all problems, one per line; nothing happens without any.

    Raises:
        DataError: there is a problem; at most 20 are shown, then how many are left.
    """
    if not problems:
        return
    lines = [title, *(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - SHOWN_PROBLEMS} more")
    raise DataError("\n".join(lines))


@dataclass(frozen=True)
class Volume:
    """One image or label map with what its header says.

    array: (X, Y, Z) or (X, Y, Z, T) as stored, after scl_slope and scl_inter; float32 images,
        uint8 labels.
    affine: (4, 4), voxel to world, in the header's own unit.
    spacing: mm per voxel along X, Y, Z; None when the header does not record it.
    orientation: where the axes point, "RAS" or "LPS" for example; None when not recorded.
    """

    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    spacing: Spacing | None
    orientation: str | None
    header: Any  # nibabel.Nifti1Header


def read_image(path: str | Path, *, ndim: int = 3, time_index: int | None = None) -> Volume:
    """Read an image as float32.

    ndim: 3 or 4 dimensions expected; singletons behind them are dropped.
    time_index: read only this frame of a 4D file; the array is (X, Y, Z).

    Raises:
        DataError: the file is missing, damaged, not NIfTI, of another shape, or not finite.
    """
    path = Path(path)
    image, shape = _open(path, 4 if time_index is not None else ndim)
    if time_index is not None and not 0 <= time_index < shape[3]:
        raise DataError(f"{path}: frame {time_index} asked for, but it has {shape[3]} frames")
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # the finite check below reports it
            # A frame alone is cut out of the file; float64 from scl_slope ends at once.
            stored = image.dataobj[..., time_index] if time_index is not None else image.dataobj
            array = np.asarray(stored, dtype=np.float32)
        if time_index is None:
            _check_sum(path, array.size * image.get_data_dtype().itemsize)
    except Exception as error:  # zlib, gzip, struct, OS, NumPy: nibabel lets all of them through
        raise _unreadable(path, error) from error
    array = array.reshape(shape[:3] if time_index is not None else shape)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise DataError(f"{path}: {bad} of {array.size} voxels are NaN or infinite as float32")
    return _volume(path, image, array)


def read_labels(
    path: str | Path, *, max_label: int, above: Literal["background", "error"] = "error"
) -> Volume:
    """Read a label map (X, Y, Z) as uint8.

    max_label: the highest class index in use.
    above: what a larger value is: an "error", or another structure and so "background" (0).

    Raises:
        DataError: as read_image; also a value that is not an integer, negative, or too large.
    """
    path = Path(path)
    if not 0 < max_label < 255:
        raise ValueError(f"expected max_label in 1..254, got {max_label}")
    if above not in ("background", "error"):
        raise ValueError(f"expected above='background' or 'error', got {above!r}")
    image, shape = _open(path, 3)
    try:
        # Without scl_slope this keeps the stored integer type, small for large CT.
        stored = np.asanyarray(image.dataobj).reshape(shape)
        _check_sum(path, stored.size * image.get_data_dtype().itemsize)
    except Exception as error:  # as in read_image
        raise _unreadable(path, error) from error
    if stored.dtype.kind == "f":
        if not np.isfinite(stored).all():
            raise DataError(f"{path}: a label map has NaN or infinite values; expected integers")
        if not (stored == np.rint(stored)).all():
            raise DataError(
                f"{path}: a label map has fractions; expected integers 0..{max_label}, "
                "so resample labels with nearest neighbour"
            )
    low, high = stored.min(), stored.max()
    if low < 0:
        raise DataError(f"{path}: label {low:g} found; expected integers 0..{max_label}")
    if high > max_label:
        if above == "error":
            raise DataError(f"{path}: label {high:g} found; expected integers 0..{max_label}")
        stored = np.where(stored > max_label, 0, stored)
    return _volume(path, image, stored.astype(np.uint8))


def image_shape(path: str | Path, *, ndim: int = 3) -> tuple[int, ...]:
    """Shape by the header alone, with the checks of read_image that need no voxel.

    Raises:
        DataError: the header is missing, damaged or absurd.
    """
    return _open(Path(path), ndim)[1]


def write_labels(path: str | Path, labels: npt.NDArray[Any], like: Volume) -> None:
    """Write labels (X, Y, Z) as uint8 NIfTI with the affine, spacing, codes and units of `like`.

    The file appears whole or not at all: it is written beside its place and renamed.

    Raises:
        DataError: another shape than `like`, values outside 0..255, or the disk refuses.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if labels.shape != like.array.shape[:3]:
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
    image: Any = kind(as_bytes, like.affine, header)  # type: ignore[no-untyped-call]
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        # No time stamp: equal labels give equal files.
        content = gzip.compress(content, compresslevel=1, mtime=0)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {_one_line(error)}") from error


def _open(path: Path, ndim: int) -> tuple[Any, tuple[int, ...]]:
    """Open a file and check its header; no voxel is read."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
        size = path.stat().st_size
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a NIfTI file, .nii or .nii.gz")
    if size == 0:
        raise DataError(f"{path}: the file is empty; copy it again")
    try:
        _check_header(path)
        image: Any = nib.load(path)  # one file object per access: nothing stays open
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
    while len(dims) > ndim and dims[-1] == 1:
        dims = dims[:-1]
    if len(dims) != ndim:
        raise DataError(f"{path}: expected {ndim} dimensions, got shape {shape}")
    if any(not 0 < extent <= MAX_EXTENT for extent in dims) or math.prod(dims) > MAX_VOXELS:
        raise DataError(
            f"{path}: shape {shape} is absurd; expected 1..{MAX_EXTENT} voxels per axis "
            f"and at most {MAX_VOXELS} in all"
        )
    promised = math.prod(dims) * kind.itemsize
    if promised > size * (GZIP_MAX_RATIO if path.name.endswith(".gz") else 1):
        raise DataError(
            f"{path}: truncated: the header promises {promised} bytes of voxels, "
            f"the file has {size}; copy it again"
        )
    flat = not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0
    # Axes that differ by many orders of magnitude are none to nibabel either.
    if flat or None in nib.aff2axcodes(affine):  # type: ignore[no-untyped-call]
        raise DataError(f"{path}: the affine is not finite or not invertible; repair the header")
    return image, dims


def _check_header(path: Path) -> None:
    """Refuse headers that nibabel repairs by guessing, and extensions that are not before the
    voxels: it believes their sizes, and from 1 MB of gzip takes gigabytes into memory.
    """
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        head = file.read(544)
        order, length, ndim = next(
            (
                (order, length, struct.unpack_from(f"{order}{dim}", head, at)[0])
                for order in "<>"
                for length, dim, at in ((348, "h", 40), (540, "q", 16))
                if len(head) >= length + 4 and head[:4] == struct.pack(f"{order}i", length)
            ),
            ("", 0, 0),
        )
        if not 1 <= ndim <= 7:
            raise DataError(
                f"{path}: not a readable NIfTI file: it does not begin with a header of 348 or 540 "
                f"bytes and 1 to 7 dimensions"
            )
        where = (f"{order}f", 108) if length == 348 else (f"{order}q", 168)
        offset = struct.unpack_from(where[0], head, where[1])[0]
        if not 0 <= offset <= MAX_OFFSET:  # NaN too
            raise DataError(
                f"{path}: the header puts the voxels at byte {offset}; expected at most "
                f"{MAX_OFFSET}"
            )
        if head[length] == 0:
            return
        at, count = length + 4, 0
        while count == 0 or offset - at >= 16:
            file.seek(at)
            described = file.read(4)
            size = struct.unpack(f"{order}i", described)[0] if len(described) == 4 else 0
            at, count = at + size, count + 1
            if size < 8 or at > offset or count > MAX_EXTENSIONS:
                raise DataError(
                    f"{path}: damaged: extension {count} of the header has {size} bytes, and the "
                    f"voxels begin at byte {offset:g}"
                )


def _check_sum(path: Path, end: int) -> None:
    """Read a gzip file to its checksum, which nibabel never reaches: it stops at the last voxel.

    end: bytes in use; a file that goes on for long after them is not read to its end.
    """
    if not path.name.endswith(".gz"):
        return
    with gzip.open(path) as file:
        left = end + MAX_OFFSET
        while left > 0 and (block := file.read(1 << 20)):
            left -= len(block)


def _volume(path: Path, image: Any, array: npt.NDArray[Any]) -> Volume:
    """Attach the header, and decide what of it is recorded and what is only a default."""
    header, affine = image.header, np.asarray(image.affine, dtype=np.float64)
    pixdim = [abs(float(step)) for step in header["pixdim"][1:4]]
    coded = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    # nibabel and SimpleITK write an identity (theirs is in LPS) with a code > 0 when they know
    # nothing: unit voxels, no rotation, origin exactly 0. No scanner produces that.
    if coded and not affine[:3, 3].any() and (np.abs(affine[:3, :3]) == np.eye(3)).all():
        coded = False
    steps = [float(step) for step in np.linalg.norm(affine[:3, :3], axis=0)] if coded else pixdim
    axes = nib.aff2axcodes(affine)  # type: ignore[no-untyped-call]
    orientation = "".join(axes) if coded else None
    if not coded and steps == [1.0, 1.0, 1.0]:
        return Volume(array, affine, None, orientation, header)
    unit = _UNIT_IN_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    # Headers hold float32: 1.5 rotated comes back as 1.49999999, and means 1.5.
    x, y, z = (float(f"{step * unit:.6g}") for step in steps)
    spacing = (x, y, z)
    if not all(math.isfinite(step) and step > 0 for step in spacing):
        raise DataError(f"{path}: voxel spacing {spacing} mm; expected positive numbers")
    return Volume(array, affine, spacing, orientation, header)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, MemoryError):
        return DataError(f"{path}: its voxels do not fit in memory: {_one_line(error)}")
    return DataError(f"{path}: not a readable NIfTI file: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
