"""Compiles, without a GPU, the Triton kernels that the steps launch, into TRITON_CACHE_DIR.

    TRITON_CACHE_DIR=DIR python -m tools.gpu.warm --capability 9.0

Compilation would take most of a GPU's minutes. Triton's own JIT does it, told of a device that is
not there; its cache holds for the same Triton under the same Python only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import LAYOUTS, Case
from salkernels._pair_list import count_blocks, regroup

from .inputs import EPS, F64, SMOKE, Call, Form, call

NEARLY_ALIGNED = Form(1, 8, 0, 384, 8, 8, (2, 2), pairs=None)
AROUND = Form(1, 8, 0, 32, 8, 8, (2, 2), pairs=None)  # of the step `graph`
Work = tuple[str, Case | Form]
SEEN: list[Any] = []  # kernels of the call that is being compiled


def work() -> list[Work]:
    """What to compile, in the order of the steps' worth, each once.

    "pairs": the list of a table on the CPU; "mask": room for all, as of a table on the GPU.
    """
    from .timing import groups

    found: list[Work] = []
    for case, names in groups(True, ["triton"]):
        if case.dtype != "float64" and "salkernels-triton" in names:
            found.append(("pairs", case))
            found += [("mask", case)] if "gpumask-triton" in names else []
    found += [("form", form) for form in SMOKE if form.dtype != F64]
    found += [("form", form) for form in (NEARLY_ALIGNED, AROUND)]
    return list(dict.fromkeys(found))


def arguments(kind: str, what: Case | Form) -> Call:
    """The operator's arguments as the loss would make them, on the CPU."""
    if isinstance(what, Form):
        return call(what, "cpu")
    shape = (what.samples, what.channels, what.height, what.width)
    features = torch.empty(shape, dtype=what.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[what.layout])
    places, groups = what.pairs.flatten().nonzero().squeeze(1), 1
    if kind == "pairs":
        groups = count_blocks(places, what.samples)
        places = regroup(places, what.samples, groups)
    else:
        places = torch.cat((places, places.new_full((what.samples**2 - len(places),), -1)))
    window = (min(what.window, what.height), min(what.window, what.width))
    return Call(features.unflatten(0, (groups, -1)), None, places, None, window, EPS)


class AbsentDevice:
    """What Triton's JIT asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def pretend(capability: int) -> None:
    """From here on launches of this process compile and do not run; `SEEN` gets the kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from salkernels.triton_kernels import launch

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("unset TRITON_INTERPRET: in the interpreter nothing is compiled")
    driver.set_active(AbsentDevice(capability))
    launch.capability = lambda x: capability
    plain = JITFunction.run

    def run(self: Any, *words: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Not returned: what a launcher keeps it launches at the next call of the signature.
        SEEN.append(plain(self, *words, grid=grid, warmup=True, **options))

    JITFunction.run = run


def compile_one(kind: str, what: Case | Form) -> int:
    """Both passes of one call, where launches compile; the number of different kernels."""
    from salkernels.backends import triton as backend
    from salkernels.triton_kernels import launch

    SEEN.clear()
    given = arguments(kind, what)
    problem = launch.Problem(*given)
    found = backend.outputs(given.query, given.key, given.pairs, given.window)
    launch.forward(problem, *found)
    gradient = torch.empty_like(given.query)
    other: Tensor | None = None if given.key is None else torch.empty_like(given.key)
    launch.backward(problem, found.max_sim, *found[1:], gradient, other)
    return len({kernel.hash for kernel in SEEN if kernel is not None})


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu.warm")
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--first", type=int, help="only so many calls")
    given = parser.parse_args(words)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("set TRITON_CACHE_DIR to the folder that is to hold the kernels")
    capability = int(given.capability.replace(".", ""))
    jobs = work()[: given.first]
    failed = 0
    for text, well in compiled(jobs, capability, given.seconds):
        failed += not well
        print(text, flush=True)
    return 1 if failed else 0


def compiled(jobs: list[Work], capability: int, seconds: float) -> Iterator[tuple[str, bool]]:
    """A line for each call, and whether it went well; what does not fit into the time is named."""
    begin = time.monotonic()
    # In processes of their own: what Triton takes for its device stays with them.
    pool = ProcessPoolExecutor(
        mp_context=get_context("spawn"), initializer=pretend, initargs=(capability,)
    )
    names = {pool.submit(compile_one, *job): f"{job[0]} {job[1].key}" for job in jobs}
    try:
        for future in as_completed(names, timeout=seconds):
            name = names.pop(future)
            try:
                count = future.result()
            except (Exception, BrokenProcessPool) as error:
                yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", False
            else:
                yield f"{time.monotonic() - begin:5.0f} s {name}: {count} kernels", True
    except futures.TimeoutError:  # which is the built-in one from Python 3.11 on
        yield f"out of time before {len(names)} calls, such as {next(iter(names.values()))}", True
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
