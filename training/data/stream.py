"""The bytes of a NIfTI file, looked at before nibabel believes them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import IO, Any

import nibabel as nib

from .errors import DataError

MAX_OFFSET = 2**24  # bytes before the voxels: header extensions are a few kB
MAX_EXTENSIONS = 1000
_GZIP = b"\x1f\x8b"

Steps = tuple[float, float, float]


def is_gzip(path: Path) -> bool:
    """Whether the content is compressed, whatever the file is called."""
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def opened(path: Path) -> IO[bytes]:
    """The content, decompressed where it is compressed."""
    return gzip.open(path) if is_gzip(path) else path.open("rb")  # type: ignore[return-value]


def load(path: Path) -> Any:
    """nibabel's image. It goes by the name: a compressed file called .nii is handed to it open."""
    if is_gzip(path) == path.name.endswith(".gz"):
        return nib.load(path)  # one file object per access: nothing stays open
    with opened(path) as file:
        size = file.read(4)
    kind = nib.Nifti1Image if 348 in _integers(size) else nib.Nifti2Image
    return kind.from_stream(opened(path))  # type: ignore[arg-type]  # closed with the image


def check_header(path: Path) -> Steps:
    """Refuse headers that nibabel repairs by guessing, and extensions that are not before the
    voxels: it believes their sizes, and from 1 MB of gzip takes gigabytes into memory.

    Returns: pixdim along the first three axes as it is stored; nibabel makes 1 of 0.
    """
    with opened(path) as file:
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
        if head[length]:
            _check_extensions(path, file, order, length + 4, offset)
    x, y, z = struct.unpack_from(
        *((f"{order}3f", head, 80) if length == 348 else (f"{order}3d", head, 112))
    )
    return x, y, z


def _check_extensions(path: Path, file: IO[bytes], order: str, at: int, offset: float) -> None:
    count = 0
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


def check_sum(path: Path, end: int) -> None:
    """Read a gzip file to its checksum, which nibabel never reaches: it stops at the last voxel.

    end: bytes in use; a file that goes on for long after them is not read to its end.
    """
    if not is_gzip(path):
        return
    with gzip.open(path) as file:
        left = end + MAX_OFFSET
        while left > 0 and (block := file.read(1 << 20)):
            left -= len(block)


def _integers(four: bytes) -> tuple[int, ...]:
    """Four bytes as an integer in either order."""
    return tuple(int.from_bytes(four, order) for order in ("little", "big"))
