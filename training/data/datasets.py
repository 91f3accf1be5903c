"""Which files a dataset has: scans found on disk in the ACDC and CHD layouts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from .grid import Grid, on_grid
from .nifti import (
    DataError,
    Spacing,
    Values,
    Volume,
    image_grid,
    image_shape,
    raise_problems,
    read_image,
    read_labels,
)
from .text import is_file, read_text

_SEARCH_DEPTH = 6  # folders below the root: enough for any release
REST_OF_ARCHIVES = "__MACOSX"  # a folder that archives of one system have beside the true ones
_PATIENT = re.compile(r"patient\d+")
_CT = re.compile(r"(ct_\d+)_(image|label)\.nii(?:\.gz)?")


@dataclass(frozen=True)
class Scan:
    """One volume on disk.

    Attributes:
        subject: "patient001" or "ct_1001"; splits go by it.
        frame: "frame01" or "ct".
        role: "ED", "ES", "cine" (another time frame, never labelled) or "".
        image: the NIfTI file.
        label: its label map, None when there is none; may be 4D where `time_index` names a frame.
        time_index: frame of a 4D file, from 0; None when the file is the volume.
        group: diagnosis, where the dataset has one.
        stated_spacing: mm along X, Y, Z as the user states it; it replaces the header's.
    """

    subject: str
    frame: str
    role: str
    image: Path
    label: Path | None
    time_index: int | None = None
    group: str | None = None
    stated_spacing: Spacing | None = None

    @property
    def name(self) -> str:
        """Unique within a dataset: "patient001_frame01"."""
        return f"{self.subject}_{self.frame}"


@dataclass(frozen=True)
class DatasetInfo:
    """What the rest of the package must know about a dataset.

    Attributes:
        name: what --dataset calls it.
        class_names: by label value, background first.
        above_max: what a label above the last class is, see nifti.read_labels.
        finder: (root, cine) -> scans in a fixed order; use `find`.
        values: the values in label maps that stand for each class, background first; None where
            a class is its own value.
    """

    name: str
    class_names: tuple[str, ...]
    above_max: Literal["background", "error"]
    finder: Callable[[Path, bool], list[Scan]]
    values: Values | None = None

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return len(self.class_names)

    @property
    def max_label(self) -> int:
        """The highest label value that is a class."""
        return len(self.class_names) - 1

    def find(self, root: str | Path, cine: bool = False) -> list[Scan]:
        """Find the scans below `root`, sorted by name; with `cine` also unlabelled time frames.

        Raises:
            DataError: no scan, a subject twice, missing files, or one file of two subjects; all
                of them in one message.
        """
        root = Path(root).expanduser()
        try:
            scans = self.finder(root, cine)
            require_own_files(scans, root)
        except OSError as error:
            raise DataError(f"{root}: cannot be searched: {error}") from error
        return scans


def read_scan(
    scan: Scan, info: DatasetInfo, read_series: Callable[[Path], Volume] | None = None
) -> tuple[Volume, npt.NDArray[np.uint8] | None]:
    """Read a scan's image and, where it has one, its label map; both (X, Y, Z).

    read_series: reads a whole 4D file, for callers that keep it for the next frames.

    Raises:
        DataError: unusable files, one line for each.
    """
    image, label, problems = None, None, []
    try:
        if scan.time_index is not None and read_series is not None:
            series = read_series(scan.image)
            image = replace(series, array=series.array[..., scan.time_index])
        else:
            image = read_image(scan.image, time_index=scan.time_index)
    except DataError as error:
        problems.append(str(error))
    if scan.stated_spacing is not None and image is not None:
        image = replace(image, spacing=scan.stated_spacing)
    try:
        if scan.label is not None:
            label, note = _labels(scan, info, image.grid if image is not None else None)
            if image is not None and note:
                image = replace(image, notes=(*image.notes, note))
    except DataError as error:
        problems.append(str(error))
    if problems or image is None:
        raise DataError("\n".join(problems))
    return image, label


def read_truth(scan: Scan, info: DatasetInfo) -> npt.NDArray[np.uint8] | None:
    """A scan's label map as read_scan gives it, without the image's voxels; errors likewise."""
    if scan.label is None:
        return None
    ndim = 3 if scan.time_index is None else 4
    return _labels(scan, info, image_grid(scan.image, ndim=ndim))[0]


def _labels(scan: Scan, info: DatasetInfo, image: Grid | None) -> tuple[npt.NDArray[np.uint8], str]:
    """The label map on the image's grid, and a note on it, or ""."""
    assert scan.label is not None  # the caller looked
    labels = read_labels(
        scan.label,
        max_label=info.max_label,
        above=info.above_max,
        values=info.values,
        time_index=scan.time_index,
    )
    if image is None or labels.grid is None:
        return labels.array, ""
    return on_grid(scan.label, labels.array, labels.grid, image)


