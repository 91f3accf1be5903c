"""Which files a dataset has: scans found on disk in the ACDC and CHD layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .nifti import DataError, Volume, image_shape, raise_problems, read_image, read_labels

_SEARCH_DEPTH = 6  # folders below the root: enough for any release, and loops of links end
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
        label: its label map, None when there is none.
        time_index: frame of a 4D file, from 0; None when the file is the volume.
        group: diagnosis, where the dataset has one.
    """

    subject: str
    frame: str
    role: str
    image: Path
    label: Path | None
    time_index: int | None = None
    group: str | None = None

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
        orientation: how slices are taken by default, see PreprocessConfig.
        above_max: what a label above the last class is, see nifti.read_labels.
        clip: default intensity percentiles, low and high.
        finder: (root, cine) -> scans in a fixed order; use `find`.
    """

    name: str
    class_names: tuple[str, ...]
    orientation: Literal["native", "RAS"]
    above_max: Literal["background", "error"]
    clip: tuple[float, float]
    finder: Callable[[Path, bool], list[Scan]]

    @property
    def num_classes(self) -> int:
        """Classes with background."""
        return len(self.class_names)

    @property
    def max_label(self) -> int:
        """The highest label value that is a class."""
        return len(self.class_names) - 1

    def preprocess_defaults(self) -> dict[str, Any]:
        """The dataset's own settings: PreprocessConfig(**info.preprocess_defaults())."""
        low, high = self.clip
        return {"orientation": self.orientation, "clip_low": low, "clip_high": high}

    def find(self, root: str | Path, cine: bool = False) -> list[Scan]:
        """Find the scans below `root`, sorted by name; with `cine` also unlabelled time frames.

        Raises:
            DataError: no scan, a subject twice, or missing files; all of them in one message.
        """
        root = Path(root).expanduser()
        try:
            return self.finder(root, cine)
        except OSError as error:
            raise DataError(f"{root}: cannot be searched: {error}") from error


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
    try:
        if scan.label is not None:
            label = read_labels(scan.label, max_label=info.max_label, above=info.above_max).array
            if image is not None and image.array.shape != label.shape:
                size = f"shape {label.shape} does not fit the image's {image.array.shape}"
                raise DataError(f"{scan.label}: {size}")
    except DataError as error:
        problems.append(str(error))
    if problems or image is None:
        raise DataError("\n".join(problems))
    return image, label


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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: expected the ED and ES frames there: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text, 'key: value' per line") from error
    values: dict[str, str] = {}
    for line in filter(str.strip, lines):
        key, colon, value = line.partition(":")
        if not colon:
            raise DataError(f"{path}: expected 'key: value', got {line.strip()[:60]!r}")
        values[key.strip()] = value.strip()

    def number(key: str) -> int:
        text = values.get(key, "")
        if not re.fullmatch(r"[1-9]\d{0,3}", text):
            raise DataError(f"{path}: expected '{key}: <frame number from 1>', got {text[:60]!r}")
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
            if match is None or not path.is_file():
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
    if root.is_file():
        raise DataError(
            f"{root}: expected the folder of {name}, got a file; the file of a manifest goes with "
            f"--dataset manifest"
        )
    if not root.is_dir():
        raise DataError(f"{root}: expected the folder of {name}, found no folder there")


def _folders(root: Path, depth: int = _SEARCH_DEPTH) -> Iterator[Path]:
    """`root` and the folders below it, in a fixed order; hidden ones are left out."""
    yield root
    if depth > 0 and not _PATIENT.fullmatch(root.name):
        for child in sorted(root.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _folders(child, depth - 1)


def _nifti(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}.nii.gz", folder / f"{stem}.nii")
    return next((path for path in candidates if path.is_file()), None)


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
        orientation="native",  # short-axis stacks are oblique: no anatomical axis fits them
        above_max="error",
        clip=(0.5, 99.5),
        finder=find_acdc,
    ),
    "chd": DatasetInfo(
        name="chd",
        class_names=("background", "LV", "RV", "LA", "RA", "myocardium", "aorta", "PA"),
        orientation="RAS",
        above_max="background",  # vessels of single patients carry labels above 7
        clip=(1.0, 99.0),
        finder=find_chd,
    ),
}
