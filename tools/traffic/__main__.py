"""The command `python -m tools.traffic`: counts of compiled kernels, without a GPU.

    python -m tools.traffic cuda                       sectors, then instructions at every shape
    python -m tools.traffic triton --shapes paper-fp32 instructions at this shape; other rows stay
    python -m tools.traffic triton --missing           instructions where there is no count yet
    python -m tools.traffic peers                      sectors of late-interaction-kernels

Each shape is written to benchmarks/results as soon as it is counted, so that a run that was
interrupted goes on with --missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

from . import report
from .instructions import TOTAL, count
from .shapes import SHAPES
from .table import CASES, Row

PROVIDERS = {name: f"tools.traffic.{name}" for name in ("cuda", "triton", "peers")}


def main(arguments: list[str] | None = None) -> None:
    """Counts what the command line asks for and writes it."""
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(
        "python -m tools.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("provider", choices=sorted(PROVIDERS))
    parser.add_argument("--shapes", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--missing", action="store_true", help="shapes without a count")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    provider = _load(options.provider)
    chosen = options.shapes or names
    if options.missing:
        done = {row["shape"] for row in report.read_counts(options.provider, options.results)}
        chosen = [name for name in chosen if name not in done]
    if not options.shapes and not options.missing:
        _sectors(options.provider, provider, options.results)
    if hasattr(provider, "passes"):
        _instructions(options.provider, provider, chosen, options.results)


def _load(name: str) -> Any:
    """The provider's module; ends the process with the reason where it cannot run."""
    try:
        module = importlib.import_module(PROVIDERS[name])
    except ModuleNotFoundError as error:
        sys.exit(f"{name}: {error}")
    if (reason := module.obstacle()) is not None:
        sys.exit(f"{name}: {reason}")
    return module


def _sectors(name: str, provider: Any, results: Path) -> None:
    rows: list[Row] = []
    for case in CASES:
        found = provider.run(case)
        rows += found
        for row in found:
            print(row, flush=True)
    report.write_rows(name, rows, results)


def _instructions(name: str, provider: Any, chosen: list[str], results: Path) -> None:
    for shape in SHAPES:
        if shape.name not in chosen:
            continue
        start = time.monotonic()
        rows = count(name, provider.passes(), shape)
        report.write_counts(name, rows, results)
        for row in rows:
            if row.kernel == TOTAL:
                floors = f"issue {row.issue_floor_us:g} us, DRAM {row.dram_floor_us:g} us"
                print(f"{name} {shape.name} {row.phase}: {floors}", flush=True)
        print(f"counted in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
