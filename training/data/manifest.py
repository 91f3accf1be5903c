"""Any data set: a manifest names its scans, and a command writes one from patterns of file names.

manifest.json, in the folder of the data:

    {"name": "prostate",
     "classes": ["background", "transition zone", "peripheral zone"],
     "scans": [{"subject": "p01", "image": "p01/t2.nii.gz", "label": "p01/t2_seg.nii.gz"},
               {"subject": "p02", "image": "p02/t2.nii.gz"}]}

`scans` may be the name of a CSV file beside the manifest whose header has the same keys.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

if __name__ == "__main__":
    from salkernels.training.startup import leave_current_folder

    leave_current_folder()

from salkernels._shared.files import write_atomically

from .datasets import DATASETS, DatasetInfo, Scan, require_own_files
from .nifti import DataError, Spacing, Values, raise_problems
from .patterns import matching, one_person
from .text import is_file, name_problem, printable, read_text

MANIFEST = "manifest"  # what --dataset is called for it
FILE = "manifest.json"
KEYS = {"name", "classes", "values", "above_max", "spacing", "root", "scans"}
SCAN_KEYS = {"subject", "scan", "image", "label", "time_index", "group", "spacing"}
COLUMNS = {"subject", "frame", "role"}  # of the table of Dice, beside one for each class
MAX_CLASSES = 254  # labels are bytes, and 255 means unlabelled
MAX_BYTES = 2**26  # of a manifest or its table
_BETWEEN_NUMBERS = re.compile(r"[\s,;x×]+")


def dataset_names() -> tuple[str, ...]:
    """What --dataset takes, plug-ins' data sets included."""
    return (*DATASETS, MANIFEST)


def dataset_info(name: str, data: str | Path) -> DatasetInfo:
    """The data set of that name; a manifest itself says what is in it.

    data: the folder of the data, or the manifest's own file.

    Raises:
        DataError: no such name, or a manifest that cannot be used; all problems in one message.
    """
    if name == MANIFEST:
        return read_manifest(data)
    if name not in DATASETS:
        known = ", ".join(dataset_names())
        raise DataError(
            f"unknown data set {name!r}; expected one of {known}, or one of a plug-in: pass "
            f"--plugin FILE"
        )
    return DATASETS[name]


def read_manifest(data: str | Path) -> DatasetInfo:
    """Read `data`/manifest.json, or the JSON file `data`, and check all but the images themselves.

    Keys: `scans` (needed); `classes`, by label value, background first (needed where there are
    labels); `values`, the stored value or values of each class where they are not 0, 1, 2, ...;
    `above_max`, "error" or "background": what a label is that stands for no class; `spacing`, mm
    along the stored axes, in place of what the headers say; `name`; `root`, the folder that paths
    are relative to, by default the manifest's own.
    Keys of a scan: `subject`, `image` (needed); `label`; `scan`, its name where a subject has
    several; `time_index`, from 0, if the image is 4D; `group`; `spacing`.

    Raises:
        DataError: as dataset_info.
    """
    path = Path(data).expanduser()
    path = path / FILE if path.is_dir() else path
    content = _object(_json(path), str(path), KEYS)
    root = path.parent / Path(_text(content, "root", str(path), default=".")).expanduser()
    if not root.is_dir():
        raise DataError(f"{path}: root: no such folder: {root}")
    above = _text(content, "above_max", str(path), default="error")
    if above not in ("error", "background"):
        raise DataError(f"{path}: above_max: expected 'error' or 'background', got {above!r}")
    spacing = _spacing(content, str(path))
    scans = _scans(_rows(content.get("scans"), path), root, path, spacing)
    classes = _classes(content.get("classes"), path, any(scan.label for scan in scans))
    return DatasetInfo(
        name=_name(content, "name", str(path), default=MANIFEST),
        class_names=classes,
        above_max="error" if above == "error" else "background",
        finder=partial(_found, scans),
        values=_values(content.get("values"), path, classes),
    )


