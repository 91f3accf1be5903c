"""Drawn cardiac short-axis scans in the ACDC layout, for trying things out without any data.

Lengths are in fields of view: the picture is 1 wide and high whatever its pixels. x runs to the
right and y down, as ACDC is usually shown: the chest wall is on the left, the liver below.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from .nifti import DataError

_VERSION = 1  # raise it whenever the same settings would give other files
_GROUPS = ("NOR", "DCM", "HCM", "MINF", "RV")
_FRAMES = 30  # of the cine that Info.cfg speaks of when none is written

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


def write_phantom(
    root: str | Path,
    *,
    subjects: int = 10,
    slices: int = 8,
    size: int = 96,
    seed: int = 0,
    spacing: tuple[float, float, float] = (1.5, 1.5, 8.0),
    cine_frames: int = 0,
) -> Path:
    """Write `subjects` patients, each with ED and ES frames and their labels; return the root.

    slices: per volume. size: pixels along x and y. spacing: mm along x, y, z.
    cine_frames: also write patientXXX_4d.nii.gz with this many frames, none at 0.
    A phantom with the same settings that is already there is used again.

    Raises:
        ValueError: a setting out of range.
        DataError: the folder holds something else, or a phantom that was not completed.
    """
    if subjects < 1 or slices < 3 or size < 32 or not (cine_frames == 0 or cine_frames >= 4):
        raise ValueError(
            "expected subjects >= 1, slices >= 3, size >= 32 and cine_frames 0 or >= 4, "
            f"got {subjects}, {slices}, {size}, {cine_frames}"
        )
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"expected three positive spacings in mm, got {spacing}")
    steps = [float(step) for step in spacing]
    settings = json.dumps([_VERSION, subjects, slices, size, seed, steps, cine_frames])
    root = Path(root).expanduser()
    mark = root / "phantom.json"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if mark.is_file() and mark.read_text(encoding="utf-8") == settings:
            return root
        raise DataError(
            f"{root}: not empty and not a complete phantom with these settings; "
            "choose another folder, or delete this one"
        )
    for number in range(subjects):
        # One generator per subject: subject 3 is the same in a phantom of 5 and of 50.
        rng = np.random.default_rng((seed, number))
        affine = _affine(rng, steps, (size, size, slices))
        folder, group = root / f"patient{number + 1:03d}", _GROUPS[number % len(_GROUPS)]
        _write_subject(folder, group, _Scene(rng, slices, size), affine, cine_frames)
    mark.write_text(settings, encoding="utf-8")  # last: it says that all is there
    return root


def _write_subject(folder: Path, group: str, scene: _Scene, affine: Affine, cine: int) -> None:
    rng = scene.rng
    heart = _Heart.draw(rng, group)
    frames = cine or _FRAMES
    es = 1 + max(1, round(frames * rng.uniform(0.3, 0.4)))
    folder.mkdir(parents=True)
    series = []
    for frame in range(1, frames + 1) if cine else (1, es):
        # Contraction is 0 at ED and 1 at ES, and relaxes more slowly than it came.
        ahead = (frame - 1) / (es - 1) if frame <= es else (frames + 1 - frame) / (frames + 1 - es)
        image, labels = scene.render(heart, math.sin(0.5 * math.pi * ahead) ** 2)
        series.append(image)
        if frame in (1, es):
            stem = f"{folder.name}_frame{frame:02d}"
            _save(folder / f"{stem}.nii.gz", image, affine)
            _save(folder / f"{stem}_gt.nii.gz", labels, affine)
    if cine:
        _save(folder / f"{folder.name}_4d.nii.gz", np.stack(series, axis=-1), affine)
    text = f"ED: 1\nES: {es}\nGroup: {group}\nHeight: {rng.uniform(150, 190):.1f}\n"
    text += f"NbFrame: {frames}\nWeight: {rng.uniform(50, 100):.1f}\n"
    (folder / "Info.cfg").write_text(text, encoding="utf-8")


def _save(path: Path, array: npt.NDArray[Any], affine: Affine) -> None:
    image: Any = nib.Nifti1Image(array, affine)  # type: ignore[no-untyped-call]
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)


def _affine(rng: np.random.Generator, spacing: list[float], shape: tuple[int, ...]) -> Affine:
    """(4, 4): an oblique stack, as short-axis stacks are, centred some cm from the isocentre."""
    rotation = np.diag([-1.0, -1.0, 1.0])
    for axis, degrees in ((0, 35.0), (1, -30.0), (2, 20.0)):
        angle = math.radians(degrees + rng.uniform(-8, 8))
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        rotation = rotation @ turn
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.asarray(spacing)
    centre = (np.asarray(shape) - 1) / 2
    affine[:3, 3] = rng.uniform(-60, 60, 3) - affine[:3, :3] @ centre
    return affine


@dataclass(frozen=True)
class _Heart:
    """Shape of one subject's heart at ED, and how it moves."""

    x: float  # centre of the LV
    y: float
    angle: float  # direction from the LV to the RV
    radius: float  # of the LV cavity at the base
    wall: float  # thickness of the myocardium
    thin: float  # relative thinning of an infarcted sector
    sector: float  # its direction
    rv: float  # half its length at the base
    squeeze: float  # part of the cavity's radius that is lost at ES
    tilt: tuple[float, float]  # drift of the centre from base to apex
    apex: float  # relative position of the last slice: 1 is the tip
    wobble: tuple[float, float]  # deviation from the circle: oval, three-cornered
    phase: tuple[float, float]

    @classmethod
    def draw(cls, rng: np.random.Generator, group: str) -> _Heart:
        """Normal variation, then what the diagnosis changes."""
        dilated, thick, infarct = (group == name for name in ("DCM", "HCM", "MINF"))
        return cls(
            x=rng.uniform(-0.05, 0.04),
            y=rng.uniform(-0.06, 0.03),
            angle=math.pi + math.radians(rng.uniform(-35, 30)),
            radius=rng.uniform(0.088, 0.108) * (1.18 if dilated else 0.88 if thick else 1.0),
            wall=rng.uniform(0.038, 0.05) * (0.85 if dilated else 1.35 if thick else 1.0),
            thin=rng.uniform(0.35, 0.5) if infarct else 0.0,
            sector=rng.uniform(0, 2 * math.pi),
            rv=rng.uniform(0.12, 0.15) * (1.3 if group == "RV" else 1.0),
            squeeze=rng.uniform(0.12, 0.2) if dilated or infarct else rng.uniform(0.28, 0.4),
            tilt=(rng.uniform(0.0, 0.07), rng.uniform(-0.01, 0.05)),
            apex=rng.uniform(0.88, 0.98),
            wobble=(rng.uniform(0.0, 0.06), rng.uniform(0.0, 0.04)),
            phase=(rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)),
        )


