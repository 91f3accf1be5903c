"""Puts figures from `benchmarks/results` into the pages while the site is built.

`<!-- results: NAME -->` becomes a table of cpu.csv: no number of a benchmark is written by hand.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ROOT / "training" / "results"
OURS, PEER = "salkernels-cpu", "gram"
DESK = {"samples": "32", "channels": "128", "height": "24", "window": "2"}
Row = dict[str, str]

_PLACE = re.compile(r"^<!-- results: ([\w-]+) -->$", re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """MkDocs calls this with the files of the site: plots join them.

    Those of benchmarks as benchmarks/*.png, those of experiments as experiments/FOLDER/*.png.
    """
    places = {path: f"benchmarks/{path.name}" for path in sorted(RESULTS.glob("*.png"))}
    for path in sorted(EXPERIMENTS.glob("*/*.png")):
        places[path] = f"experiments/{path.parent.name}/{path.name}"
    for path, place in places.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page; an unknown name is a KeyError."""
    return _PLACE.sub(lambda match: TABLES[match[1]](), markdown)


def providers() -> str:
    """Every provider that ran at the paper's shape, fastest first."""
    rows = [row for row in _rows() if row["suite"] == "paper" and row["layout"] == "channels_last"]
    rows.sort(key=lambda row: float(row["median_ms"]))
    ours = next(row for row in rows if row["provider"] == OURS)
    lines = ["| provider | ms (20 to 80 %) | against ours | memory beyond features and gradient |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for row in rows:
        times = _ratio(row, ours, "median_ms")
        lines.append(f"| {row['provider']} | {_time(row)} | {times} | {_memory(row)} |")
    return "\n".join([*lines, "", _conditions(ours)])


def headline() -> str:
    """The two numbers of the home page: time and memory of the loss, Dice after pre-training."""
    rows = [row for row in _rows() if row["suite"] == "paper" and row["layout"] == "channels_last"]
    ours, peer = (
        next(row for row in rows if row["provider"] == provider) for provider in (OURS, PEER)
    )
    table1, collapse = (
        json.loads((EXPERIMENTS / "desk-acdc" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("table1", "collapse")
    )
    random, best = (
        next(s["mean"] for s in found["summary"] if (s["arm"], s["labelled"]) == (arm, 2))
        for found, arm in ((table1, "random"), (collapse, "sal-noE-frame"))
    )
    lines = ["| | with salkernels | without |", "| --- | ---: | ---: |"]
    lines.append(
        f"| the loss, forward and backward, at the paper's shape on two CPU cores | "
        f"**{_short(ours['median_ms'])} ms**, {_short(ours['peak_mb'])} MB | "
        f"{_short(peer['median_ms'])} ms, {_short(peer['peak_mb'])} MB (window-wise matrix "
        f"products in PyTorch) |"
    )
    lines.append(
        f"| Dice on ACDC from two labelled subjects, five folds, at desk scale | **{best:.3f}**, "
        f"pre-trained by SAL | {random:.3f}, from random weights |"
    )
    return "\n".join(lines)


def layout() -> str:
    """The paper's shape in both memory layouts."""
    return _sweep("layout", lambda row: row["suite"] == "paper")


def sweep(column: str) -> Callable[[], str]:
    """The desk shape with one extent varied."""
    fixed = {key: value for key, value in DESK.items() if key != column}

    def wanted(row: Row) -> bool:
        desk = row["suite"] == "desk" or row["suite"].startswith("sweep")
        return desk and all(row[key] == value for key, value in fixed.items())

    return lambda: _sweep(column, wanted)


TABLES: dict[str, Callable[[], str]] = {
    "providers": providers,
    "headline": headline,
    "layout": layout,
    "window": sweep("window"),
    "samples": sweep("samples"),
    "channels": sweep("channels"),
    "size": sweep("height"),
}


def _rows() -> list[Row]:
    """Forward + backward of every provider that has a time."""
    with (RESULTS / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["pass"] == "both" and row["status"] == "ok"]


def _sweep(column: str, wanted: Callable[[Row], bool]) -> str:
    rows = [row for row in _rows() if wanted(row)]
    peers = {row[column]: row for row in rows if row["provider"] == PEER}
    ours = {row[column]: row for row in rows if row["provider"] == OURS}
    order = sorted(ours, key=lambda value: (len(value), value))
    lines = [
        f"| {column} | pairs | ours, ms (20 to 80 %) | window-wise Gram, ms | ratio | memory |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for value in order:
        row, peer = ours[value], peers.get(value)
        against = (
            "| – | –" if peer is None else f"| {_time(peer)} | {_ratio(peer, row, 'median_ms')}"
        )
        lines.append(f"| {value} | {row['pairs']} | {_time(row)} {against} | {_memory(row)} |")
    return "\n".join([*lines, "", _conditions(ours[order[0]])])


def _time(row: Row) -> str:
    return f"{_short(row['median_ms'])} ({_short(row['p20_ms'])} to {_short(row['p80_ms'])})"


def _memory(row: Row) -> str:
    share = float(row["peak_mb"]) / float(row["features_mb"])
    return f"{_short(row['peak_mb'])} MB ({share:.2f}\N{NO-BREAK SPACE}× the features)"


def _ratio(row: Row, base: Row, column: str) -> str:
    return f"{_short(str(float(row[column]) / float(base[column])))}\N{NO-BREAK SPACE}×"


def _short(number: str) -> str:
    """Three digits, whole above a thousand."""
    value = float(number)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _conditions(row: Row) -> str:
    return (
        f"*Forward + backward, {row['dtype']}, {row['threads']} threads of {row['processor']}; "
        f"torch {row['torch']}, commit {row['commit']}, {row['date']}.*"
    )
