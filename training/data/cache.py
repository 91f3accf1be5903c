"""Preprocessed slices on disk, memory-mapped: built once per data and settings, whole or not.

A cache is a folder <key>/ with images.npy (slices, size, size) float32, labels.npy uint8 and
index.json. It is written under another name and renamed when it is complete.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import struct
import sys
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .datasets import DatasetInfo, Scan, read_scan
from .digests import ScanDigest, scan_digests
from .nifti import DataError, Spacing, Volume, raise_problems, read_image
from .preprocess import Geometry, PreprocessConfig, Preprocessed, preprocess
from .review import require_labels as require_labels
from .review import require_one_scale
from .saying import counted

CACHE_VERSION = 3  # raise it whenever the same settings would give other slices
INDEX = "index.json"
ARRAYS = ("images.npy", "labels.npy")
_HEADER_BYTES = 128


class NoCache(DataError):
    """There is no cache, or what there is will never be one: absent, malformed, another version."""


@dataclass(frozen=True, kw_only=True)
class VolumeEntry(Scan):
    """One volume of the cache: its scan, and where its slices are.

    offset, num_slices: its slices are offset .. offset + num_slices of the arrays.
    spacing: of the stored volume in mm, None when not recorded.
    lost_voxels: labelled native voxels outside the canvas, of labelled_voxels.
    oriented: whether its header says where its axes point.
    notes: what its header says that the user should know.
    image_digest, label_digest: sha256 of the files.
    """

    offset: int
    num_slices: int
    geometry: Geometry
    spacing: Spacing | None
    lost_voxels: int
    labelled_voxels: int
    oriented: bool
    notes: tuple[str, ...]
    image_digest: str
    label_digest: str | None

    @property
    def labelled(self) -> bool:
        """Whether there is a label map."""
        return self.label is not None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VolumeEntry:
        """From asdict, after JSON."""
        made = {"geometry": Geometry.from_dict(values["geometry"]), "image": Path(values["image"])}
        for name in ("spacing", "stated_spacing", "notes"):
            made[name] = values[name] if values[name] is None else tuple(values[name])
        made["label"] = values["label"] and Path(values["label"])
        return cls(**{**values, **made})


class VolumeCache:
    """A built cache, opened for reading; may be pickled to DataLoader workers.

    info: the data set that it was built from.
    images: (slices, size, size) float32 and labels: the same in uint8, IGNORE where unlabelled;
        read-only memory maps, so copy before torch.from_numpy.
    volumes: VolumeEntry in the order of the slices. subjects: sorted, each once.
    All bytes are compared with their checksums.
    Raises NoCache when the folder holds no complete cache of this version and data set, DataError
    when it cannot be read now, which says nothing about the cache.
    """

    def __init__(self, folder: str | Path, info: DatasetInfo) -> None:
        self.folder = Path(folder)
        self.info = info
        with _classified(self.folder):
            index = read_index(self.folder)
            if index["version"] != CACHE_VERSION:
                raise ValueError(f"version {index['version']}, expected {CACHE_VERSION}")
            if (index["dataset"], tuple(index["class_names"])) != (info.name, info.class_names):
                raise ValueError(f"of {index['dataset']}, expected {info.name} and its classes")
            self.key: str = index["key"]
            self.config = PreprocessConfig(**index["settings"])
            self.volumes = [VolumeEntry.from_dict(values) for values in index["volumes"]]
            sums: dict[str, int] = index["checksums"]
        self.size = self.config.size
        self.subjects = sorted({volume.subject for volume in self.volumes})
        self._map()
        for name in ARRAYS:
            with _classified(self.folder / name, "damaged"):
                if _checksum(self.folder / name) != sums[name]:
                    raise ValueError("its checksum does not fit its content")

    @property
    def labelled_subjects(self) -> list[str]:
        """Those with a label map for at least one scan, sorted."""
        return sorted({volume.subject for volume in self.volumes if volume.labelled})

    def num_slices(self, volume: int) -> int:
        """Slices of a volume."""
        return self.volumes[volume].num_slices

    def image(self, volume: int) -> npt.NDArray[np.float32]:
        """(Z, size, size) float32, a view."""
        return self.images[self._span(volume)]

    def label(self, volume: int) -> npt.NDArray[np.uint8]:
        """(Z, size, size) uint8, a view."""
        return self.labels[self._span(volume)]

    def of_subject(self, subject: str) -> list[int]:
        """Indices of a subject's volumes; DataError when there is none."""
        found = [i for i, volume in enumerate(self.volumes) if volume.subject == subject]
        if not found:
            raise DataError(f"{subject}: no such subject among {len(self.subjects)} in the cache")
        return found

    def _span(self, volume: int) -> slice:
        entry = self.volumes[volume]
        return slice(entry.offset, entry.offset + entry.num_slices)

    def _map(self) -> None:
        self.images: npt.NDArray[np.float32] = self._array("images.npy", "float32")
        self.labels: npt.NDArray[np.uint8] = self._array("labels.npy", "uint8")

    def _array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        expected = (sum(volume.num_slices for volume in self.volumes), self.size, self.size), dtype
        with _classified(self.folder / name, "damaged"):
            array: npt.NDArray[Any] = np.load(self.folder / name, "r", allow_pickle=False)
            if (array.shape, array.dtype.name) != expected:
                raise ValueError(f"expected {expected}, got {array.shape}, {array.dtype}")
        return array

    def __getstate__(self) -> dict[str, Any]:
        # Only the path travels: a pickled memory map would be a copy of all slices. Nor does the
        # function that found the scans, which another process may not know: that of a plug-in.
        state = {k: v for k, v in self.__dict__.items() if k not in ("images", "labels")}
        return state | {"info": replace(self.info, finder=_found_already)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def _found_already(root: Path, cine: bool) -> list[Scan]:
    raise DataError(f"{root}: the scans of this cache were found in another process")


def open_cache(
    scans: Sequence[Scan],
    config: PreprocessConfig,
    info: DatasetInfo,
    cache_dir: str | Path,
    *,
    progress: bool = True,
) -> VolumeCache:
    """Open the cache of these scans and settings below `cache_dir`; build it when there is none.

    Safe to call from several processes at once: one builds, the others wait and open.
    Raises DataError: no scans, unusable files (all in one message), scans of which only some record
    a spacing, or a disk that refuses.
    """
    scans = sorted(scans, key=lambda scan: (scan.subject, scan.frame))
    if not scans:
        raise DataError("expected at least one scan, got none")
    twice = [name for name, count in Counter(scan.name for scan in scans).items() if count > 1]
    raise_problems("scans must have different names; these occur more than once:", twice)
    digests = scan_digests(scans, Path(cache_dir).expanduser(), shown=progress)
    key = cache_key(scans, config, info, digests)
    folder = Path(cache_dir).expanduser() / key[:16]
    try:
        cache = _opened(folder, key, scans, info)
        if cache is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f".{folder.name}.lock")) as alone:
                cache = _opened(folder, key, scans, info)  # another process may have built it
                if cache is None:
                    # Holding the lock: whatever lies here is of a build that died.
                    for dead in folder.parent.glob(f".{folder.name}.*.tmp") if alone else ():
                        shutil.rmtree(dead)
                    shutil.rmtree(folder, ignore_errors=True)
                    shown = counted(scans, "preprocessing", "scan", shown=progress)
                    _build(folder, key, zip(shown, digests, strict=True), config, info)
                    cache = VolumeCache(folder, info)
                    if scan_digests(scans, folder.parent) != digests:
                        shutil.rmtree(folder)
                        raise DataError(f"{folder}: files of the data changed meanwhile; try again")
    except OSError as error:
        # Without locks, another process may have been faster.
        cache = _opened(folder, key, scans, info)
        if cache is None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full; free space or choose another cache folder" if full else error
            raise DataError(f"{folder}: the cache cannot be built: {why}") from error
    require_one_scale(cache)
    return cache


