"""Results as CSV, one row per case, provider and pass; tables drawn from the CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import csv_of_records, markdown_table, read_csv

from .cases import THRESHOLD, Case

Row = dict[str, str]

MACHINE = (
    "device", "processor", "cores", "threads", "system", "python", "torch", "versions", "commit",
    "date",
)  # fmt: skip
# Rows that differ in one of these are not comparable: they are measured again, never mixed.
FINGERPRINT = ("device", "processor", "threads", "torch", "versions", "commit")
SHAPE = ("samples", "channels", "height", "width", "window", "pairs", "dtype", "layout")
COLUMNS = (
    "suite", "case", *SHAPE, "provider", "pass", "status", "reason", "rounds", "median_ms",
    "p20_ms", "p80_ms", "peak_mb", "features_mb", "gb_per_s", "gflop_per_s", "floor_ms",
    "times_floor", "copy_gb_per_s", "gemm_gflop_per_s", "loss_error", "grad_error", "first_s",
    "host_us", "graph_ms", "queued", *MACHINE,
)  # fmt: skip
RESULT_KEY = ("case", "provider", "pass")


class Results:
    """A CSV file that is complete after every change.

    Args:
        path: of the file; read if it exists.
        columns: its columns, in order.
        key: the columns that name a row; a row with the same key replaces the older one.
    """

    def __init__(
        self, path: Path, columns: Sequence[str] = COLUMNS, key: Sequence[str] = RESULT_KEY
    ) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)
        self.rows: list[Row] = read_csv(path) if path.exists() else []
        unknown = set(self.rows[0]) - set(self.columns) if self.rows else set()
        if unknown:
            raise ValueError(
                f"{path} has other columns than this version writes, {', '.join(sorted(unknown))}; "
                "use another label, or --fresh"
            )

    def add(self, rows: Iterable[Row]) -> None:
        """Puts the rows in and writes the file."""
        new = [{column: row.get(column, "") for column in self.columns} for row in rows]
        replaced = {self._name(row) for row in new}
        self.rows = [row for row in self.rows if self._name(row) not in replaced] + new
        # Rows of an earlier version lack the columns that came later.
        write_atomically(self.path, csv_of_records(self.columns, self.rows))

    def has(self, case: str, provider: str, machine: Row) -> bool:
        """Whether the file has this provider's answer for the case, machine and commit."""
        return any(
            row["case"] == case
            and row["provider"] == provider
            and all(row[column] == machine[column] for column in FINGERPRINT)
            for row in self.rows
        )

    def _name(self, row: Row) -> tuple[str, ...]:
        return tuple(row[column] for column in self.key)


def number(value: float) -> str:
    """Four significant digits, "" for NaN."""
    return "" if value != value else f"{value:.4g}"


def markdown(rows: Sequence[Row]) -> str:
    """One table per case, fastest first, and the reasons of providers without a time."""
    if not rows:
        return "No results.\n"
    cases = dict.fromkeys(row["case"] for row in rows)
    tables = [_case_table([row for row in rows if row["case"] == case]) for case in cases]
    return "\n".join([_conditions(rows), *tables])


def _conditions(rows: Sequence[Row]) -> str:
    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows))

    return (
        f"{all_of('processor')}; {all_of('threads')} threads; torch {all_of('torch')}; "
        f"commit {all_of('commit')}; {all_of('versions')}.\n\n"
        "Times are medians, with 20th and 80th percentiles for forward + backward. Memory is the "
        "peak beyond\nfeatures and gradient. Floor is max(bytes / copy bandwidth, FLOPs / GEMM "
        "rate), both rates measured\nbeside the providers.\n"
    )


def _case_table(rows: Sequence[Row]) -> str:
    first = rows[0]
    by_provider = {
        name: {row["pass"]: row for row in rows if row["provider"] == name}
        for name in dict.fromkeys(row["provider"] for row in rows)
    }
    timed = {
        name: passes
        for name, passes in by_provider.items()
        if any(row["status"] == "ok" for row in passes.values())
    }
    on_gpu = any(row.get("host_us") for row in rows)
    heading = [
        "provider", "forward ms", "backward ms", "both ms (20–80 %)", "rounds",
        "memory MB (× features)", "GB/s", "GFLOP/s", "× floor", "vs naive", "vs gram",
        *(("host µs", "graph ms", "first call s") if on_gpu else ()),
    ]  # fmt: skip
    lines = [
        f"### {first['suite']}: S = {first['samples']}, C = {first['channels']}, "
        f"{first['height']} x {first['width']}, window {first['window']}, "
        f"{first['pairs']} pairs, {first['dtype']}, {first['layout']}{_variant(first['case'])}\n",
    ]
    ranked = sorted(timed, key=lambda name: _milliseconds(timed[name].get("both")))
    body = [_cells(name, timed[name], by_provider, on_gpu) for name in ranked]
    lines.append(markdown_table([heading, *body], "l" + "r" * (len(heading) - 1)))
    lines += [
        f"\n- {name}, {what}: **{row['status']}**"
        + (f" ({row['reason']})" if row["reason"] else "")
        for name, passes in by_provider.items()
        for what, row in passes.items()
        # A failure of both passes is told once.
        if row["status"] != "ok" and what != "backward"
    ]
    roof = next((row for row in rows if row["copy_gb_per_s"]), None)
    if roof is not None:
        lines.append(
            f"\nCopy {roof['copy_gb_per_s']} GB/s, GEMM {roof['gemm_gflop_per_s']} GFLOP/s.\n"
        )
    return "\n".join(lines).replace("\n\n- ", "\n- ") + "\n"


def _variant(case: str) -> str:
    """The part of a case's key beyond shape, dtype and layout."""
    parsed = Case.parse(case)
    words = {"views": "", "scans": ", scan after scan"}[parsed.order]
    return words if parsed.threshold == THRESHOLD else f"{words}, t = {parsed.threshold:g}"


def _cells(
    name: str, passes: dict[str, Row], by_provider: dict[str, dict[str, Row]], on_gpu: bool
) -> list[str]:
    empty = dict.fromkeys(COLUMNS, "")
    forward, backward, both = (passes.get(p, empty) for p in ("forward", "backward", "both"))
    main = both if both["median_ms"] else forward
    spread = f" ({both['p20_ms']}–{both['p80_ms']})" if both["median_ms"] else ""
    memory = ""
    if main["peak_mb"]:
        share = float(main["peak_mb"]) / float(main["features_mb"])
        memory = f"{main['peak_mb']} ({share:.2f} ×)"

    def gain(over: str) -> str:
        other = _milliseconds(by_provider.get(over, {}).get(main["pass"]))
        mine = _milliseconds(main)
        return f"{other / mine:.3g} ×" if max(other, mine) < float("inf") else ""

    cells = [
        name if both["median_ms"] else f"{name} (forward only)",
        forward["median_ms"], backward["median_ms"], both["median_ms"] + spread, main["rounds"],
        memory, main["gb_per_s"], main["gflop_per_s"], main["times_floor"], gain("naive"),
        gain("gram"),
    ]  # fmt: skip
    if on_gpu:
        # Where the device had to wait for the host, its time is no time of the device alone.
        waits = " (device waits)" if main.get("queued") == "no" else ""
        cells += [f"{main['host_us']}{waits}", main["graph_ms"], main["first_s"]]
    return cells


def _milliseconds(row: Row | None) -> float:
    return float(row["median_ms"]) if row and row["median_ms"] else float("inf")
