"""Some thousand damaged, absurd and hostile NIfTI files, and a program that reads them all.

    python nifti_corpus.py FOLDER MEGABYTES

reads every file of the folder with no more than MEGABYTES of memory above what the program has
itself, and prints one line of JSON for each: name, outcome, message, seconds.
"""

from __future__ import annotations

import gzip
import json
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (5, 6, 4)
NAN, INF = float("nan"), float("inf")


def good(endian: str = "<", version: int = 1) -> tuple[bytes, bytes]:
    """Header with its four flag bytes, and voxels, of a file that is right."""
    voxels = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(f"{endian}i2")
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=endian)
    header.set_data_shape(SHAPE)
    header.set_data_dtype(voxels.dtype)
    affine = np.diag([-1.5, -2.0, 8.0, 1.0])
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    length = 348 if version == 1 else 540
    header["magic"] = b"n+1" if version == 1 else b"n+2"
    header["vox_offset"] = length + 4
    return header.binaryblock + bytes(4), voxels.tobytes(order="F")


FIELDS: dict[str, list] = {
    "sizeof_hdr": [0, 1, 349, 540, -1, 2**31 - 1],
    "datatype": [0, 1, 3, 32, 128, 1536, 1792, 2048, 2304, 9999, -1],
    "bitpix": [0, 7, 64, -16],
    "vox_offset": [0, 3, 340, 352.5, -352, 1e6, 2**31, 1e30, -1e30, NAN, INF, -INF],
    "scl_slope": [0, 1e-45, 1e38, NAN, INF, -INF],
    "scl_inter": [1e38, NAN, INF],
    "magic": [b"", b"ni1", b"n+2", b"n-1", b"\xff\xff\xff\xff", b"n+1x"],
    "qform_code": [-1, 99],
    "sform_code": [-1, 99],
    "xyzt_units": [255, 7],
    "dim_info": [255],
}
DIMS: list[tuple[int, ...]] = [
    (3, 32767, 32767, 32767),
    (3, 32767, 1, 1),
    (3, 4096, 4096, 4),
    (3, 5, -6, 4),
    (3, -5, -6, -4),
    (3, 0, 6, 4),
    (3, 0, 0, 0),
    (-1, 5, 6, 4),
    (0, 5, 6, 4),
    (8, 5, 6, 4),
    (32767, 5, 6, 4),
    (1, 5),
    (2, 5, 24),
    (4, 5, 6, 2, 2),
    (4, 5, 6, 4, 1),
    (5, 5, 6, 2, 1, 2),
    (5, 5, 6, 4, 1, 1),
    (7, 5, 6, 4, 1, 1, 1, 1),
    (7, 1, 1, 1, 1, 1, 1, 120),
]
ROWS = [(NAN,) * 4, (INF, 0, 0, 0), (0,) * 4, (1e38, 1e38, 0, 0), (1e-30, 0, 0, 0)]
EXTENSION_SIZES = [0, 1, 7, 8, 12, 16, -8, -16, 2**31 - 1, -(2**31), 10**9]


def edited(endian: str, version: int, edit) -> bytes:
    """A file whose header an edit has changed in place."""
    head, voxels = good(endian, version)
    kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
    header = kind(head[:-4], endianness=endian, check=False)
    with np.errstate(all="ignore"):
        edit(header._structarr)
    return header.binaryblock + bytes(4) + voxels


def set_field(name: str, value):
    def edit(record) -> None:
        kind = record[name].dtype.kind
        record[name] = np.array(value).astype(record[name].dtype) if kind in "iuf" else value

    return edit


def set_dims(dims: tuple[int, ...]):
    def edit(record) -> None:
        record["dim"] = 1
        record["dim"][: len(dims)] = dims

    return edit


def headers() -> Iterator[tuple[str, bytes]]:
    for endian, version in (("<", 1), (">", 1), ("<", 2)):
        tag = f"{'le' if endian == '<' else 'be'}{version}"
        edits = [(f"{n}-{i}", set_field(n, v)) for n in FIELDS for i, v in enumerate(FIELDS[n])]
        edits += [(f"dim-{i}", set_dims(dims)) for i, dims in enumerate(DIMS)]
        for i, row in enumerate(ROWS):
            edits += [(f"{n}-{i}", set_field(n, row)) for n in ("srow_x", "srow_z")]
        for i, steps in enumerate((NAN, INF, 0, -1, 1e30)):
            edits.append((f"pixdim-{i}", set_field("pixdim", (steps,) * 8)))
            edits.append((f"quatern-{i}", set_field("quatern_b", steps)))
        for name, edit in edits:
            yield f"{tag}-{name}", edited(endian, version, edit)
        head, voxels = good(endian, version)
        for i, size in enumerate(EXTENSION_SIZES):
            for offset in (0, len(head), len(head) + 16, len(head) + 4096):
                block = struct.pack(f"{endian}ii", size, 6) * 32
                field = set_field("vox_offset", offset)
                raw = bytearray(edited(endian, version, field)[: len(head)])
                raw[len(head) - 4] = 1
                yield f"{tag}-extension-{i}-{offset}", bytes(raw) + block + voxels
        other = np.frombuffer(head[: len(head) - 4], np.uint8).reshape(-1, 2)[:, ::-1].tobytes()
        yield f"{tag}-swapped-pairs", other + head[-4:] + voxels


