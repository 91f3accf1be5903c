"""From lines of JSON to the files that `benchmarks/results` keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from salkernels._shared.files import write_atomically

from . import counters
from .conductor import read_endings
from .record import Row, latest, lines
from .summary import summary

TIMINGS, SUMMARY = "timings", "summary.md"
HOME = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def write_timings(folder: Path, rows: Sequence[Row], name: str = TIMINGS) -> None:
    """The timed cases as CSV in the columns of `python -m benchmarks`, and its table."""
    found = [line for row in rows if row["step"] == "time" for line in row.get("rows", [])]
    if not found:
        return
    path = folder / f"{name}.csv"
    path.unlink(missing_ok=True)  # drawn from the lines of JSON each time
    results = report.Results(path, key=(*report.RESULT_KEY, "commit"))
    results.add(found)
    newest = {tuple(row[k] for k in report.RESULT_KEY): row for row in results.rows}
    write_atomically(path.with_suffix(".md"), report.markdown(list(newest.values())))


def take(folders: Sequence[Path], label: str, home: Path = HOME) -> list[Path]:
    """Copies results to `benchmarks/results/<label>*`, and says which files are new.

    Several folders, of runs of one machine, are merged: a row says of which commit it is, and only
    a later one of the same commit replaces it. The summary is that of the latest of each.

    Raises:
        ValueError: there are no results, nothing says on which machine they were measured, or the
            machines differ.
    """
    found = [_of_commits(folder) for folder in folders]
    machines = {machine for rows in found for machine in [_machine(rows)]}
    if len(machines) > 1:
        raise ValueError(
            f"the folders are of different machines, {' and '.join(sorted(machines))}; expected "
            "those of one, and a label for each"
        )
    rows = latest((row for part in found for row in part), by_commit=True)
    runs = [
        {"commit": _commit(part), "steps": [asdict(e) for e in read_endings(folder).values()]}
        for folder, part in zip(folders, found, strict=True)
    ]
    everything = home / f"{label}-gpu.json"
    write_atomically(everything, json.dumps({"runs": runs, "rows": rows}, indent=1) + "\n")
    write_timings(home, rows, label)
    text = summary(latest(rows, by_commit=False), read_endings(folders[-1]))
    write_atomically(home / f"{label}-gpu.md", text)
    taken = [everything, home / f"{label}-gpu.md"]
    taken += [path for path in (home / f"{label}.csv", home / f"{label}.md") if path.exists()]
    for folder in reversed(folders):  # of Nsight Compute the latest
        files = [folder / f"{counters.NAME}.{end}" for end in ("csv", "md")]
        if all(file.exists() for file in files):
            kept = [home / f"{label}-counters{file.suffix}" for file in files]
            return [
                *taken,
                *(Path(shutil.copyfile(*both)) for both in zip(files, kept, strict=True)),
            ]
    return taken


def _of_commits(folder: Path) -> list[Row]:
    """Rows, of which each says its commit; earlier versions wrote it once for all of a run."""
    found = lines(folder)
    if not any("processor" in row for row in found):
        raise ValueError(
            f"{folder} holds no results that name their machine; expected a folder that "
            "scripts/gpu.sh has written"
        )
    known = _commit(found)
    return [row if "commit" in row else {**row, "commit": known} for row in found]


def _commit(rows: Sequence[Row]) -> str | None:
    return next((row.get("commit") for row in rows if "processor" in row), None)


def _machine(rows: Sequence[Row]) -> str:
    return next(str(row["processor"]) for row in rows if "processor" in row)
