"""Compiles kernels into Triton's cache, in processes beside this one and without a GPU.

Triton compiles one kernel after the other, at the first launch of each, which takes seconds. Here
its own JIT is told of a device that is not there: launches compile, and do not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import triton as backend
from . import config, launch, launch_lse
from .config import Tile

Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[int, int], float]
BOTH = ("forward", "backward")
NICENESS = 10  # whoever times something meanwhile goes first
SEEN: list[Any] = []  # kernels of the call that is being compiled
LINKING = [True]  # whether Triton's C functions can be built here, too: with the driver's library


class Work(NamedTuple):
    """A call whose kernels are compiled.

    Args:
        make: the operator's arguments on the CPU; contents do not matter. Must be picklable.
        passes: "forward", "backward" or both; "negatives": both passes of `window_lse`.
        tiles: that hold instead of those of the table, as in `config.OVERRIDES`.
    """

    make: Callable[[], Arguments]
    passes: tuple[str, ...] = BOTH
    tiles: tuple[tuple[tuple[str, torch.dtype, int], Tile], ...] = ()


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

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("unset TRITON_INTERPRET: in the interpreter nothing is compiled")
    driver.set_active(AbsentDevice(capability))
    launch.capability = lambda x: capability
    plain = JITFunction.run

    def run(self: Any, *words: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Not returned: what a launcher keeps it launches at the next call of the signature.
        SEEN.append(plain(self, *words, grid=grid, warmup=True, **options))

    JITFunction.run = run


def compile_work(work: Work) -> int:
    """In a process that pretends: the number of different kernels of the call."""
    SEEN.clear()
    before = config.OVERRIDES.copy()
    config.OVERRIDES.update(work.tiles)
    try:
        problem = launch.Problem(*work.make())
        if "negatives" in work.passes:
            negatives(problem)
        found = backend.outputs(problem.query, problem.key, problem.pairs, problem.window)
        if "forward" in work.passes:
            launch.forward(problem, *found)
        if "backward" in work.passes:
            gradient = torch.empty_like(problem.query)
            other = None if problem.key is None else torch.empty_like(problem.key)
            launch.backward(problem, found.max_sim, *found[1:], gradient, other)
    finally:
        config.OVERRIDES.clear()
        config.OVERRIDES.update(before)
    kernels = {kernel.hash: kernel for kernel in SEEN if kernel is not None}
    for kernel in kernels.values():
        link(kernel)
    return len(kernels)


def negatives(problem: launch.Problem) -> None:
    """Launches both passes of `window_lse`."""
    query = backend.as_rows(problem.query)
    key = None if problem.key is None else backend.as_rows(problem.key)
    problem = problem._replace(query=query, key=key)
    lse = torch.empty(*query.shape[:2], *query.shape[3:])
    launch_lse.forward(problem, 1.0, lse)
    grads = torch.empty_like(query), None if key is None else torch.empty_like(key)
    launch_lse.backward(problem, 1.0, lse, lse, *grads)


def link(kernel: Any) -> None:
    """The C function that launches the kernel, which Triton compiles and keeps, too."""
    if not LINKING[0]:
        return
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
    except Exception:  # no driver or compiler on this machine, or another Triton
        LINKING[0] = False


class Compilers:
    """Processes that compile; ended with all that they have not begun on leaving the block."""

    def __init__(self, capability: int, workers: int | None = None) -> None:
        self.capability = capability
        self.workers = workers or max(1, (os.cpu_count() or 1) - 2)
        self.pool = self._pool()

    def _pool(self) -> ProcessPoolExecutor:
        # Spawned: what Triton takes for its device stays with them, and CUDA survives no fork.
        return ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=_begin, initargs=(self.capability,)
        )

    def restart(self) -> None:
        """After one of them has crashed; what was submitted is lost."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = self._pool()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for process in list((self.pool._processes or {}).values()):
            process.terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, work: Iterable[Work]) -> list[Future[int]]:
        """In this order; each gives the number of its kernels."""
        return [self.pool.submit(compile_work, one) for one in work]


def _begin(capability: int) -> None:
    os.nice(NICENESS)
    torch.set_num_threads(1)
    pretend(capability)
