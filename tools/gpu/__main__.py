"""`python -m tools.gpu`: run all, one step, the summary, or take results over."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import __doc__ as about
from .plan import BESIDE, PLAN, REHEARSAL, TOTAL, find
from .record import BEGIN, LEFT_OVER, Context, Expired, OutOfTime, read

AGAIN = 0.5  # seconds until it is interrupted again
LATE = 1.0  # seconds after its time at which a step is interrupted


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser("python -m tools.gpu", description=about)
    commands = arguments.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all steps, then the summary")
    limits = f"in all ({TOTAL}; on a CPU {REHEARSAL})"
    run.add_argument("--seconds", type=float, help=limits)
    run.add_argument("--again", action="store_true", help="only what is not done yet")
    named = "which, in this order: STEP or STEP:SECONDS (all but tune)"
    names = [step.name for step in PLAN]
    run.add_argument("--steps", nargs="+", default=names, metavar="STEP", help=named)
    run.add_argument("--cold", action="store_true", help="compile nothing in the background")
    one = commands.add_parser("step", help="one step, in this process")
    one.add_argument("name")
    one.add_argument("--seconds", type=float, default=1e9)
    one.add_argument("--beside", nargs="+", default=[], help="the steps of the run")
    told = commands.add_parser("summary", help="of what has been measured")
    taken = commands.add_parser("take", help="copy results to benchmarks/results")
    taken.add_argument("--label", required=True, help="names the files, such as h100")
    several = "folders of runs on one machine, the earliest first"
    taken.add_argument("--out", type=Path, nargs="+", default=[Path("gpu-results")], help=several)
    for command in (run, one, told):
        command.add_argument("--out", type=Path, default=Path("gpu-results"), help="the folder")
    for command in (run, one):
        shapes = "only shapes whose key has one of these parts, such as S64 or w22 (time, kernels,"
        shapes += " ncu, tune)"
        command.add_argument("--cases", nargs="+", default=[], metavar="PART", help=shapes)
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
    beside = None if given.device == "cpu" or given.cold else BESIDE
    if any(step.name == BESIDE.name for step in steps):
        beside = None
    conductor = Conductor(folder, given.device, seconds, given.cases)
    endings = conductor.run(steps, given.again, beside)
    print(tell(folder), end="", flush=True)
    whole = all(endings[step.name].status == "done" for step in steps)
    return 0 if whole and not any(map(is_bad, read(folder))) else 1


def step(given: argparse.Namespace) -> int:
    chosen = find(given.name)
    folder = given.out.resolve()
    options = {"cases": tuple(given.cases), "steps": tuple(given.beside)}
    try:
        # Imports take seconds, which are the step's, too.
        with expiring(given.seconds - (time.monotonic() - BEGIN) + LATE):
            context = Context(chosen.name, given.device, folder, given.seconds, BEGIN, **options)
            chosen.function()(context)
    except OutOfTime as error:
        print(f"{given.name}: out of time before {error}", flush=True)
        return LEFT_OVER
    except Expired:
        print(f"{given.name}: out of time in the middle of a measurement", flush=True)
        return LEFT_OVER
    return 0


@contextmanager
def expiring(seconds: float) -> Iterator[None]:
    """Raises Expired inside after so long: a measurement may take longer than anyone thought."""

    def expire(number: int, frame: object) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expire)
    # And again: raised in a callback, which cannot pass it on, it is lost.
    signal.setitimer(signal.ITIMER_REAL, max(0.1, min(seconds, 1e6)), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