def require_own_files(scans: Sequence[Scan], root: Path) -> None:
    """Raise a DataError where an image or label map is that of two subjects, by links too.

    Such a subject would be trained on and tested on at once. Names that cannot be printed are
    refused here as well, before they reach tables, pictures and messages.
    """
    root = root if root.is_dir() else root.parent  # of a manifest's own file
    owners: dict[tuple[int, int], Scan] = {}
    problems = []
    for scan in scans:
        for path in filter(None, (scan.image, scan.label)):
            shown = os.path.relpath(path, root)
            if not shown.isprintable():
                problems.append(f"{shown!a}: has characters that cannot be printed; rename it")
                continue
            state = path.stat()
            first = owners.setdefault((state.st_dev, state.st_ino), scan)
            if first.subject != scan.subject:
                problems.append(
                    f"{shown}: belongs to {first.subject} and to {scan.subject}; expected files "
                    f"of each subject's own"
                )
    raise_problems(f"{root}: cannot be used as it is:", problems)


@dataclass(frozen=True)
class PatientInfo:
    """Info.cfg of one ACDC patient: ED and ES frame numbers from 1, and the diagnosis."""

    ed: int
    es: int
    group: str | None


def read_info(path: Path) -> PatientInfo:
    """Read Info.cfg, "key: value" per line; keys that are not needed are left alone.

    Raises:
        DataError: missing or garbled.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise DataError(f"{path}: expected the ED and ES frames: {error.strerror}") from error
    values: dict[str, str] = {}
    for line in filter(str.strip, lines):
        key, colon, value = line.partition(":")
        if not colon:
            raise DataError(f"{path}: expected 'key: value', got {line.strip()[:60]!a}")
        values[key.strip()] = value.strip()

    def number(key: str) -> int:
        text = values.get(key, "")
        if not re.fullmatch(r"[1-9]\d{0,3}", text):
            raise DataError(f"{path}: expected '{key}: <frame number from 1>', got {text[:60]!a}")
        return int(text)

    ed, es = number("ED"), number("ES")
    if ed == es:
        raise DataError(f"{path}: ED and ES are the same frame, {ed}")
    if "NbFrame" in values and max(ed, es) > number("NbFrame"):
        raise DataError(f"{path}: ED {ed} and ES {es} exceed NbFrame {values['NbFrame']}")
    return PatientInfo(ed, es, values.get("Group") or None)


def find_acdc(root: Path, cine: bool) -> list[Scan]:
    """Scans of patientXXX folders at or below `root` (`training`, `testing`, or their parent)."""
    _require_folder(root, "acdc")
    folders = [f for f in _folders(root) if _PATIENT.fullmatch(f.name)]
    if not folders:
        raise DataError(
            f"{root}: expected ACDC: folders patient001, patient002, ... here or in "
            f"training/ and testing/, each with Info.cfg and patientXXX_frameYY.nii.gz; "
            f"found {_contents(root)}"
        )
    scans: list[Scan] = []
    problems: list[str] = []
    seen: dict[str, Path] = {}
    for folder in folders:
        if folder.name in seen:
            problems.append(f"{folder}: subject already in {seen[folder.name]}; keep one of them")
            continue
        seen[folder.name] = folder
        try:
            scans += _acdc_patient(folder, cine)
        except DataError as error:
            problems.append(str(error))
    raise_problems(f"{root}: ACDC cannot be used as it is:", problems)
    return sorted(scans, key=lambda scan: (scan.subject, scan.frame))


def _acdc_patient(folder: Path, cine: bool) -> list[Scan]:
    subject = folder.name
    info = read_info(folder / "Info.cfg")
    scans = []
    for number, role in ((info.ed, "ED"), (info.es, "ES")):
        frame = f"frame{number:02d}"
        stem = f"{subject}_{frame}"
        image = _nifti(folder, stem)
        if image is None:
            raise DataError(f"{folder / stem}.nii.gz: no such file, but Info.cfg calls it {role}")
        label = _nifti(folder, f"{stem}_gt")
        scans.append(Scan(subject, frame, role, image, label, None, info.group))
    series = _nifti(folder, f"{subject}_4d") if cine else None
    if series is not None:
        frames = image_shape(series, ndim=4)[3]
        if max(info.ed, info.es) > frames:
            raise DataError(f"{series}: {frames} frames, but Info.cfg has ES {info.es}")
        scans += [
            Scan(subject, f"frame{t + 1:02d}", "cine", series, None, t, info.group)
            for t in range(frames)
            if t + 1 not in (info.ed, info.es)
        ]
    return scans


def find_chd(root: Path, cine: bool) -> list[Scan]:
    """Scans ct_XXXX_image.nii.gz anywhere below `root`, with ct_XXXX_label.nii.gz or without."""
    del cine  # a CT has one frame
    _require_folder(root, "chd")
    found: dict[str, dict[str, Path]] = {"image": {}, "label": {}}
    problems: list[str] = []
    for folder in _folders(root):
        for path in sorted(folder.iterdir()):
            match = _CT.fullmatch(path.name)
            if match is None or not is_file(path):
                continue
            subject, kind = match.groups()
            first = found[kind].setdefault(subject, path)
            if first != path:
                problems.append(f"{path}: subject already in {first}; keep one of them")
    images, labels = found["image"], found["label"]
    problems += [f"{labels[s]}: label without {s}_image" for s in sorted(labels.keys() - images)]
    raise_problems(f"{root}: CHD cannot be used as it is:", problems)
    if not images:
        raise DataError(
            f"{root}: expected CHD: ct_XXXX_image.nii.gz, and ct_XXXX_label.nii.gz where there is "
            f"a label; found {_contents(root)}"
        )
    return [Scan(s, "ct", "", images[s], labels.get(s)) for s in sorted(images)]


def _require_folder(root: Path, name: str) -> None:
    if root.is_dir():
        return
    what = f"expected the folder of {name}, found no folder there"
    if is_file(root):
        what = f"expected the folder of {name}, got a file; give the folder that it lies in, or "
        what += "pass --dataset manifest if it is a manifest"
    raise DataError(f"{root}: {what}")


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, in a fixed order; see `folders_below`."""
    return folders_below(root, lambda folder: not _PATIENT.fullmatch(folder.name))


