"""Draws the pictures of the documentation with the package itself: `python docs/draw.py`.

The slices are those of a generated phantom; no network is trained. The features of a pixel are the
grey values around it, without their mean, which is enough to see what is matched with what.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import salkernels
from salkernels.plots import outline_windows
from salkernels.training.data.datasets import DATASETS, read_scan
from salkernels.training.data.phantom import write_phantom

IMAGES = Path(__file__).parent / "images"
WINDOWS = (1, 2, 4, 6, 12, 24)
SIDE = 24  # of the feature map: the cropped slice at a third of its resolution
PATCH = 7  # side of the square of grey values that describes a pixel
T = 0.35


class Slices(NamedTuple):
    """Three slices (SIDE, SIDE): a slice, one that it forms a pair with, and a stranger's."""

    first: Tensor
    near: Tensor
    other: Tensor


def main(out: Path = IMAGES) -> list[Path]:
    """Draw all pictures into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    slices = phantom_slices()
    figures = {
        "loss-windows.svg": windows(height=10, width=13, window=4),
        "loss-matches.png": matches(slices, window=6),
        "loss-window-size.png": window_sizes(slices),
        "loss-pairs.svg": pairs(T),
    }
    # Fixed ids and no date: the same picture is the same file.
    with rc_context({"svg.hashsalt": "salkernels", "svg.fonttype": "none"}):
        for name, figure in figures.items():
            undated = {"Date": None} if name.endswith(".svg") else None
            figure.savefig(out / name, dpi=110, metadata=undated)
    return [out / name for name in figures]


def phantom_slices() -> Slices:
    """Slices two apart of one scan, and the slice at the same depth of another subject's."""
    with tempfile.TemporaryDirectory() as folder:
        root = write_phantom(folder, subjects=2, slices=10, size=96, seed=3)
        info = DATASETS["acdc"]
        scans = [read_scan(scan, info)[0].array for scan in info.find(root) if scan.role == "ED"]
    volumes = [torch.from_numpy(np.ascontiguousarray(scan.transpose(2, 1, 0))) for scan in scans]
    field = [volume[:, 12:84, 12:84] / volume.amax() for volume in volumes]  # the heart's part
    small = [F.avg_pool2d(volume[:, None], 3)[:, 0] for volume in field]
    return Slices(small[0][4], small[0][6], small[1][4])


def features(image: Tensor) -> Tensor:
    """(H, W) -> (1, PATCH², H, W): the grey values around each pixel, without their mean."""
    padded = F.pad(image[None, None], [PATCH // 2] * 4, mode="replicate")
    patches = F.unfold(padded, PATCH).unflatten(2, image.shape)
    return patches - patches.mean(dim=1, keepdim=True)


def windows(height: int, width: int, window: int) -> Figure:
    """How windows tile a map that they do not divide, and how `align` counts their pixels."""
    # Every pixel has a direction of its own, so it matches itself: argmax is its own number.
    unique = torch.eye(height * width).reshape(1, height * width, height, width)
    _, number = salkernels.align(unique, unique, window)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across = -(-width // window)
    place = (row // window * across + column // window).numpy()
    colour = np.stack((place / (place.max() + 1), 0.25 + 0 * place, 1 + 0 * place), axis=-1)
    figure, axes = _figure(1, width=6.5, height=5.1)
    axes[0].imshow(hsv_to_rgb(colour))
    for y in range(height):
        for x in range(width):
            axes[0].text(x, y, f"{number[0, y, x]}", ha="center", va="center", fontsize=8)
    outline_windows(axes[0], height, width, (window, window), "black")
    axes[0].set_title(f"{height} × {width} map, ω = {window}: the numbers are those of argmax")
    return figure


def matches(slices: Slices, window: int) -> Figure:
    """A slice, the one it is matched with, where the matches lie and how good they are."""
    found = salkernels.align(features(slices.first), features(slices.near), window)
    figure = salkernels.plot_matches(slices.first, slices.near, found, window, every=3)
    for ax, title in zip(figure.axes, ("query slice", "key slice, two further"), strict=False):
        ax.set_title(title)
    return figure


def window_sizes(slices: Slices) -> Figure:
    """The loss of a true pair and of a control at every window size, and its map at some."""
    shown = (2, 6, SIDE)
    figure, axes = _figure(len(shown) + 1, width=12, height=3.4)
    for ax, window in zip(axes, shown, strict=False):
        similarity = salkernels.align(features(slices.first), features(slices.near), window)[0][0]
        ax.imshow((1 - similarity).numpy(), cmap="magma", vmin=0, vmax=1)
        outline_windows(ax, SIDE, SIDE, (window, window))
        whole = " (whole map)" if window == SIDE else ""
        ax.set_title(f"ω = {window}{whole}: {float((1 - similarity).mean()):.3f}")
    query = features(slices.first)
    for label, key in (("same scan, two apart", slices.near), ("another subject", slices.other)):
        losses = [float(salkernels.wla_loss(query, features(key), w)) for w in WINDOWS]
        axes[-1].plot(range(len(WINDOWS)), losses, marker="o", label=label)
    axes[-1].set_axis_on()
    axes[-1].set_xticks(range(len(WINDOWS)), [str(w) for w in WINDOWS])
    axes[-1].set(xlabel="window size ω in pixels", title="loss", ylim=(0, None))
    axes[-1].legend(frameon=False, fontsize=9)
    return figure


def pairs(t: float) -> Figure:
    """Which samples of a batch are pairs of LA and positives of GP: two scans, two views each."""
    index = torch.tensor([0, 2, 4, 6, 1, 2, 5, 8]).repeat(2)
    depth = torch.tensor([8] * 4 + [10] * 4).repeat(2)
    volume = torch.tensor([0] * 4 + [1] * 4).repeat(2)
    matrices = {
        f"slice_pairs, t = {t}: pairs of LA": salkernels.slice_pairs(volume, index, depth, t),
        f"positional_positives, t = {t}: GP": salkernels.positional_positives(
            index.double() / depth, t
        ),
    }
    names = [
        f"{'AB'[scan]}{number}{view}"
        for number, scan, view in zip(
            index.tolist(), volume.tolist(), ["·"] * 8 + ["′"] * 8, strict=True
        )
    ]
    figure, axes = _figure(2, width=10, height=5.2)
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        ax.set_axis_on()
        ax.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1.5)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_title(f"{title}, {int(matrix.sum())} ordered")
        for edge in (3.5, 7.5, 11.5):
            ax.axhline(edge, color="grey", linewidth=0.7)
            ax.axvline(edge, color="grey", linewidth=0.7)
    return figure


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.set_axis_off()
    return figure, list(axes)


if __name__ == "__main__":
    print("\n".join(str(path) for path in main(*map(Path, sys.argv[1:2]))))
