"""The figures of an experiment, from its results."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.text import unmarked
from .summary import LOOKS, Results

# Ten strong colours, ten pale ones, then fifteen dark and muted ones: an arm has one of its own.
COLOURS = [
    mpl.colors.to_hex(mpl.colormaps[name](i))
    for name, places in (
        ("tab20", (*range(0, 20, 2), *range(1, 20, 2))),
        ("tab20b", (*range(0, 20, 4), *range(2, 20, 4), *range(1, 20, 4))),
    )
    for i in places
]
LEGEND = 2.4  # inches that it takes beside the panels
LINES = ("-", "--", ":")  # of the strong, the pale and the dark ones


def look(number: int) -> tuple[str, str]:
    """Colour and line of an arm by its number; with more arms than colours the lines differ."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], LINES[(place // 10 + turn) % len(LINES)]


def draw(results: Results, folder: Path, name: str, conditions: str) -> list[Path]:
    """All figures that the results allow; returns their paths."""
    drawn: list[Path] = []

    def save(kind: str, figure: Figure | None) -> None:
        if figure is not None:
            columns = int(13 * figure.get_figwidth())
            below = "\n".join(textwrap.wrap(conditions, columns))
            figure.suptitle(f"{results.table.title}\n{below}", fontsize=9)
            path = folder / f"{name}-{kind}.png"
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110)
            drawn.append(path)

    save("dice", dice_by_labelled(results))
    save("classes", classes(results))
    save("differences", differences(results))
    save("curve", curve(results))
    save("collapse", collapse(results))
    return drawn


def dice_by_labelled(results: Results) -> Figure | None:
    """Dice against M, a line for each arm, and the paper's values beside."""
    if not results.scores or len(results.labelled) < 2:
        return None
    figure, (ours, theirs) = _axes(2, width=5.2, sharey=False)
    places = range(len(results.labelled))
    paper = results.paper
    for number, arm in enumerate(results.arms):
        label, colour = results.table.arm(arm).label, look(number)[0]
        offset = 0.04 * (number - (len(results.arms) - 1) / 2)
        points = [(i, s) for i, m in enumerate(results.labelled) if (s := results.summary(arm, m))]
        if points:
            x = [i + offset for i, _ in points]
            errors = [0 if math.isnan(s.std) else s.std for _, s in points]
            ours.errorbar(
                x, [s.mean for _, s in points], errors, color=colour, marker="o", ms=4, capsize=2,
                lw=1.3, label=label,
            )  # fmt: skip
        row = paper.get(arm, {})
        known = [(i, row[m]) for i, m in enumerate(results.labelled) if m in row]
        if known:
            theirs.errorbar(
                [i + offset for i, _ in known], [v[0] for _, v in known], [v[1] for _, v in known],
                color=colour, marker="s", ms=4, capsize=2, lw=1.3, label=label,
            )  # fmt: skip
    for axes, title in ((ours, "here"), (theirs, "paper (full scale)")):
        axes.set(
            title=title,
            xlabel="labelled subjects M",
            ylabel=f"{results.measure}, mean of the classes",
        )
        axes.set_xticks(list(places), ["all" if m == 0 else str(m) for m in results.labelled])
    if not theirs.lines:
        theirs.remove()
    _legend(ours)
    return figure


def classes(results: Results) -> Figure | None:
    """Dice of each class, a panel for each M, bars with the runs as dots."""
    if not results.scores:
        return None
    names = list(results.scores[0].dice)
    width = 0.8 / len(results.arms)
    figure, panels = _axes(
        len(results.labelled), width=max(5, 1.5 + 0.28 * len(names) * len(results.arms))
    )
    for axes, m in zip(panels, results.labelled, strict=True):
        for number, arm in enumerate(results.arms):
            colour = look(number)[0]
            for place, name in enumerate(names):
                values = [score.dice[name] for score in results.select(arm, m)]
                if values:
                    x = place + (number - (len(results.arms) - 1) / 2) * width
                    label = results.table.arm(arm).label if place == 0 else None
                    axes.bar(x, np.mean(values), 0.9 * width, color=colour, alpha=0.7, label=label)
                    axes.plot([x] * len(values), values, ".", color="k", ms=3)
        axes.set_xticks(range(len(names)), [*map(unmarked, names)])
        axes.set(title=f"M = {m or 'all'}", ylim=(0, 1), ylabel=results.measure)
    _legend(*panels)
    return figure