def write_manifest(
    data: str | Path,
    images: str,
    labels: str | None = None,
    classes: Sequence[str] = (),
    name: str | None = None,
    values: Sequence[int] = (),
    spacing: Sequence[float] = (),
) -> list[Scan]:
    """Write `data`/manifest.json for the files that match a pattern, and return its scans.

    images: pattern of paths below `data`, such as "imagesTr/{subject}_0000.nii.gz" or
        "{subject}/{scan}.nii.gz"; a field, and *, stand for any characters but a slash.
    labels: the same for label maps, with the same fields; a scan without one stays unlabelled.
    values, spacing: see read_manifest.

    Raises:
        DataError: nothing matches, a field is unknown, or there is a manifest already.
    """
    root = Path(data).expanduser()
    target = root / FILE
    if target.exists():
        raise DataError(f"{target}: already there; delete it to have it written again")
    for pattern in filter(None, (images, labels)):
        _inside(root, pattern)
    labelled = {} if labels is None else matching(root, labels)
    # A label map beside its image often matches the image's pattern too.
    found = {k: p for k, p in matching(root, images).items() if p not in labelled.values()}
    if not found:
        raise DataError(f"{root}: no image matches {images!r}")
    lost = [f"{p}: label without an image" for key, p in labelled.items() if key not in found]
    raise_problems(f"{root}: labels that match no image; check both patterns:", lost)
    rows = []
    for key, image in sorted(found.items()):
        row = {**dict(key), "image": image}
        if key in labelled:
            row["label"] = labelled[key]
        rows.append(row)
    content: dict[str, Any] = {"name": name or root.resolve().name}
    said = {"classes": classes, "values": values, "spacing": spacing}
    content |= {name: list(stated) for name, stated in said.items() if stated}
    content["scans"] = rows
    checked = _classes(content.get("classes"), target, bool(labelled))
    _values(content.get("values"), target, checked)
    _name(content, "name", str(target))
    stated_spacing = _spacing(content, str(target))
    scans = _scans([(row["image"], row) for row in rows], root, target, stated_spacing)
    require_own_files(scans, root)
    write_atomically(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return scans


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m salkernels.training.data.manifest DIR --images PATTERN ...`"""
    parser = argparse.ArgumentParser(
        prog="python -m salkernels.training.data.manifest",
        description="Write DIR/manifest.json for the NIfTI files that match a pattern.",
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of the data")
    parser.add_argument(
        "--images", required=True, metavar="PATTERN", help='such as "{subject}/{scan}.nii.gz"'
    )
    parser.add_argument("--labels", metavar="PATTERN", help="with the same fields")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="by label value, background first"
    )
    parser.add_argument(
        "--values", nargs="+", type=int, default=[], metavar="N",
        help="the value in the label maps of each class, where they are not 0, 1, 2, ...",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", nargs=3, type=float, default=[], metavar="MM",
        help="of the voxels along X, Y and Z, where the headers do not say it",
    )  # fmt: skip
    parser.add_argument("--name", help="of the data set; by default that of the folder")
    arguments = parser.parse_args(argv)
    try:
        scans = write_manifest(**vars(arguments))
    except DataError as error:
        print(f"{parser.prog}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    subjects = len({scan.subject for scan in scans})
    labelled = sum(scan.label is not None for scan in scans)
    path = arguments.data / FILE
    told = f"{path}: {len(scans)} scans of {subjects} subjects, {labelled} with a label map"
    print(printable(told))
    if pair := one_person(scan.subject for scan in scans):
        print(
            f"{parser.prog}: note: {pair[0]} and {pair[1]} count as two subjects; if they are "
            f"scans of one person, delete the file and write {{subject}}_{{scan}} in the "
            f"patterns, or one may be trained on and the other tested on",
            file=sys.stderr,
        )
    return 0


def _found(scans: list[Scan], root: Path, cine: bool) -> list[Scan]:
    """The finder of a manifest: all is known by now, and time frames stand in it by name."""
    del root, cine
    return list(scans)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, MAX_BYTES))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; write it by hand or with "
            f"`python -m salkernels.training.data.manifest`"
        ) from error
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # the last of brackets without end
        raise DataError(f"{path}: not readable as JSON: {error}") from error


def _rows(value: Any, path: Path) -> list[tuple[str, Any]]:
    """Where each scan stands, for messages, and what is said of it."""
    if isinstance(value, str):
        table = _inside(path.parent, value)
        try:
            text = read_text(table, MAX_BYTES)
        except OSError as error:
            raise DataError(f"{table}: cannot be read: {error}") from error
        reader = csv.DictReader(
            io.StringIO(text), restkey="cells beyond the header", skipinitialspace=True, strict=True
        )
        try:
            # An empty cell is a key that is not there.
            rows = [
                (f"{table.name} line {reader.line_num}", {k: v for k, v in row.items() if v})
                for row in reader
            ]
        except csv.Error as error:
            raise DataError(f"{table}: line {reader.line_num}: {error}") from error
    elif isinstance(value, list):
        rows = [(f"scans[{number}]", row) for number, row in enumerate(value)]
    else:
        raise DataError(f"{path}: scans: expected a list, or the name of a CSV file, got {value!r}")
    if not rows:
        raise DataError(f"{path}: scans: expected at least one")
    return rows


def _scans(
    rows: Sequence[tuple[str, Any]], root: Path, path: Path, spacing: Spacing | None
) -> list[Scan]:
    scans: dict[str, Scan] = {}
    problems = []
    for where, row in rows:
        try:
            scan = _scan(row, root, where, spacing)
            if scan.name in scans:
                raise DataError(f"{where}: {scan.name} is there twice; tell scans apart by 'scan'")
            scans[scan.name] = scan
        except DataError as error:
            problems.append(str(error))
    raise_problems(f"{path} cannot be used as it is:", problems)
    return [scans[name] for name in sorted(scans)]


def _scan(row: Any, root: Path, where: str, spacing: Spacing | None) -> Scan:
    row = _object(row, where, SCAN_KEYS)
    subject, scan = _name(row, "subject", where), _name(row, "scan", where, default="scan")
    image = _file(row, "image", root, where)
    label = _file(row, "label", root, where) if row.get("label") is not None else None
    if label == image:
        raise DataError(f"{where}: image and label are one file")
    group = _name(row, "group", where) if row.get("group") is not None else None
    own = _spacing(row, where) or spacing
    return Scan(subject, scan, "", image, label, _time_index(row, where), group, own)


def _time_index(row: Mapping[str, Any], where: str) -> int | None:
    value = row.get("time_index")
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,6}", str(value)):
        raise DataError(f"{where}: time_index: expected a frame number from 0, got {value!r}")
    return int(value)


def _spacing(row: Mapping[str, Any], where: str) -> Spacing | None:
    """Three numbers in mm; a table has them in one cell, "1.5 1.5 8"."""
    value = row.get("spacing")
    if value is None:
        return None
    parts = _BETWEEN_NUMBERS.split(value.strip()) if isinstance(value, str) else value
    try:
        x, y, z = (float(part) for part in parts)
        if not all(0 < step < 1000 for step in (x, y, z)):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: spacing: expected mm along the three stored axes, got {value!a}"
        ) from error
    return x, y, z


def _file(row: Mapping[str, Any], key: str, root: Path, where: str) -> Path:
    try:
        path = _inside(root, _text(row, key, where))
    except DataError as error:
        raise DataError(f"{where}: {key}: {error}") from error
    if not is_file(path):
        raise DataError(f"{where}: {key}: no such file: {path}")
    return path


def _inside(root: Path, text: str) -> Path:
    """A path below `root`. A manifest may come from anyone: it must not name other files.

    Links are followed wherever they lead, as in the other layouts: whoever sets one may read the
    file, and data sets of links to a store are common.
    """
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or "\\" in text:
        raise DataError(f"expected a path relative to {root}, with '/', got {text!a}")
    plain = os.path.normpath(text)  # ".." behind a link would be that of the link's target
    if plain.split(os.sep)[0] == os.pardir:
        raise DataError(f"{text!a} leaves {root}; name the folder of its files as 'root'")
    return root / plain


def _classes(value: Any, path: Path, needed: bool) -> tuple[str, ...]:
    if value is None and not needed:
        return ("background",)
    texts = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
    if not texts or len(set(value)) < len(value) or not 2 <= len(value) <= MAX_CLASSES:
        raise DataError(
            f"{path}: classes: expected 2 to {MAX_CLASSES} different names by label value, "
            f"background first, got {value!r}"
        )
    for name in value:
        if problem := name_problem(name):
            raise DataError(f"{path}: classes: {problem}")
        if name in COLUMNS:
            raise DataError(f"{path}: classes: {name!r} is a column of the table of results")
    return tuple(value)


def _values(value: Any, path: Path, classes: tuple[str, ...]) -> Values | None:
    """The values in label maps of each class, from one or a list for each."""
    if value is None:
        return None
    each = [v if isinstance(v, list) else [v] for v in value] if isinstance(value, list) else []
    flat = [v for of_class in each for v in of_class]
    good = all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**31 for v in flat)
    if len(each) != len(classes) or not all(each) or not good or len(set(flat)) < len(flat):
        raise DataError(
            f"{path}: values: expected for each of the {len(classes)} classes an integer, or a "
            f"list of them, each once, got {value!r:.200}"
        )
    return tuple(tuple(of_class) for of_class in each)


def _object(value: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with keys, got {value!r}")
    if unknown := [str(key) for key in value if key not in keys]:
        raise DataError(
            f"{where}: unknown {', '.join(sorted(unknown))}; expected {', '.join(sorted(keys))}"
        )
    return value


def _text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key}: expected text, got {value!r}")
    return value.strip()


def _name(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A text that can stand in tables, pictures, messages and names of files."""
    text = _text(row, key, where, default)
    if problem := name_problem(text):
        raise DataError(f"{where}: {key}: {problem}")
    return text


if __name__ == "__main__":
    sys.exit(main())
