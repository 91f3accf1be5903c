"""A plugin for pytest (`-p tools.gpu.told`): the outcome of each test as soon as it has ended.

A run that is cut short has no summary, and under xdist none comes in the seconds that are left.
The lines of JSON go to the file that SALKERNELS_TOLD names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "SALKERNELS_TOLD"
LONGEST = 300


def _tell(**what: Any) -> None:
    path = os.environ.get(VARIABLE)
    if path and not _in_a_worker():
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def _in_a_worker() -> bool:
    """Workers of xdist hand all on to the process that started them, which tells it."""
    return "PYTEST_XDIST_WORKER" in os.environ


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        text = str(report.longreprtext).strip()
        said = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        reason = " ".join(said or text.splitlines()[-1:])
        _tell(test=report.nodeid, outcome="failed", reason=reason[:LONGEST])
        if not _in_a_worker():
            print(f"\nFAILED {report.nodeid}: {reason[:LONGEST]}", flush=True)
    elif report.when == "call" or report.skipped:
        _tell(test=report.nodeid, outcome=report.outcome)


def pytest_collection_finish(session: pytest.Session) -> None:
    _tell(total=len(session.items))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    _tell(total=len(ids))


def progress(path: Path) -> dict[str, Any]:
    """Of a file of such lines: counts, the share that has ended, and which have failed and why."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    outcomes: dict[str, tuple[str, str]] = {}
    total = 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut off
            continue
        total = max(total, row.get("total", 0))
        if "test" in row and outcomes.get(row["test"], ("",))[0] != "failed":
            outcomes[row["test"]] = (row["outcome"], row.get("reason", ""))
    counts = {
        name: sum(outcome == name for outcome, _ in outcomes.values())
        for name in ("passed", "failed", "skipped")
    }
    failures = [
        f"{t}: {reason}" for t, (outcome, reason) in outcomes.items() if outcome == "failed"
    ]
    return {**counts, "share": len(outcomes) / total if total else 0.0, "failures": failures}
