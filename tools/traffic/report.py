"""The counts as files: a CSV for each provider, and traffic.md with the tables of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import csv_of_records, markdown_table, read_csv

from .instructions import TOTAL, Count
from .shapes import SHAPES
from .table import CASES, Row

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
TEXT = {"provider", "case", "shape", "phase", "kernel"}  # columns that are no numbers
HEAD = """# Memory traffic of compiled kernels

Counted by an emulator that runs the compiled PTX (sm_80), not measured on a GPU; columns
are explained in `tools/traffic/table.py`, which wrote this.
"""
INSTRUCTIONS = """## Instructions of compiled kernels

Executed warp instructions of the PTX (sm_80) on maps of 44 × 44, channels-last, counted on maps
of a few windows and scaled by the number of windows (`tools/traffic/shapes.py` has the rule).
The issue floor is their time at 4 a clock on 132 multiprocessors at 1.98 GHz, the DRAM floor that
of reading the features once, and writing the gradient once, at 3.0 TB/s. Times are in µs, forward
/ backward; neither floor is a measurement.
"""


def write_rows(provider: str, rows: Iterable[Row], directory: Path = RESULTS) -> None:
    """Replaces the provider's sectors, and writes the tables again."""
    _write(directory / f"traffic-{provider}.csv", Row, [asdict(row) for row in rows])
    _write_tables(directory)


def write_counts(provider: str, rows: Sequence[Count], directory: Path = RESULTS) -> None:
    """Replaces the provider's counts of the shapes in `rows`, and writes the tables again."""
    replaced = {row.shape for row in rows}
    kept = [row for row in read_counts(provider, directory) if row["shape"] not in replaced]
    every = [*kept, *(asdict(row) for row in rows)]
    order = {shape.name: rank for rank, shape in enumerate(SHAPES)}
    every.sort(key=lambda row: order.get(row["shape"], len(order)))
    _write(directory / f"instructions-{provider}.csv", Count, every)
    _write_tables(directory)


def read_counts(provider: str, directory: Path = RESULTS) -> list[dict[str, str]]:
    """The counts that the provider's file has; none where there is no file."""
    path = directory / f"instructions-{provider}.csv"
    return read_csv(path) if path.is_file() else []


def _write(path: Path, kind: type, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, csv_of_records([f.name for f in fields(kind)], rows))


def _write_tables(directory: Path) -> None:
    rows = [row for path in sorted(directory.glob("traffic-*.csv")) for row in read_csv(path)]
    counts = [
        row for path in sorted(directory.glob("instructions-*.csv")) for row in read_csv(path)
    ]
    parts = [HEAD, sectors_table(rows)]
    if counts:
        parts += [INSTRUCTIONS, floors_table(counts), "By kernel:\n", kernels_table(counts)]
    write_atomically(directory / "traffic.md", "\n".join(parts))


def sectors_table(rows: list[dict[str, str]]) -> str:
    """All providers' rows, those of one case and phase beneath each other."""
    order = {case.key: rank for rank, case in enumerate(CASES)}
    rows = sorted(rows, key=lambda row: (order.get(row["case"], 99), row["phase"] != "forward"))
    columns = [field.name for field in fields(Row) if field.name != "kernels"]
    return _markdown(columns, [[row[name] for name in columns] for row in rows])


def floors_table(counts: list[dict[str, str]]) -> str:
    """A row for each shape: the DRAM floor, and each provider's issue floor."""
    totals = [row for row in counts if row["kernel"] == TOTAL]
    providers = sorted({row["provider"] for row in totals})
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in totals):
        of_shape = [row for row in totals if row["shape"] == shape]
        line = [shape, _both(of_shape[:2], "dram_floor_us")]
        for provider in providers:
            own = [row for row in of_shape if row["provider"] == provider]
            line.append(_both(own, "issue_floor_us"))
        lines.append(line)
    return _markdown(["shape", "DRAM floor", *(f"{p} issue floor" for p in providers)], lines)


def kernels_table(counts: list[dict[str, str]]) -> str:
    """Every kernel of every shape."""
    columns = [f.name for f in fields(Count) if f.name != "dram_floor_us"]
    rows = [row for row in counts if row["kernel"] != TOTAL]
    order = {shape.name: rank for rank, shape in enumerate(SHAPES)}
    rows.sort(key=lambda row: order.get(row["shape"], len(order)))  # stable: providers in turn
    return _markdown(columns, [[row[name] for name in columns] for row in rows])


def _both(rows: list[dict[str, str]], column: str) -> str:
    """Forward / backward, or a dash where there is no count."""
    found = {row["phase"]: float(row[column]) for row in rows}
    return f"{found['forward']:.1f} / {found['backward']:.1f}" if len(found) == 2 else "–"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    names = [name.replace("_", " ") for name in columns]
    sides = "".join("l" if name in TEXT else "r" for name in columns)
    return markdown_table([names, *rows], sides) + "\n"
