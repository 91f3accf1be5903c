"""Figures, drawn from the CSV and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from salkernels._shared.tabular import read_csv

from .cases import DESK, PAPER, Case
from .report import Row

# Colour and line by provider, the same in all figures; names that are not here get the rest.
COLOURS = {
    "naive": "#b0413e",
    "gather": "#d98c3f",
    "gram": "#6c757d",
    "salkernels-reference": "#7a6fb0",
    "salkernels-cpu": "#1b7f6b",
    "salkernels-triton": "#2468b2",
    "salkernels-cuda": "#4d9221",
}


def draw(path: Path) -> list[Path]:
    """Every figure that the rows suffice for; returns what was written."""
    rows = [row for row in read_csv(path) if row["status"] == "ok"]
    stem = path.with_suffix("")
    written = []
    for name, rows_of_figure, function in (
        ("samples", _sweep(rows, "samples"), _speed),
        ("window", _sweep(rows, "window"), _speed),
        ("channels", _sweep(rows, "channels"), _speed),
        ("size", _sweep(rows, "height"), _speed),
        ("memory", _sweep(rows, "height"), _memory),
        ("roofline", [row for row in rows if row["case"] == PAPER.key], _roofline),
    ):
        if not rows_of_figure:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        function(axes, rows_of_figure, {"memory": "height", "size": "height"}.get(name, name))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(fontsize=7)
        written.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def _sweep(rows: Sequence[Row], column: str) -> list[Row]:
    """Forward + backward of the cases that differ from the base in this column only.

    Height and width go together. Fewer than two such cases make no line.
    """
    together = ("height", "width") if column == "height" else (column,)
    base = Case.parse(DESK.key)
    fixed = [
        name
        for name in ("samples", "channels", "height", "width", "window", "dtype", "layout")
        if name not in together
    ]
    found = [
        row
        for row in rows
        if row["pass"] == "both" and all(row[name] == str(getattr(base, name)) for name in fixed)
    ]
    return found if len({row[column] for row in found}) > 1 else []


def _lines(axes: Axes, rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> None:
    """One line per provider over the values of a shape column, with percentiles of times."""
    for name in dict.fromkeys(row["provider"] for row in rows):
        line = sorted((row for row in rows if row["provider"] == name), key=lambda r: int(r[x]))
        # A zero (nothing beyond input and gradient) has no place on a logarithmic axis.
        line = [row for row in line if row[y] and float(row[y]) > 0]
        at = [int(row[x]) for row in line]
        values = [float(row[y]) * scale for row in line]
        ours = name.startswith("salkernels-")
        style = "-" if ours else "--"
        (drawn,) = axes.plot(
            at, values, style, marker="o", ms=3, label=name, color=COLOURS.get(name)
        )
        if y == "median_ms":
            low, high = ([float(row[p]) for row in line] for p in ("p20_ms", "p80_ms"))
            axes.fill_between(at, low, high, alpha=0.2, color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({int(row[x]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _about(rows: Sequence[Row], without: Sequence[str]) -> str:
    row = rows[0]
    parts = {
        "samples": f"S = {row['samples']}",
        "channels": f"C = {row['channels']}",
        "height": f"{row['height']} × {row['width']}",
        "window": f"window {row['window']}",
    }
    shape = ", ".join(text for name, text in parts.items() if name not in without)
    return f"{shape}, {row['dtype']}, {row['layout']}; {row['processor']}, {row['threads']} threads"


NAMES = {
    "samples": "samples S",
    "window": "window (pixels)",
    "channels": "channels C",
    "height": "height = width (pixels)",
}


def _speed(axes: Axes, rows: Sequence[Row], column: str) -> None:
    _lines(axes, rows, column, "median_ms")
    axes.set(xlabel=NAMES[column], ylabel="forward + backward (ms)")
    axes.set_title(_about(rows, [column]), fontsize=7)


def _memory(axes: Axes, rows: Sequence[Row], column: str) -> None:
    _lines(axes, rows, column, "peak_mb")
    features = sorted({(int(row[column]), float(row["features_mb"])) for row in rows})
    axes.plot(*zip(*features, strict=True), ":", color="black", label="the features themselves")
    axes.set(xlabel=NAMES[column], ylabel="peak beyond input and gradient (MB)")
    axes.set_title(_about(rows, [column]), fontsize=7)


def _roofline(axes: Axes, rows: Sequence[Row], column: str) -> None:
    """Arithmetic intensity of the definition against the rate reached, under the machine's roof."""
    rates = [(float(row["copy_gb_per_s"]), float(row["gemm_gflop_per_s"])) for row in rows]
    copy, gemm = np.median(rates, axis=0)
    intensity = np.logspace(-1, 3, 200)
    axes.plot(intensity, np.minimum(intensity * copy, gemm), color="black", linewidth=1)
    axes.annotate(f"copy {copy:.3g} GB/s", (0.12, 0.16 * copy), fontsize=7)
    axes.annotate(f"GEMM {gemm:.3g} GFLOP/s", (60, gemm * 1.1), fontsize=7)
    markers = {"forward": "o", "backward": "v", "both": "s"}
    rest = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    for name in dict.fromkeys(row["provider"] for row in rows):
        colour = COLOURS.get(name) or next(rest)
        for row in (row for row in rows if row["provider"] == name):
            at = float(row["gflop_per_s"]) / float(row["gb_per_s"])
            label = name if row["pass"] == "both" else None
            marker = markers[row["pass"]]
            axes.plot(at, float(row["gflop_per_s"]), marker, color=colour, ms=5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_title(
        f"{_about(rows, [])}\ncircle: forward, triangle: backward, square: both", fontsize=7
    )
