"""The command line: `python -m benchmarks [COMMAND] [options]`; see README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import read_csv

from .cases import SUITES, SWEEPS, Case
from .measure import Settings
from .report import markdown
from .runner import RESULTS, Options, run, say

SHORT_BUDGET, BUDGET = 0.2, 2.0
GROUPS = {"sweeps": SWEEPS}
COMMANDS = ("run", "overhead", "training", "step", "loading", "report")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = arguments.add_argument
    add("command", nargs="?", default="run", choices=COMMANDS)
    add("--label", help="names the files in results/ (default: the device's type)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    choices = (*SUITES, *GROUPS)
    add("--suites", nargs="+", choices=choices, default=tuple(SUITES), help=", ".join(choices))
    add("--cases", nargs="+", type=Case.parse, default=(), metavar="CASE", help="single cases")
    add("--providers", nargs="+", default=(), metavar="NAME", help="only these")
    add("--budget", type=float, help=f"seconds of rounds per provider and pass ({BUDGET:g})")
    add("--max-rounds", type=int, default=25)
    add("--timeout", type=float, default=90.0, help="seconds for one run, compilation included")
    add("--fresh", action="store_true", help="measure again what the file already holds")
    add("--quick", action="store_true", help="a tiny case in seconds, to see that all works")
    add(
        "--data",
        type=Path,
        help="scans in ACDC's layout for these (default: a phantom)",
    )
    add("--cache", type=Path, help="preprocessed slices for `loading` (default: made and dropped)")
    add("--preset", default="desk", help="of `loading` and `step` (default: desk)")
    add("--views", type=int, default=0, help="of `step` that the encoder is timed on (0: all)")
    add("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    return arguments


def main(words: list[str] | None = None) -> int:
    given = parser().parse_args(words)
    label = given.label or ("quick" if given.quick else torch.device(given.device).type)
    budget = given.budget or (SHORT_BUDGET if given.quick else BUDGET)
    rounds = min(given.max_rounds, 5) if given.quick else given.max_rounds
    settings = Settings(given.device, given.threads, budget, rounds, given.quick)
    path = given.results / f"{label}.csv"
    try:
        if given.command == "overhead":
            from .overhead import measure_overhead

            print(measure_overhead(label, settings, given.results))
            return 0
        if given.command == "training":
            from .training import measure_training

            print(measure_training(label, settings, given.results))
            return 0
        if given.command == "step":
            from .step import measure_step

            data, cache, views = given.data, given.cache, given.views
            print(measure_step(label, settings, given.results, given.preset, data, cache, views))
            return 0
        if given.command == "loading":
            from .loading import measure_loading

            where = (given.preset, given.data, given.cache)
            print(measure_loading(label, settings, given.results, *where))
            return 0
        if given.command == "run":
            run(
                Options(
                    label,
                    settings,
                    [name for suite in given.suites for name in GROUPS.get(suite, [suite])],
                    given.cases,
                    given.providers,
                    given.timeout,
                    given.fresh,
                    given.results,
                )
            )
    except ValueError as error:
        say(f"error: {error}")
        return 2
    table = markdown(read_csv(path))
    write_atomically(path.with_suffix(".md"), table)
    print(table)
    try:
        from .plots import draw
    except ModuleNotFoundError as error:
        say(f"no figures: {error}; install the bench extra")
    else:
        for figure in draw(path):
            say(f"wrote {figure.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
