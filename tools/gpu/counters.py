"""What Nsight Compute counted, as a table: what each kernel waits for.

A scheduler can issue one instruction a cycle. `issue %` says how often it did, `if all were used`
how long the kernel would take if it always did, and `waits` for how many cycles on average a warp
stood before its next instruction, by the longest reasons.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import csv_of_records, markdown_table

NAME = "counters"  # of the files: .csv and .md
COLUMNS = (
    "case", "backend", "kernel", "µs", "if all were used", "issue %", "occupancy %", "DRAM %",
    "registers", "blocks", "waves", "million instructions", "waits",
)  # fmt: skip
_METRICS = {
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "DRAM %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "waves": "launch__waves_per_multiprocessor",
}
_DURATION, _INSTRUCTIONS = "gpu__time_duration.sum", "smsp__inst_executed.sum"
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
_MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
MOST_WAITS, LEAST_WAIT = 3, 0.5  # of a kernel; cycles


def labels_of(said: str) -> list[str]:
    """Case and backend of each launch, from what ncu and its target say in turns."""
    labels: list[str] = []
    waiting = 0
    for line in said.splitlines():
        if line.startswith("==PROF== Profiling"):
            waiting += 1
        elif waiting and re.fullmatch(r"S\d+-\S+ \w+", line.strip()):
            labels += [line.strip()] * waiting
            waiting = 0
    return labels + ["? ?"] * waiting


def rows_of(raw: str, labels: Sequence[str]) -> list[dict[str, str]]:
    """Of ncu's page `raw`, one row for each launch."""
    lines = list(csv.reader(raw.splitlines()))
    start = next((i for i, line in enumerate(lines) if "Kernel Name" in line), len(lines))
    if start + 1 >= len(lines):
        return []
    names, units = lines[start], dict(zip(lines[start], lines[start + 1], strict=False))
    found = []
    for number, line in enumerate(lines[start + 2 :]):
        launch = dict(zip(names, line, strict=False))
        case, _, backend = (labels[number] if number < len(labels) else "? ?").partition(" ")
        found.append({"case": case, "backend": backend, **_row(launch, units)})
    return found


def _row(launch: dict[str, str], units: dict[str, str]) -> dict[str, str]:
    def number(metric: str) -> float:
        return float(launch.get(metric, "nan").replace(",", "") or "nan")

    microseconds = number(_DURATION) * _MICROSECONDS.get(units.get(_DURATION, "us"), 1.0)
    row = {"kernel": launch["Kernel Name"].split("(")[0], "µs": f"{microseconds:.1f}"}
    row |= {name: f"{number(metric):.3g}" for name, metric in _METRICS.items()}
    row["blocks"] = f"{number(_METRICS['blocks']):.0f}"
    row["if all were used"] = f"{microseconds * number(_METRICS['issue %']) / 100:.1f}"
    row["million instructions"] = f"{number(_INSTRUCTIONS) / 1e6:.3g}"
    stalls = [(number(name), m[1]) for name in launch if (m := _STALL.fullmatch(name))]
    # "selected" is the cycle in which an instruction goes out.
    waits = [(c, why) for c, why in sorted(stalls, reverse=True) if why != "selected"]
    row["waits"] = ", ".join(
        f"{why.replace('_', ' ')} {cycles:.1f}"
        for cycles, why in waits[:MOST_WAITS]
        if cycles >= LEAST_WAIT
    )
    return row


def write(folder: Path, rows: Sequence[dict[str, str]], name: str = NAME) -> None:
    """As CSV and as Markdown."""
    write_atomically(folder / f"{name}.csv", csv_of_records(COLUMNS, rows))
    table = [COLUMNS, *([row[column] for column in COLUMNS] for row in rows)]
    write_atomically(folder / f"{name}.md", markdown_table(table, "lll" + "r" * 9 + "l") + "\n")
