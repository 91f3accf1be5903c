"""Compiles, without a GPU, the Triton kernels that the steps launch, into TRITON_CACHE_DIR.

    TRITON_CACHE_DIR=DIR python -m tools.gpu.warm --capability 9.0

Compilation would take most of a GPU's minutes. Triton's own JIT does it, told of a device that is
not there; its cache holds for the same Triton under the same Python only.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.cases import LAYOUTS, Case
from salkernels._pair_list import count_blocks, regroup

from . import negatives, triton_cache
from .inputs import EPS, F64, SMOKE, Call, Form, call
from .record import Context

if TYPE_CHECKING:  # needs Triton, without which a rehearsal does
    from salkernels.triton_kernels.offline import Work

NEARLY_ALIGNED = Form(1, 8, 0, 384, 8, 8, (2, 2), pairs=None)
AROUND = Form(1, 8, 0, 32, 8, 8, (2, 2), pairs=None)  # of the step `graph`
TIMED = ("time", "kernels", "train", "ncu", "host")  # steps that call the cases
NICENESS = 10  # the steps that are timed go first
MAIN = 5  # of them come before the small forms
Job = tuple[str, Case | Form]


class Done(NamedTuple):
    """A line on a call, and whether it went well."""

    name: str
    text: str
    well: bool


def work(steps: Container[str] | None = None, cases: tuple[str, ...] = ()) -> list[Job]:
    """What to compile, in the order of the steps' worth, each once.

    "pairs": the list of a table on the CPU; "mask": room for all, as of a table on the GPU;
    "negatives": the other operator of `wla_contrast`.

    Args:
        steps: that are to follow (default: all).
        cases: parts of the keys of the cases that are to be timed (default: all).
    """
    timed = _of_cases(cases) if steps is None or any(s in steps for s in TIMED) else []
    forms: list[Job] = []
    if steps is None or "smoke" in steps:
        forms += [("form", form) for form in SMOKE if form.dtype != F64]
    if steps is None or "negatives" in steps:
        forms += [("negatives", form) for form in negatives.FORMS]
        forms += [("negatives", case) for case in negatives.timed(True)]
    for form, step in ((NEARLY_ALIGNED, "numerics"), (AROUND, "graph")):
        forms += [("form", form)] if steps is None or step in steps else []
    return list(dict.fromkeys([*timed[:MAIN], *forms, *timed[MAIN:]]))


def _of_cases(cases: tuple[str, ...]) -> list[Job]:
    from .timing import groups

    found: list[Job] = []
    for case, names in groups(True, ["triton"], cases):
        if case.dtype != "float64" and "salkernels-triton" in names:
            found.append(("pairs", case))
            found += [("mask", case)] if "gpumask-triton" in names else []
    return found


def named(jobs: list[Job]) -> dict[str, Work]:
    from salkernels.triton_kernels.offline import BOTH, Work

    return {
        f"{kind} {what.key}": Work(
            functools.partial(arguments, kind, what),
            passes=("negatives",) if kind == "negatives" else BOTH,
        )
        for kind, what in jobs
    }


def arguments(kind: str, what: Case | Form) -> Call:
    """The operator's arguments as the loss would make them, on the CPU."""
    if isinstance(what, Form):
        return call(what, "cpu")
    shape = (what.samples, what.channels, what.height, what.width)
    features = torch.empty(shape, dtype=what.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[what.layout])
    table = ~what.pairs if kind == "negatives" else what.pairs
    places, groups = table.flatten().nonzero().squeeze(1), 1
    if kind != "mask":
        groups = count_blocks(places, what.samples)
        places = regroup(places, what.samples, groups)
    else:
        places = torch.cat((places, places.new_full((what.samples**2 - len(places),), -1)))
    window = (min(what.window, what.height), min(what.window, what.width))
    return Call(features.unflatten(0, (groups, -1)), None, places, None, window, EPS)


def warm(context: Context) -> None:
    """Beside the other steps: what the cache lacks is there by the time that it is needed.

    Where nothing is missing it ends within seconds; the row says how many kernels were.
    """
    if not context.on_gpu:
        context.emit("triton", compiled=0, absent="Triton's kernels are for GPUs")
        return
    from .tune import candidates_work

    os.nice(NICENESS)  # the processes that compile inherit it
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    jobs = named(work(context.steps, context.cases))
    rest = candidates_work(capability, context.cases) if "tune" in context.steps else {}
    folder, begin = triton_cache.folder_in_use(), time.monotonic()
    before = triton_cache.entries(folder)

    def tell(name: str, failed: list[str]) -> None:
        now = triton_cache.entries(folder)
        seconds = time.monotonic() - begin
        context.emit(
            name, found=before, compiled=now - before, failures=failed[:8], seconds=seconds
        )

    failures: list[str] = []
    awaited = set(jobs)
    for done in compiled(jobs | rest, capability, context.left):
        print(done.text, flush=True)
        failures += [] if done.well else [done.text[:160]]
        if done.name in awaited:
            awaited.remove(done.name)
            if not awaited:  # the steps that wait go on
                tell("triton", failures)
    if rest or awaited or not jobs:
        tell("triton and candidates", failures)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu.warm")
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--first", type=int, help="only so many calls")
    parser.add_argument("--tune", action="store_true", help="and the candidates of the step `tune`")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args(words)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("set TRITON_CACHE_DIR to the folder that is to hold the kernels")
    Path(os.environ["TRITON_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)
    capability = int(given.capability.replace(".", ""))
    jobs = named(work()[: given.first])
    if given.tune:
        from .tune import candidates_work

        jobs |= candidates_work(capability)
    failed = 0
    for done in compiled(jobs, capability, given.seconds, given.workers):
        failed += not done.well
        print(done.text, flush=True)
    return 1 if failed else 0


def compiled(
    jobs: Mapping[str, Work], capability: int, seconds: float, workers: int | None = None
) -> Iterator[Done]:
    """Each call as it ends; what does not fit into the time is named at the end."""
    from salkernels.triton_kernels.offline import Compilers

    begin = time.monotonic()
    with Compilers(capability, workers) as compilers:
        names = dict(zip(compilers.submit(jobs.values()), jobs, strict=True))
        try:
            for future in futures.as_completed(list(names), timeout=max(0.0, seconds)):
                name = names.pop(future)
                try:
                    count = future.result()
                except (Exception, BrokenProcessPool) as error:
                    said = " ".join(str(error).split())[:200]
                    yield Done(name, f"{name}: {type(error).__name__}: {said}", False)
                else:
                    text = f"{time.monotonic() - begin:5.0f} s {name}: {count} kernels"
                    yield Done(name, text, True)
        except futures.TimeoutError:  # which is the built-in one from Python 3.11 on
            such = next(iter(names.values()))
            yield Done("", f"out of time before {len(names)} calls, such as {such}", True)


if __name__ == "__main__":
    sys.exit(main())