class _Scene:
    """What surrounds the heart of one subject, its contrast and its coil; fixed over the frames."""

    def __init__(self, rng: np.random.Generator, slices: int, size: int) -> None:
        self.rng, self.shape = rng, (slices, size, size)
        axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
        # Slices of one stack are taken in different breath holds, hence the shifts.
        shift = rng.normal(0, 0.006, (2, slices, 1, 1)).astype(np.float32)
        self.x, self.y = axis[:, None] + shift[0], axis[None, :] + shift[1]
        self.depth = np.linspace(0, 1, slices, dtype=np.float32)[:, None, None]  # base to apex
        self.edge = 1.3 / size  # partial volume: borders are this wide
        tone = rng.uniform
        self.fat, self.blood, self.muscle = tone(0.6, 0.95), tone(0.75, 1.05), tone(0.18, 0.32)
        self.lung, self.liver, self.wall = tone(0.04, 0.1), tone(0.25, 0.45), tone(0.15, 0.28)
        self.noise, self.gain = tone(0.02, 0.045), tone(1700, 2500)
        self.texture = _field(rng, self.shape, size // 4) * 0.6 + _field(rng, self.shape, size // 9)
        lean = tone(-0.9, -0.2) * self.x + tone(-0.5, 0.3) * self.y
        self.bias = np.exp(lean + 0.3 * _field(rng, (1, size, size), 3)).astype(np.float32)
        self.background = self._draw_background()

    def _draw_background(self) -> Array:
        """(Z, X, Y): air, chest wall, lungs with vessels, liver, stomach, spine and aorta."""
        x, y, z, rng = self.x, self.y, self.depth, self.rng
        image = np.full(self.shape, 0.01, dtype=np.float32)
        cx, cy = rng.uniform(-0.02, 0.04), rng.uniform(-0.03, 0.06)
        a, b = rng.uniform(0.42, 0.5), rng.uniform(0.5, 0.62)
        turn = math.radians(rng.uniform(-14, 14))
        body = _ellipse(x, y, cx, cy, a, b, turn) + 0.008 * _field(rng, self.shape, 4)
        fat, chest = rng.uniform(0.02, 0.065), rng.uniform(0.02, 0.035)
        self._paint(image, body, self.fat)
        # Fat is thicker in front of the heart, and grows towards the apex.
        self._paint(image, body + fat * (1 + 0.4 * z - 0.8 * x), self.wall)
        cavity = body + fat * (1 + 0.4 * z - 0.8 * x) + chest
        self._paint(image, cavity, self.lung)
        for _ in range(30):
            u, v, r = rng.uniform(-0.1, 0.42), rng.uniform(-0.42, 0.1), rng.uniform(0.003, 0.011)
            near = _ellipse(x, y, u + rng.normal(0, 0.05) * z, v, r, r * rng.uniform(1, 2.5), u * 9)
            self._paint(image, np.maximum(near, cavity), self.blood * rng.uniform(0.3, 0.9))
        # The diaphragm rises towards the apex.
        top = rng.uniform(0.11, 0.18) - rng.uniform(0.0, 0.08) * z + rng.uniform(-0.25, 0.35) * x
        dome = rng.uniform(0.5, 1.6) * (x - rng.uniform(-0.15, 0.1)) ** 2
        belly = np.maximum(cavity, top + dome + 0.02 * _field(rng, self.shape, 4) - y)
        self._paint(image, belly, self.liver * (1 + 0.25 * self.texture))
        for _ in range(16):
            u, v, r = rng.uniform(-0.35, 0.35), rng.uniform(0.2, 0.5), rng.uniform(0.006, 0.05)
            tone = rng.choice([self.blood * 0.8, self.fat * 0.7, self.wall, 0.06, self.liver * 1.4])
            spot = _ellipse(x, y, u, v, r * rng.uniform(1, 2.5), r, rng.uniform(0, 3))
            spot = spot + 0.01 * self.texture + rng.uniform(-0.03, 0.03) * z
            self._paint(image, np.maximum(spot, belly), tone)
        u, v = rng.uniform(0.27, 0.34), rng.uniform(0.15, 0.24)
        spine = np.maximum(_ellipse(x, y, u, v + 0.1, 0.08, 0.07, 0), cavity)
        self._paint(image, spine, self.liver)
        self._paint(image, _ellipse(x, y, u - 0.05, v, 0.035, 0.035, 0), self.blood)
        return image

    def render(
        self, heart: _Heart, contraction: float
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
        """Draw one frame, 0 <= contraction <= 1; image and labels, both (X, Y, Z)."""
        image = self.background.copy()
        # The base comes down in systole: the same slice then shows a part nearer to the apex.
        along = np.clip(self.depth * heart.apex + 0.06 * contraction, 0, 0.995)
        shrink = np.sqrt(1 - along**2.2)
        dx = self.x - heart.x - heart.tilt[0] * along
        dy = self.y - heart.y - heart.tilt[1] * along
        rho, theta = np.hypot(dx, dy), np.arctan2(dy, dx)
        (oval, corners), (first, second) = heart.wobble, heart.phase
        round_ = 1 + oval * np.cos(2 * theta + first) + corners * np.cos(3 * theta + second)
        scar = heart.thin * np.exp(4 * (np.cos(theta - heart.sector) - 1)) * (along > 0.2)
        relaxed = heart.radius * shrink
        wall = heart.wall * (0.6 + 0.4 * shrink) * (1 - scar)
        # The scar does not squeeze. Muscle keeps its volume, so the wall thickens.
        inner = relaxed * (1 - heart.squeeze * contraction * (1 - scar))
        outer = np.sqrt(inner**2 + 0.97 * ((relaxed + wall) ** 2 - relaxed**2))
        cavity, muscle = rho - inner * round_, rho - outer * (0.5 + 0.5 * round_)

        # RV: an ellipse beside the LV, of which the LV cuts a crescent.
        tall = heart.rv * np.sqrt(np.clip(1 - (along / 0.97) ** 2.5, 0.002, 1))
        wide = tall * (0.68 - 0.2 * contraction)
        away = heart.radius * shrink + 0.45 * heart.wall + 0.3 * wide
        c, s = math.cos(heart.angle), math.sin(heart.angle)
        right = _ellipse(dx, dy, away * c, away * s, wide, tall, heart.angle)
        right = right + 0.006 * self.texture * (right > -0.03)

        atrium = _ellipse(dx, dy, 0.2, 0.09, 0.1, 0.07, 0.4) + 0.35 * along
        self._paint(image, atrium, self.blood * 0.9)
        halo = np.minimum(muscle, right) - 0.01 - 0.022 * self.texture  # patches of fat
        self._paint(image, halo, self.fat * 0.6)
        self._paint(image, right - 0.016, self.muscle * 1.1)
        self._paint(image, np.maximum(right, -muscle), self.blood * (0.92 + 0.05 * self.texture))
        self._paint(image, muscle, self.muscle * (1 + 0.1 * self.texture))
        self._paint(image, cavity + 0.008 * np.abs(self.texture), self.blood)
        for at in (heart.angle + 2.2, heart.angle + 4.0):  # papillary muscles, part of the LV
            place = 0.62 * inner
            spot = np.hypot(dx - place * math.cos(at), dy - place * math.sin(at)) - 0.2 * inner
            spot = spot + 0.03 * np.abs(along - 0.5)
            self._paint(image, spot, self.muscle * 1.3)

        labels = np.zeros(self.shape, dtype=np.uint8)
        labels[(right < 0) & (along < 0.9)] = 1
        labels[muscle < 0] = 2
        labels[cavity < 0] = 3
        image = _blur(image * (1 + 0.05 * self.texture)) * self.bias
        real, imaginary = self.rng.normal(0, self.noise, (2, *self.shape)).astype(np.float32)
        magnitude = np.hypot(image + real, imaginary) * self.gain  # Rician
        stored = np.clip(np.rint(magnitude), 0, 4095).astype(np.int16)
        return stored.transpose(1, 2, 0), labels.transpose(1, 2, 0)

    def _paint(self, image: Array, distance: Array, tone: Array | float) -> None:
        """Cover where `distance` is negative, with soft borders."""
        cover = np.clip(0.5 - distance / self.edge, 0, 1)
        image += cover * (tone - image)


def _ellipse(x: Array, y: Array, cx: Any, cy: Any, a: Any, b: Any, angle: float) -> Array:
    """About the distance to an ellipse, negative inside; half-axis `a` points along `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
    return np.asarray((np.hypot(u / a, v / b) - 1) * np.minimum(a, b))


def _field(rng: np.random.Generator, shape: tuple[int, int, int], cells: int) -> Array:
    """Smooth noise of unit size, with about `cells` bumps across the plane; slices are alike."""
    slices, h, w = shape
    coarse = rng.normal(size=(1, 1, max(1, slices // 3), cells, cells)).astype(np.float32)
    smooth = interpolate(torch.from_numpy(coarse), shape, mode="trilinear", align_corners=False)
    return np.asarray(smooth[0, 0].numpy() * 1.6)


def _blur(image: Array) -> Array:
    """In-plane (1, 4, 1) / 6 along x and along y: the point spread of the scanner."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    padded = (padded[:, :-2] + 4 * padded[:, 1:-1] + padded[:, 2:]) / np.float32(6)
    return np.asarray((padded[..., :-2] + 4 * padded[..., 1:-1] + padded[..., 2:]) / np.float32(6))