def cache_key(
    scans: Sequence[Scan],
    config: PreprocessConfig,
    info: DatasetInfo,
    digests: Sequence[ScanDigest] | None = None,
) -> str:
    """sha256 of all that decides the content: version, settings, dataset, and the files' contents.

    File names count relative to their common folder, so moved data keep their cache.
    """
    paths = [path for scan in scans for path in (scan.image, scan.label) if path is not None]
    root = os.path.commonpath([os.path.abspath(path.parent) for path in paths])

    def state(path: Path | None, digest: str | None) -> list[Any] | None:
        return None if path is None else [Path(os.path.relpath(path, root)).as_posix(), digest]

    settings = [CACHE_VERSION, asdict(config), info.name, info.class_names, info.above_max]
    settings.append(info.values)
    states = [
        {**vars(s), "image": state(s.image, digest.image), "label": state(s.label, digest.label)}
        for s, digest in zip(scans, digests or scan_digests(scans), strict=True)
    ]
    return hashlib.sha256(json.dumps([settings, states], sort_keys=True).encode()).hexdigest()


def _opened(folder: Path, key: str, scans: Sequence[Scan], info: DatasetInfo) -> VolumeCache | None:
    """The complete cache of this key, or None; its paths are where the data lie now.

    Raises DataError when it cannot be read now: what passes is no reason to build it again.
    """
    try:
        cache = VolumeCache(folder, info)
    except NoCache as error:
        if folder.exists():
            tqdm.write(f"warning: {error}; it is built again", file=sys.stderr)
        return None
    if cache.key != key:
        return None
    pairs = zip(cache.volumes, scans, strict=True)
    cache.volumes = [replace(v, image=s.image, label=s.label) for v, s in pairs]
    with suppress(OSError):
        os.utime(folder / INDEX)  # when it was last of use, for whoever prunes
    return cache


