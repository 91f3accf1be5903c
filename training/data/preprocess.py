"""From a stored volume to square slices of one pixel size, and from class scores back.

Only the plane is resampled: slices of short-axis stacks are 5 to 10 mm apart, and the network sees
one slice at a time. Slices are (Z, X, Y): the stored in-plane axes in their stored order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .nifti import MAX_EXTENT, DataError, Volume

IGNORE = 255  # label of an unlabelled pixel; losses and metrics leave it out
_CHUNK_PIXELS = 2**24  # (slices x classes x pixels) resampled at once: 64 MB of float32
_PLAUSIBLE_PIXEL = (0.02, 25.0)  # mm; beyond it the header's unit is wrong

_SLICES_RUN = (1.0, -1.0, 1.0)  # right, back, head in RAS: from apex to base of a heart


@dataclass
class PreprocessConfig:
    """How volumes become slices.

    Attributes:
        spacing: in-plane pixel size of the slices in mm, where the header records one.
        unknown_spacing: in-plane pixel size in mm of the scans whose header records none; 0 where
            you do not know it, and then the next three settings take the place of `spacing`.
        unknown_max_extent: without a recorded spacing, a plane longer than this many pixels ...
        unknown_extent: ... is first resized to this many along its longer side.
        unknown_zoom: then this zoom is applied.
        mixed_spacing: go on where some headers record a spacing and others do not, though their
            slices then show anatomy at different scales.
        size: side of the square canvas in pixels: centre crop or pad after resampling.
        clip_low: intensity percentile of the volume below which values are cut.
        clip_high: the same above.
        window: low and high intensity instead of percentiles, the same for all scans, such as
            [-200, 600] for CT in HU; values are then scaled by the window, not by the volume.
        orientation: "native" takes the last stored axis as the slice axis; "RAS" turns the volume
            to RAS first. The order of slices follows the header either way: in "native" towards
            right, back and head (apex to base of a heart). As stored where it records no
            orientation.
    """

    spacing: float = 2.8
    unknown_spacing: float = 0.0
    unknown_max_extent: int = 288
    unknown_extent: int = 256
    unknown_zoom: float = 0.5
    mixed_spacing: bool = False
    size: int = 128
    clip_low: float = 0.5
    clip_high: float = 99.5
    window: tuple[float, float] | None = None
    orientation: Literal["native", "RAS"] = "native"

    def __post_init__(self) -> None:
        low, high = _PLAUSIBLE_PIXEL
        problems = []
        for name in ("unknown_max_extent", "unknown_extent", "size"):
            value = getattr(self, name)
            if type(value) is not int or not 8 <= value <= MAX_EXTENT:
                problems.append(f"{name}: expected an integer 8..{MAX_EXTENT}, got {value!r}")
        if not low <= self.spacing <= high:
            problems.append(f"spacing: expected {low}..{high} mm, got {self.spacing!r}")
        if self.unknown_spacing and not low <= self.unknown_spacing <= high:
            got = f"got {self.unknown_spacing!r}"
            problems.append(f"unknown_spacing: expected 0 or {low}..{high} mm, {got}")
        if not 0.01 <= self.unknown_zoom <= 10:
            problems.append(f"unknown_zoom: expected 0.01..10, got {self.unknown_zoom!r}")
        clip = self.clip_low, self.clip_high
        if not 0 <= clip[0] < clip[1] <= 100:
            problems.append(f"clip_low, clip_high: expected 0 <= low < high <= 100, got {clip}")
        if self.window is not None:
            window = tuple(float(value) for value in self.window)  # JSON and YAML make lists of it
            if len(window) != 2 or not -math.inf < window[0] < window[1] < math.inf:
                problems.append(f"window: expected two numbers, low < high, got {self.window!r}")
            else:
                self.window = (window[0], window[1])
        if self.orientation not in ("native", "RAS"):
            problems.append(f"orientation: expected 'native' or 'RAS', got {self.orientation!r}")
        if problems:
            raise ValueError("preprocessing: " + "; ".join(problems))


@dataclass(frozen=True)
class Geometry:
    """How one volume became slices, and all that is needed to go back.

    native_shape: (X, Y, Z) as stored.
    axes: the stored axis that becomes each axis of the slices (Z, H, W).
    flips: which axes of the slices run against the stored ones.
    plane: (H, W) in-plane pixels after resampling.
    offset: where the canvas begins in that plane; negative where the canvas pads.
    size: side of the canvas.
    orientation: axes of the slices, "RAS" or "native".
    """

    native_shape: tuple[int, int, int]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    plane: tuple[int, int]
    offset: tuple[int, int]
    size: int
    orientation: str

    @property
    def native_slices(self) -> tuple[int, int, int]:
        """(Z, H, W) before resampling."""
        z, x, y = self.axes
        return self.native_shape[z], self.native_shape[x], self.native_shape[y]

    def to_slices(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored (X, Y, Z) to oriented slices (Z, H, W) of native size; a view."""
        return array.transpose(self.axes)[self._steps]

    def from_slices(self, slices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of to_slices."""
        return slices[self._steps].transpose(np.argsort(self.axes))

    @property
    def _steps(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)

    def windows(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """What both share: (rows, columns) in the resampled plane, and the same in the canvas."""
        (h, w), (y, x), size = self.plane, self.offset, self.size
        top, left, bottom, right = max(0, y), max(0, x), min(h, y + size), min(w, x + size)
        plane = slice(top, bottom), slice(left, right)
        return plane, (slice(top - y, bottom - y), slice(left - x, right - x))

    def restore(self, scores: Tensor) -> npt.NDArray[np.uint8]:
        """Class scores of the slices to labels of the stored volume.

        scores: (Z, K, size, size), probabilities rather than logits, because they are interpolated
            before the arg-max; outside the canvas is background.
        Returns: (X, Y, Z) uint8.

        Raises:
            ValueError: another shape, or scores that are not finite.
        """
        count, size = self.native_slices[0], self.size
        if scores.ndim != 4 or scores.shape != (count, scores.shape[1], size, size):
            got = tuple(scores.shape)
            raise ValueError(f"expected scores ({count}, classes, {size}, {size}), got {got}")
        scores = scores.detach()
        if not torch.isfinite(scores).all():
            raise ValueError("expected finite scores, got NaN or Inf")
        ends = float(scores.min()), float(scores.max())
        return self.stored(self.restore_slices(scores, *ends))

    def restore_slices(self, scores: Tensor, low: float, high: float) -> npt.NDArray[np.uint8]:
        """Class scores (n, K, size, size) of some slices to labels (n, H, W) of native size.

        low, high: the least and the largest score that there can be; outside the canvas the
            background has the largest, and all others have the least.
        """
        in_plane, in_canvas = self.windows()

        def paste(chunk: slice) -> Tensor:
            part = scores[chunk].float()
            plane = part.new_full((*part.shape[:2], *self.plane), low)
            plane[:, 0] = high
            plane[..., in_plane[0], in_plane[1]] = part[..., in_canvas[0], in_canvas[1]]
            return plane

        shape = (len(scores), scores.shape[1], *self.plane)
        return _argmax_resized(paste, shape, self.native_slices[1:])

    def stored(self, slices: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Labels (Z, H, W) of native size to those of the stored volume (X, Y, Z)."""
        return np.ascontiguousarray(self.from_slices(slices))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Geometry:
        """From `dataclasses.asdict`, also after JSON made lists of the tuples."""
        pairs = ((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())
        return cls(**dict[str, Any](pairs))


@dataclass(frozen=True)
class Preprocessed:
    """Slices of one volume.

    images: (Z, size, size) float32, zero mean and unit deviation over the volume before cropping.
    labels: (Z, size, size) uint8, IGNORE everywhere when there is no label map.
    lost_voxels: labelled native voxels whose centre fell outside the canvas.
    labelled_voxels: native voxels of any class but background.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    geometry: Geometry
    lost_voxels: int
    labelled_voxels: int


def plan(image: Volume, config: PreprocessConfig, name: str = "volume") -> Geometry:
    """Decide axes, in-plane size and crop of a volume (X, Y, Z) from its header.

    Raises DataError when the recorded pixel size is implausible.
    """
    turn = config.orientation == "RAS" and image.orientation is not None
    axes, flips = (2, 0, 1), (_backwards(image), False, False)
    if turn:
        # Row i: the world axis that stored axis i follows, and in which direction.
        ornt = nib.orientations.io_orientation(image.affine)  # type: ignore[no-untyped-call]
        x, y, z = (int(axis) for axis in np.argsort(ornt[:, 0]))
        axes = z, x, y
        flips = bool(ornt[z, 1] < 0), bool(ornt[x, 1] < 0), bool(ornt[y, 1] < 0)
    native = (int(image.array.shape[0]), int(image.array.shape[1]), int(image.array.shape[2]))
    extents = native[axes[1]], native[axes[2]]
    pixel = image.spacing and (image.spacing[axes[1]], image.spacing[axes[2]])
    unit = image.grid.unit if image.grid is not None else ""
    zooms = _zooms(pixel, max(extents), config, name, unit)
    # Rounded half up, never empty: Python's round would make 2.5 and 3.5 pixels differ by 2.
    h, w = (max(1, math.floor(n * zoom + 0.5)) for n, zoom in zip(extents, zooms, strict=True))
    if max(h, w) > MAX_EXTENT:
        raise DataError(f"{name}: resampled to {h} x {w} pixels; check the spacing in its header")
    # Floor division also for a negative difference: one rule for crop and pad, to be inverted.
    offset = (h - config.size) // 2, (w - config.size) // 2
    frame = "RAS" if turn else "native"
    return Geometry(native, axes, flips, (h, w), offset, config.size, frame)


def preprocess(
    image: Volume,
    labels: npt.NDArray[np.uint8] | None,
    config: PreprocessConfig,
    *,
    num_classes: int,
    name: str = "volume",
) -> Preprocessed:
    """Orient, clip, resample, normalise and crop one volume.

    image: array (X, Y, Z) float32. labels: (X, Y, Z) uint8 below num_classes, or None.

    Raises:
        DataError: constant intensities, another label shape, or an implausible spacing.
    """
    if labels is not None and labels.shape != image.array.shape:
        raise DataError(f"{name}: image {image.array.shape} but label {labels.shape}")
    geometry = plan(image, config, name)
    in_plane, in_canvas = geometry.windows()
    canvas = (geometry.native_slices[0], config.size, config.size)

    resampled = _normalised(image.array, geometry, config, name)
    images = np.full(canvas, resampled.min(), dtype=np.float32)
    images[:, in_canvas[0], in_canvas[1]] = resampled[:, in_plane[0], in_plane[1]]

    if labels is None:
        return Preprocessed(images, np.full(canvas, IGNORE, np.uint8), geometry, 0, 0)
    native = np.ascontiguousarray(geometry.to_slices(labels))
    classes = np.arange(num_classes, dtype=np.uint8)[:, None, None]

    def one_hot(chunk: slice) -> Tensor:
        return torch.from_numpy(native[chunk, None] == classes).float()

    shape = (len(native), num_classes, *geometry.native_slices[1:])
    scaled = _argmax_resized(one_hot, shape, geometry.plane)
    pasted = np.zeros(canvas, dtype=np.uint8)
    pasted[:, in_canvas[0], in_canvas[1]] = scaled[:, in_plane[0], in_plane[1]]
    lost = _lost(native, geometry)
    return Preprocessed(images, pasted, geometry, lost, int(np.count_nonzero(native)))


def _normalised(
    array: npt.NDArray[np.float32], geometry: Geometry, config: PreprocessConfig, name: str
) -> npt.NDArray[np.float32]:
    """Clipped, resampled and scaled slices (Z, H, W).

    By percentiles: mean 0 and deviation 1 of each volume, whatever the scanner's unit. By a window:
    the same scale for all volumes, on which values spread evenly over the window would have mean 0
    and deviation 1.
    """
    percentiles = config.clip_low, config.clip_high
    low, high = (float(v) for v in config.window or np.percentile(array, percentiles))
    native = geometry.to_slices(array)
    count, *old = native.shape
    resampled = np.empty((count, *geometry.plane), dtype=np.float32)
    step = max(1, _CHUNK_PIXELS // max(math.prod(old), math.prod(geometry.plane)))
    for first in range(0, count, step):  # copies of a whole CT would take gigabytes
        clipped = np.clip(native[first : first + step], np.float32(low), np.float32(high))
        slices = torch.from_numpy(np.ascontiguousarray(clipped))
        resampled[first : first + step] = _resize(slices[:, None], geometry.plane)[:, 0].numpy()
    mean = float(resampled.mean(dtype=np.float64))
    squares = sum(float(np.square(part - np.float64(mean)).sum()) for part in resampled)
    deviation = math.sqrt(squares / resampled.size)
    if not deviation > 1e-6 * max(abs(low), abs(high)):
        between = "percentiles" if config.window is None else f"ends of the window {config.window}"
        raise DataError(f"{name}: constant intensities between the {between}, nothing to see")
    if config.window is not None:
        mean, deviation = (low + high) / 2, (high - low) / math.sqrt(12)
    for part in resampled:  # in fp64, slice by slice
        part[:] = (part - np.float64(mean)) / deviation
    return resampled


def for_display(slice2d: npt.NDArray[Any], orientation: str = "native") -> npt.NDArray[Any]:
    """One slice (X, Y) as a picture; "RAS" is turned: anterior on top, patient's right at left."""
    picture = slice2d.T
    return picture[::-1, ::-1] if orientation == "RAS" else picture


def _backwards(image: Volume) -> bool:
    """Whether slices are stored from head to feet, and the like, by the header.

    Judged by one direction to which all three body axes lie at 55 degrees, not by the nearest
    axis: the nearest changes among short-axis stacks, which lie at about 45 degrees to two.
    """
    if image.orientation is None:
        return False
    return float(image.affine[:3, 2] @ _SLICES_RUN) < 0


def _zooms(
    pixel: tuple[float, float] | None,
    longer: int,
    config: PreprocessConfig,
    name: str,
    unit: str = "",
) -> tuple[float, float]:
    """In-plane zoom by the recorded pixel size in mm, else by the longer side in pixels."""
    if pixel is None and config.unknown_spacing:
        pixel = config.unknown_spacing, config.unknown_spacing
    if pixel is None:
        shrink = config.unknown_extent / longer if longer > config.unknown_max_extent else 1.0
        return shrink * config.unknown_zoom, shrink * config.unknown_zoom
    low, high = _PLAUSIBLE_PIXEL
    if not low <= min(pixel) <= max(pixel) <= high:
        got = f"{pixel[0]:g} x {pixel[1]:g}"
        why = "check its header"
        if unit:
            why = f"its header gives {unit} (xyzt_units): correct the unit if the numbers are mm"
        elif low <= 1000 * min(pixel) <= 1000 * max(pixel) <= high:
            why += ": the numbers look like metres, so correct the unit (xyzt_units)"
        raise DataError(f"{name}: pixels of {got} mm, expected {low}..{high}; {why}")
    return pixel[0] / config.spacing, pixel[1] / config.spacing


def _argmax_resized(
    scores: Callable[[slice], Tensor], shape: tuple[int, int, int, int], new: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Resize class scores of (Z, K, H, W) `shape` to labels (Z, *new), ties to the lower class.

    Chunk by chunk: the one-hot maps of a large CT would take gigabytes.
    """
    count, classes, *old = shape
    step = max(1, _CHUNK_PIXELS // (classes * max(math.prod(old), math.prod(new))))
    labels = np.empty((count, *new), dtype=np.uint8)
    for first in range(0, count, step):
        chunk = slice(first, min(first + step, count))
        labels[chunk] = _resize(scores(chunk), new).argmax(dim=1).to(torch.uint8).cpu().numpy()
    return labels


def _resize(images: Tensor, plane: tuple[int, int]) -> Tensor:
    """(Z, K, H, W) float32 to (Z, K, *plane); exact where the size stays."""
    if tuple(images.shape[2:]) == plane:
        return images
    return interpolate(images, plane, mode="bilinear", align_corners=False, antialias=True)


def _lost(labels: npt.NDArray[np.uint8], geometry: Geometry) -> int:
    """Labelled voxels of native slices (Z, H, W) whose centre is outside the canvas."""
    inside = []
    for count, extent, start in zip(labels.shape[1:], geometry.plane, geometry.offset, strict=True):
        centres = (np.arange(count) + 0.5) * (extent / count) - start
        inside.append((centres >= 0) & (centres < geometry.size))
    return int(np.count_nonzero(labels) - np.count_nonzero(labels[:, inside[0]][:, :, inside[1]]))
