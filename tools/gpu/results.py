"""From lines of JSON to the files that `benchmarks/results` keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from salkernels._shared.files import write_atomically

from .conductor import read_endings
from .record import Row, read

TIMINGS, SUMMARY = "timings.csv", "summary.md"
HOME = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def write_timings(folder: Path, rows: Sequence[Row]) -> None:
    """The timed cases as CSV in the columns of `python -m benchmarks`, and its table."""
    found = [line for row in rows if row["step"] == "time" for line in row.get("rows", [])]
    if not found:
        return
    path = folder / TIMINGS
    path.unlink(missing_ok=True)  # drawn from the lines of JSON each time
    results = report.Results(path)
    results.add(found)
    write_atomically(path.with_suffix(".md"), report.markdown(results.rows))


def take(folder: Path, label: str, home: Path = HOME) -> list[Path]:
    """Copies a folder of results to `benchmarks/results/<label>*`, and says which files are new.

    Raises:
        ValueError: there are no results, or nothing says on which machine they were measured.
    """
    rows = read(folder)
    if not any(row["step"] == "report" and "processor" in row for row in rows):
        raise ValueError(
            f"{folder} holds no results that name their machine; expected a folder that "
            "scripts/gpu.sh has written"
        )
    everything = home / f"{label}-gpu.json"
    endings = [asdict(ending) for ending in read_endings(folder).values()]
    write_atomically(everything, json.dumps({"steps": endings, "rows": rows}, indent=1) + "\n")
    taken = [everything]
    names = {TIMINGS: f"{label}.csv", "timings.md": f"{label}.md", SUMMARY: f"{label}-gpu.md"}
    names["kernels.csv"] = f"{label}-kernels.csv"
    for name, new in names.items():
        if (folder / name).exists():
            taken.append(Path(shutil.copyfile(folder / name, home / new)))
    return taken