def read_index(folder: Path) -> dict[str, Any]:
    """The description of a cache, compared with its checksum.

    Raises OSError, ValueError, KeyError or TypeError where it is not to be had.
    """
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index.pop("checksum") != _index_checksum(index):
        raise ValueError("damaged: the checksum of its index does not fit")
    return index


def _index_checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> int:
    """CRC-32 of a file: every flipped bit changes it, and it is as fast as reading."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            found = zlib.crc32(block, found)
    return found


@contextmanager
def _classified(path: Path, what: str = "no usable cache") -> Iterator[None]:
    """What is wrong with a cache for good is a NoCache, what may pass another DataError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise NoCache(f"{path}: {what}: {error}") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NoCache(f"{path}: {what}: {error.strerror}") from error
    except OSError as error:
        raise DataError(
            f"{path}: the cache cannot be read now: {error}; it was left as it is: try again"
        ) from error


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of one key, waiting for it; False where the system has no file locks, or where
    another process holds it and `wait` is false."""
    with open(path, "ab") as file:
        alone = False
        if sys.platform != "win32":
            import fcntl

            with suppress(OSError):  # some network file systems
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                alone = True
        yield alone


def _build(
    folder: Path,
    key: str,
    scans: Iterable[tuple[Scan, ScanDigest]],
    config: PreprocessConfig,
    info: DatasetInfo,
) -> None:
    """Write beside `folder`, then rename; nothing is left behind when that fails."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    problems: dict[str, None] = {}  # in order, once: the frames of a bad cine say the same
    entries: list[VolumeEntry] = []
    total = 0
    # One cine file serves all its frames, which follow each other.
    series = functools.lru_cache(maxsize=1)(functools.partial(read_image, ndim=4))
    try:
        # Not writable memory maps: on a full disk those kill the process (SIGBUS).
        first, second = (temporary / name for name in ARRAYS)
        with first.open("wb") as images, second.open("wb") as labels:
            images.write(bytes(_HEADER_BYTES))
            labels.write(bytes(_HEADER_BYTES))
            for scan, digest in scans:
                try:
                    image, label = read_scan(scan, info, series)
                    classes, name = info.num_classes, str(scan.image)
                    done = preprocess(image, label, config, num_classes=classes, name=name)
                except DataError as error:
                    problems.update(dict.fromkeys(str(error).splitlines()))
                else:
                    if digest.image is None or (scan.label and digest.label is None):
                        problems[f"{scan.image}: could not be read at first; try again"] = None
                if problems:
                    continue  # the files that are left are only checked
                images.write(done.images.data)
                labels.write(done.labels.data)
                entries.append(_entry(scan, image, done, digest, total))
                total += len(done.images)
            raise_problems(f"{len(problems)} problems with the data:", list(problems))
            shape = (total, config.size, config.size)
            _finish(images, np.dtype(np.float32), shape)
            _finish(labels, np.dtype(np.uint8), shape)
        index = {
            "version": CACHE_VERSION,
            "key": key,
            "dataset": info.name,
            "class_names": info.class_names,
            "settings": asdict(config),
            "volumes": [asdict(entry) for entry in entries],
            "checksums": {name: _checksum(temporary / name) for name in ARRAYS},
        }
        index = json.loads(json.dumps(index, default=str))  # as it will be read
        index["checksum"] = _index_checksum(index)
        (temporary / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _entry(
    scan: Scan, image: Volume, done: Preprocessed, digest: ScanDigest, offset: int
) -> VolumeEntry:
    return VolumeEntry(
        **vars(scan),
        offset=offset,
        num_slices=len(done.images),
        geometry=done.geometry,
        spacing=image.spacing,
        lost_voxels=done.lost_voxels,
        labelled_voxels=done.labelled_voxels,
        oriented=image.orientation is not None,
        notes=image.notes,
        image_digest=str(digest.image),
        label_digest=digest.label,
    )


def _finish(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Put the NPY 1.0 header, known only now, before the data, and force all of it to the disk."""
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    text = text.ljust(_HEADER_BYTES - 11) + "\n"
    file.seek(0)
    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1"))
    file.flush()
    os.fsync(file.fileno())
