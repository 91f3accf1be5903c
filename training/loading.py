"""Batches from loader processes, which may die or get stuck."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from .config import RunConfig
from .data.sampling import SliceBatch, batches
from .errors import RunError

POLL = 1.0  # seconds between two looks at whether a run that waits was told to stop
TIMED_OUT = "DataLoader timed out"  # how torch's message begins


def steps_of(
    dataset: Dataset[SliceBatch],
    start: int,
    config: RunConfig,
    stopping: Callable[[], bool] = lambda: False,
) -> Generator[list[SliceBatch], None, None]:
    """This process's batches of each step from `start` on.

    stopping: whether the run was told to stop, asked while loaders let it wait; then there are no
    more batches.
    """
    count = config.optim.accumulate
    stop = config.optim.steps * count
    loader = iter(
        batches(dataset, start * count, stop, config.workers, POLL if config.workers else 0)
    )
    source = _patiently(loader, config.loader_warning, stopping) if config.workers else loader
    try:
        while step := list(itertools.islice(source, count)):
            if len(step) < count:  # told to stop in the middle of it
                return
            yield step
    finally:
        # Not left to the garbage collector: a traceback keeps the loader, and at the end of Python
        # processes that ignore SIGTERM would be waited for without end.
        if config.workers:
            _end(loader)


def _patiently(
    loader: Any, warning: float, stopping: Callable[[], bool]
) -> Generator[SliceBatch, None, None]:
    began, said = time.monotonic(), warning
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith(TIMED_OUT):
                raise
            if stopping():
                return
            waited = time.monotonic() - began
            if waited >= said:
                said *= 5
                loaders = ", ".join(str(process.pid) for process in loader._workers)
                tqdm.write(
                    f"warning: no batch for {waited:.0f} s from the loaders (processes {loaders}); "
                    f"are the cache's disk and memory well? Ctrl-C or SIGTERM saves and ends the "
                    f"run",
                    file=sys.stderr,
                )
            continue
        yield batch
        began, said = time.monotonic(), warning


def _end(loader: Any) -> None:
    loader._shutdown_workers()
    for process in loader._workers:
        if process.is_alive():  # stuck, and deaf to SIGTERM
            process.kill()
            process.join(5)


@contextmanager
def loaders_explained() -> Iterator[None]:
    """A loader that the system killed is reported wherever the loop is just then.

    Either the pipe from it breaks under the process that reads, or torch's handler of SIGCHLD
    raises, between any two lines of Python: also while the first error is on its way out.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _of_a_dead_loader(error):
            raise
        raise RunError(
            f"a process that loads slices ended: {error or type(error).__name__}. The last "
            f"checkpoint is intact: lower workers if memory is short, and pass --resume"
        ) from error


def _of_a_dead_loader(error: Exception) -> bool:
    """Not what a living loader raised: torch hands that on as 'Caught ...'."""
    if isinstance(error, RuntimeError):
        return not isinstance(error, RunError) and "DataLoader worker (pid" in str(error)
    return not str(error).startswith("Caught ")