def folders_below(root: Path, enter: Callable[[Path], bool] = lambda _: True) -> Iterator[Path]:
    """`root` and the folders below it, in a fixed order, each once, however links lead to it.

    Hidden folders and what archives leave are left out, and what lies in folders not to `enter`.
    """
    seen: set[tuple[int, int]] = set()

    def below(folder: Path, depth: int) -> Iterator[Path]:
        into = enter(folder)
        if into:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:  # links back would multiply the folders
                return
            seen.add((state.st_dev, state.st_ino))
        yield folder
        if into and depth > 0:
            for child in sorted(folder.iterdir()):
                if child.is_dir() and not left_out(child.name):
                    yield from below(child, depth - 1)

    return below(root, _SEARCH_DEPTH)


def left_out(name: str) -> bool:
    """Whether a file or folder is none of the data: hidden, or what archives leave beside them."""
    return name.startswith(".") or name == REST_OF_ARCHIVES


def _nifti(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}.nii.gz", folder / f"{stem}.nii")
    return next((path for path in candidates if is_file(path)), None)


def _contents(root: Path, shown: int = 5) -> str:
    names = sorted(path.name for path in root.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


DATASETS: dict[str, DatasetInfo] = {
    "acdc": DatasetInfo(
        name="acdc",
        class_names=("background", "RV", "myocardium", "LV"),
        above_max="error",
        finder=find_acdc,
    ),
    "chd": DatasetInfo(
        name="chd",
        class_names=("background", "LV", "RV", "LA", "RA", "myocardium", "aorta", "PA"),
        above_max="background",  # vessels of single patients carry labels above 7
        finder=find_chd,
    ),
}
