"""`python -m tools.gpu`: run all, one step, the summary, or take results over."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from . import __doc__ as about
from .plan import PLAN, REHEARSAL, TOTAL, find
from .record import BEGIN, LEFT_OVER, Context, OutOfTime, read


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m tools.gpu", description=about)
    commands = arguments.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all steps, then the summary")
    limits = f"in all ({TOTAL}; on a CPU {REHEARSAL})"
    run.add_argument("--seconds", type=float, help=limits)
    run.add_argument("--again", action="store_true", help="only what is not done yet")
    run.add_argument("--steps", nargs="+", default=[step.name for step in PLAN], metavar="STEP")
    one = commands.add_parser("step", help="one step, in this process")
    one.add_argument("name")
    one.add_argument("--seconds", type=float, default=1e9)
    told = commands.add_parser("summary", help="of what has been measured")
    taken = commands.add_parser("take", help="copy results to benchmarks/results")
    taken.add_argument("--label", required=True, help="names the files, such as h100")
    for command in (run, one, told, taken):
        command.add_argument("--out", type=Path, default=Path("gpu-results"), help="the folder")
    for command in (run, one):
        command.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return arguments


def main(words: list[str] | None = None) -> int:
    given = parser().parse_args(words)
    try:
        if given.command == "run":
            return run(given)
        if given.command == "step":
            return step(given)
        if given.command == "take":
            from .results import take

            print(*take(given.out, given.label), sep="\n")
            return 0
        print(tell(given.out), end="")
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace) -> int:
    """0 if every step is done and nothing is wrong, else 1; the summary is printed in any case."""
    from .conductor import Conductor
    from .summary import is_bad

    # As an interrupt: the step that runs is in a session of its own, and is not to outlive this.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    folder = given.out.resolve()
    steps = [find(name) for name in given.steps]
    seconds = given.seconds or (TOTAL if given.device == "cuda" else REHEARSAL)
    endings = Conductor(folder, given.device, seconds).run(steps, given.again)
    print(tell(folder), end="", flush=True)
    whole = all(endings[step.name].status == "done" for step in steps)
    return 0 if whole and not any(map(is_bad, read(folder))) else 1


def step(given: argparse.Namespace) -> int:
    chosen = find(given.name)
    try:
        # Imports take seconds, which are the step's, too.
        folder = given.out.resolve()
        chosen.function()(Context(given.name, given.device, folder, given.seconds, BEGIN))
    except OutOfTime as error:
        print(f"{given.name}: out of time before {error}", flush=True)
        return LEFT_OVER
    return 0


def tell(folder: Path) -> str:
    """The summary, which is written to the folder, too, with the timings as tables."""
    from salkernels._shared.files import write_atomically

    from .conductor import read_endings
    from .results import SUMMARY, write_timings
    from .summary import summary

    rows = read(folder)
    write_timings(folder, rows)
    text = summary(rows, read_endings(folder))
    write_atomically(folder / SUMMARY, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
