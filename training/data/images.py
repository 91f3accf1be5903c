"""Which images `predict` is to segment: of files, folders in any of our layouts, and lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .datasets import folders_below, left_out
from .errors import DataError
from .manifest import FILE, read_manifest
from .nifti import Spacing
from .text import is_file, read_text

ENDINGS = (".nii.gz", ".nii")
LISTS = (".txt", ".list")
# Names that label maps have in the layouts of ACDC, CHD, BIDS and others, and in our own output.
_LABEL_MAP = re.compile(r"(?:.*[_-])?(?:gt|labels?|segm?|segmentation|mask|dseg|pred)")
_LABEL_FOLDER = re.compile(r"labels?(?:Tr|Ts|Val)?|masks?|segmentations?", re.IGNORECASE)


@dataclass(frozen=True)
class Image:
    """An image to segment.

    path: the NIfTI file.
    folder: where its label map goes, below the output folder.
    spacing: in mm as a manifest states it, None for the header's.
    """

    path: Path
    folder: str = ""
    spacing: Spacing | None = None

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return stem_of(self.path)


def stem_of(path: Path) -> str:
    """A file's name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def find_images(inputs: Sequence[Path]) -> tuple[list[Image], list[Path]]:
    """The images of the inputs in order, each once, and the label maps that were left out.

    A file is taken as it is. Of a folder, all images in it and below it, unless it has a
    manifest, whose images they are then; label maps are told by their names ("_gt", "_label",
    "labelsTr/"). A .txt file is a list of paths, one a line, relative to its own folder; a .json
    file is a manifest.

    Raises:
        DataError: no file at the path, or no image in it.
    """
    images: dict[Path, Image] = {}
    labels: list[Path] = []
    for given in inputs:
        found, maps = _of(Path(given).expanduser())
        if not found:
            more = f" but {len(maps)} label maps by their names" if maps else ""
            raise DataError(f"{given}: holds no NIfTI file (.nii or .nii.gz){more}")
        for image in found:
            images.setdefault(image.path, image)
        labels += maps
    return list(images.values()), labels


def _of(given: Path) -> tuple[list[Image], list[Path]]:
    if given.is_dir():
        manifest = given / FILE
        return (_of_manifest(manifest), []) if is_file(manifest) else _of_folder(given)
    if given.suffix == ".json":
        return _of_manifest(given), []
    if given.suffix in LISTS:
        try:
            lines = [line.strip() for line in read_text(given, 2**24).splitlines()]
        except OSError as error:
            raise DataError(f"{given}: cannot be read: {error.strerror}") from error
        named = [line for line in lines if line and not line.startswith("#")]
        return [Image(given.parent / Path(line).expanduser()) for line in named], []
    return [Image(given)], []


def _of_manifest(path: Path) -> list[Image]:
    scans = read_manifest(path).find(path)
    return [Image(scan.image, scan.subject, scan.stated_spacing) for scan in scans]


def _of_folder(root: Path) -> tuple[list[Image], list[Path]]:
    images, labels = [], []
    try:
        for folder in folders_below(root):
            below = PurePosixPath(folder.relative_to(root).as_posix())
            of_labels = any(_LABEL_FOLDER.fullmatch(part) for part in below.parts)
            for path in sorted(folder.iterdir()):
                if not path.name.endswith(ENDINGS) or left_out(path.name) or not is_file(path):
                    continue
                if of_labels or _LABEL_MAP.fullmatch(stem_of(path)):
                    labels.append(path)
                else:
                    images.append(Image(path, str(below)))
    except OSError as error:
        raise DataError(f"{root}: cannot be searched: {error}") from error
    return images, labels