def differences(results: Results) -> Figure | None:
    """Paired differences from the baseline with their intervals; each seed or fold is a dot."""
    baseline = results.table.baseline
    arms = [
        a for a in results.arms if any(results.difference(a, m, baseline) for m in results.labelled)
    ]
    if not arms:
        return None
    width = max(4.4, 7 / len(results.labelled))
    figure, panels = _axes(len(results.labelled), width=width, height=1.9 + 0.32 * len(arms))
    for axes, m in zip(panels, results.labelled, strict=True):
        for row, arm in enumerate(arms):
            colour = look(results.arms.index(arm))[0]
            units = [*results.by_unit(results.gaps(arm, m, baseline)).values()]
            axes.plot(units, [row] * len(units), "o", color=colour, alpha=0.4, ms=4)
            if found := results.difference(arm, m, baseline):
                axes.plot([found.low, found.high], [row, row], color=colour, lw=2)
                axes.plot(found.mean, row, "D", color=colour, ms=6)
        axes.axvline(0, color="0.5", lw=0.8)
        axes.set_yticks(range(len(arms)), [results.table.arm(arm).label for arm in arms])
        axes.invert_yaxis()
        label = results.table.arm(baseline).label
        axes.set(
            title=f"M = {m or 'all'}",
            xlabel=f"{results.measure} less that of\n{label}, same {results.unit}",
        )
    return figure


def curve(results: Results) -> Figure | None:
    """Dice against the setting that a table varies, and the paper's curve."""
    table = results.table
    varied = [table.arm(arm) for arm in results.arms if table.arm(arm).value is not None]
    if not table.varies or not any(
        results.select(arm.name, m) for arm in varied for m in results.labelled
    ):
        return None
    figure, panels = _axes(len(results.labelled), width=5)
    for axes, m in zip(panels, results.labelled, strict=True):
        ours = [(i, s) for i, arm in enumerate(varied) if (s := results.summary(arm.name, m))]
        errors = [0 if math.isnan(s.std) else s.std for _, s in ours]
        axes.errorbar(
            [i for i, _ in ours], [s.mean for _, s in ours], errors, marker="o", capsize=3,
            label="here",
        )  # fmt: skip
        known = [
            (i, results.paper[arm.name][m])
            for i, arm in enumerate(varied)
            if m in results.paper.get(arm.name, {})
        ]
        if known:
            axes.errorbar(
                [i for i, _ in known], [v[0] for _, v in known], [v[1] for _, v in known],
                marker="s", capsize=3, color="0.6", label="paper (full scale)",
            )  # fmt: skip
        without = next((a for a in results.arms if table.arm(a).value is None), None)
        if without and (level := results.summary(without, m)):
            axes.axhline(level.mean, ls=":", color="C0", label=table.arm(without).label)
        axes.set_xticks(range(len(varied)), [f"{arm.value:g}" for arm in varied])
        axes.set(title=f"M = {m or 'all'}", xlabel=table.varies, ylabel=results.measure)
    _legend(*panels)
    return figure


def collapse(results: Results) -> Figure | None:
    """Pre-training of the arms with an alignment loss: LA, its control, how alike pixels are."""
    shown = {
        a: rows for a, rows in results.pretraining.items() if any("la_pairs" in r for r in rows)
    }
    if not shown:
        return None
    panels: list[tuple[str, Callable[[dict[str, float]], float | None]]] = [
        ("LA on pairs of one scan", lambda row: row.get("la_pairs")),
        (f"LA, same / different scans, mean of {LOOKS}", _share),
        ("mean cosine after E", lambda row: row.get("cosine_embedding")),
        ("mean cosine of the encoder", lambda row: row.get("cosine_encoder")),
        ("effective rank after E", lambda row: row.get("rank_embedding")),
        ("effective rank of the encoder", lambda row: row.get("rank_encoder")),
    ]
    seen = [row for rows in shown.values() for row in rows]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in seen)]
    figure, grid = _axes(len(panels), width=3.4, height=4)
    for axes, (title, value) in zip(grid, panels, strict=True):
        for arm, rows in shown.items():
            points = [(row["step"], v) for row in rows if (v := value(row)) is not None]
            if value is _share:  # of single batches, it is all noise
                points = [
                    (step, float(np.mean([v for _, v in points[max(0, i + 1 - LOOKS) : i + 1]])))
                    for i, (step, _) in enumerate(points)
                ]
            colour, style = look(results.arms.index(arm))  # as in the other figures
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, lw=1.3, color=colour,
                    label=results.table.arm(arm).label,
                )  # fmt: skip
        axes.set(title=title, xlabel="step", xscale="log")
        if title.startswith("mean cosine") or "/" in title:
            axes.set_ylim(-0.05, 1.05)
    _legend(*grid)
    return figure


def _share(row: dict[str, float]) -> float | None:
    """LA on slices of one scan as a share of that on slices of different scans.

    Features that all grow alike bring both down: this tells whether the right ones match.
    """
    if "la_pairs" not in row or not row.get("la_control"):
        return None
    return row["la_pairs"] / row["la_control"]


def _legend(*panels: Axes) -> None:
    """To the right of all, with what is in any of them: an arm may not have come to the last."""
    named: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure = panels[0].figure
    assert isinstance(figure, Figure)
    figure.set_figwidth(figure.get_figwidth() + LEGEND)
    figure.legend(
        list(named.values()), list(named), frameon=False, fontsize=8, loc="outside right center"
    )


def _axes(
    count: int, *, width: float, height: float = 3.6, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * count, height + 0.5), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