def flips(raw: bytes, low: int, high: int, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(seed)
    for i in range(count):
        damaged = bytearray(raw)
        for _ in range(1 + i % 3):
            damaged[int(rng.integers(low, high))] ^= int(rng.integers(1, 256))
        yield f"flip-{i}", bytes(damaged)


def bombs() -> Iterator[tuple[str, bytes]]:
    """4 GB of zeros in 4 MB of gzip: members of 16 MB, one after the other."""
    member = gzip.compress(bytes(2**24), 9)
    head, voxels = good()
    tail = member * 256
    yield "bomb-behind", gzip.compress(head + voxels) + tail
    yield "bomb-alone", tail
    for i, dims in enumerate([(3, 1024, 1024, 1024), (3, 4096, 4096, 128), (3, 4096, 1024, 256)]):
        yield f"bomb-voxels-{i}", gzip.compress(edited("<", 1, set_dims(dims))[:352]) + tail
    for i, (size, offset) in enumerate([(-8, 400), (2**31 - 1, 400), (0, 0), (8, 1e9), (16, 2e9)]):
        raw = bytearray(edited("<", 1, set_field("vox_offset", offset))[:352])
        raw[348] = 1
        yield f"bomb-extension-{i}", gzip.compress(bytes(raw) + struct.pack("<ii", size, 6)) + tail
    raw = bytearray(edited("<", 1, set_field("sizeof_hdr", 0))[:352])
    raw[348] = 1
    yield "bomb-repaired", gzip.compress(bytes(raw) + struct.pack("<ii", -8, 6)) + tail
    raw = bytearray(edited("<", 1, set_field("vox_offset", 1e4))[:352])
    raw[40:42], raw[348] = raw[40:42][::-1], 1  # nibabel takes this one for big-endian
    yield "bomb-other-order", gzip.compress(bytes(raw) + struct.pack("<ii", -8, 6)) + tail
    far = edited("<", 1, set_field("vox_offset", 3e9))
    yield "bomb-offset", gzip.compress(far) + tail


def write(folder: Path) -> int:
    """Writes the corpus; returns how many files there are."""
    head, voxels = good()
    raw = head + voxels
    packed = gzip.compress(raw, mtime=0)
    files: dict[str, bytes] = {"right.nii": raw, "right.nii.gz": packed}
    for i in range(0, len(raw), 5):
        files[f"cut-{i}.nii"] = raw[:i]
    for i in range(len(packed)):
        files[f"cut-{i}.nii.gz"] = packed[:i]
    for name, content in headers():
        files[f"{name}.nii"] = content
        files[f"{name}.nii.gz"] = gzip.compress(content, 1)
    for name, content in flips(raw, 0, 352, 800, 1):
        files[f"header-{name}.nii"] = content
    for name, content in flips(raw, 0, 352, 200, 2):
        files[f"header-{name}.nii.gz"] = gzip.compress(content, 1)
    for name, content in flips(packed, 10, len(packed), 600, 3):
        files[f"stream-{name}.nii.gz"] = content
    rng = np.random.default_rng(4)
    for i in range(20):
        files[f"noise-{i}.nii"] = rng.bytes(400 + 100 * i)
        files[f"noise-{i}.nii.gz"] = b"\x1f\x8b\x08" + rng.bytes(400 + 100 * i)
    files["not-compressed.nii.gz"] = raw
    files["compressed.nii"] = packed
    files["zlib.nii.gz"] = zlib.compress(raw)
    files["twice.nii.gz"] = gzip.compress(packed)
    files.update({f"{name}.nii.gz": content for name, content in bombs()})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return len(files)


def main(folder: Path, megabytes: int) -> None:
    import logging
    import resource

    logging.disable()  # nibabel tells of every header that it mends
    from salkernels.training.data.nifti import DataError, read_image, read_labels

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in sorted(folder.iterdir()):
        for read in (read_image, lambda p: read_labels(p, max_label=3, above="background")):
            start, message = time.monotonic(), ""
            try:
                volume = read(path)
                outcome = "read" if np.isfinite(volume.array).all() else "read, not finite"
                message = str(zlib.crc32(np.ascontiguousarray(volume.array)))
            except DataError as error:
                outcome, message = "DataError", str(error)
            except BaseException as error:
                outcome, message = f"{type(error).__name__}", str(error)
            seconds = time.monotonic() - start
            print(json.dumps([path.name, outcome, message, round(seconds, 3)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
