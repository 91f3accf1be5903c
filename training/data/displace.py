"""A copy of a data set in which each subject lies elsewhere in the picture: a control.

Scans are planned around the organ, so in all of them the same pixel shows about the same tissue.
What a loss gains from that, and not from neighbouring slices, is lost in such a copy:

      as scanned                       displaced, one offset for all scans of a subject
      +---------+  +---------+         +---------+  +---------+
      |   ___   |  |   ___   |         |___      |  |         |
      |  ( H )  |  |  ( H )  |   ->    | H )     |  |      ___|
      |   ---   |  |   ---   |         |---      |  |     ( H |
      +---------+  +---------+         +---------+  +---------+
       subject 1    subject 2           subject 1    subject 2
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from salkernels.training.startup import leave_current_folder

    leave_current_folder()

import nibabel as nib
import numpy as np
import numpy.typing as npt

from .datasets import Scan
from .manifest import FILE, dataset_info, dataset_names
from .nifti import DataError
from .text import printable

Offset = tuple[int, int]


def displace(
    data: Path, out: Path, dataset: str = "acdc", share: float = 0.19, seed: int = 0
) -> int:
    """Writes the copy; files that are no scans, such as Info.cfg, are copied as they are.

    Args:
        data: folder of the data set.
        out: folder of the copy, which must not exist.
        dataset: its layout, as for --dataset.
        share: the largest offset along each in-plane axis, in extents of the plane, below 1/2.
            Offsets are uniform, and the same for all scans of a subject and their label maps.
        seed: of the offsets.

    Returns:
        How many scans were written.

    Raises:
        DataError: no such data set, a copy that exists, a share out of range, or a 4D file.
    """
    if not 0 < share < 0.5:
        raise DataError(f"expected 0 < share < 0.5, got {share:g}")
    if out.exists():
        raise DataError(f"{out}: exists; give a folder that does not, or delete it")
    scans = dataset_info(dataset, data).find(data)
    if series := [scan.image for scan in scans if scan.time_index is not None]:
        raise DataError(f"{series[0]}: expected volumes, got a frame of a 4D file; split it first")
    for path in _companions(data, scans):
        target = out / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for scan in scans:
        for path in filter(None, (scan.image, scan.label)):
            target = out / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_moved(path, target, scan.subject, share, seed, path == scan.label)
    return len(scans)


def offset_of(subject: str, shape: Sequence[int], share: float, seed: int) -> Offset:
    """Voxels along the first two axes; the same for any order or choice of subjects."""
    digest = hashlib.sha256(f"{seed} {subject}".encode()).digest()
    numbers = np.random.default_rng(list(digest)).uniform(-share, share, 2)
    return round(numbers[0] * shape[0]), round(numbers[1] * shape[1])


def moved(volume: npt.NDArray[np.generic], offset: Offset, label: bool) -> npt.NDArray[np.generic]:
    """Voxel (x, y) of the result is (x + dx, y + dy) of the volume.

    What enters the picture is its mirror image at the border, and background in a label map.
    """
    reach = [(max(0, -d), max(0, d)) for d in offset]
    padding = [*reach, *[(0, 0)] * (volume.ndim - 2)]
    mode = "constant" if label else "symmetric"
    padded: npt.NDArray[np.generic] = np.pad(volume, padding, mode=mode)  # type: ignore[call-overload]
    starts = [max(0, d) for d in offset]
    x, y = (slice(s, s + n) for s, n in zip(starts, volume.shape[:2], strict=True))
    return padded[x, y]


def _write_moved(
    path: Path, target: Path, subject: str, share: float, seed: int, label: bool
) -> None:
    """Anatomy stays where it is in the scanner's coordinates, if the header records them."""
    image: Any = nib.load(path)
    values = np.asanyarray(image.dataobj)
    offset = offset_of(subject, values.shape, share, seed)
    affine = np.array(image.affine)
    affine[:3, 3] += affine[:3, :2] @ np.asarray(offset, dtype=float)
    known = image.header["qform_code"] > 0 or image.header["sform_code"] > 0
    copy: Any = type(image)(moved(values, offset, label), affine if known else None, image.header)
    copy.set_data_dtype(np.float32 if values.dtype.kind == "f" else values.dtype)
    nib.save(copy, target)


def _companions(data: Path, scans: Sequence[Scan]) -> Iterator[Path]:
    """Files beside the scans that say what they are; a manifest lies in the root."""
    folders = {scan.image.parent for scan in scans} | {data}
    for folder in sorted(folders):
        for pattern in ("*.cfg", FILE, "*.csv"):
            yield from sorted(folder.glob(pattern))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m salkernels.training.data.displace DATA OUT`"""
    parser = argparse.ArgumentParser(
        prog="python -m salkernels.training.data.displace",
        description="Copy a data set, each subject moved to another place in the picture.",
    )
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("out", type=Path, help="folder of the copy")
    parser.add_argument("--dataset", default="acdc", choices=dataset_names())
    parser.add_argument(
        "--share", type=float, default=0.19, help="largest offset, of the plane's extents (0.19)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the offsets (0)")
    arguments = parser.parse_args(argv)
    try:
        count = displace(**vars(arguments))
    except DataError as error:
        print(f"{parser.prog}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(printable(f"{arguments.out}: {count} scans"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
