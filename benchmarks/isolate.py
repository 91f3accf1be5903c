"""Runs a generator in a fresh child process: a crash, a hang or a memory limit hits only it.

Children are forked from a server that has imported torch but has run nothing: they start in
milliseconds, and no thread pool or CUDA context is ever forked.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
GRACE = 10  # seconds for a child that is done to clean up
MEMORY_SHARE = 0.8  # of what is free: the machine and whoever else is on it must survive a trial


class ChildFailed(Exception):
    """The child did not finish; the message is the reason to record."""


class OutOfTime(ChildFailed):
    """Nothing came from the child within the limit."""


def stream(
    function: Callable[..., Iterator[T]], *args: Any, timeout: float, memory_limit: bool = True
) -> Iterator[T]:
    """Yields what `function(*args)` yields in a child process.

    Args:
        function: a generator function that can be imported by name.
        timeout: seconds to wait for the next item.
        memory_limit: let allocations fail where they would exceed most of the free memory, instead
            of waking the kernel's out-of-memory killer. Not for CUDA, which reserves addresses.

    Raises:
        OutOfTime: no item came in time; the child is killed.
        ChildFailed: it ended early, by a signal or an exception that it did not handle.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, memory_limit, function, args))
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(timeout):
                raise OutOfTime(f"nothing within {timeout:g} s")
            try:
                kind, value = receiver.recv()
            except EOFError:
                process.join()
                raise ChildFailed(_ending(process.exitcode)) from None
            if kind == "end":
                process.join(GRACE)
                return
            if kind == "error":
                raise ChildFailed(value)
            yield value
    finally:
        receiver.close()
        if process.is_alive():
            _kill(process.pid)
        process.join()


def _child(
    sender: Connection, memory_limit: bool, function: Callable[..., Iterator[T]], args: Any
) -> None:
    os.setsid()  # compilers that it starts can be ended with it
    # What peers print while they compile is not ours to show; what they raise is recorded.
    quiet = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(quiet, descriptor)
    if memory_limit:
        _limit_memory()
    try:
        for item in function(*args):
            sender.send(("item", item))
        sender.send(("end", None))
    except BaseException as error:
        sender.send(("error", describe_error(error)))
    finally:
        sender.close()


def describe_error(error: BaseException, limit: int = 300) -> str:
    """Type and first words of an exception, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def _kill(pid: int | None) -> None:
    """The child and all that it started: it leads a session of its own once it runs."""
    if pid is None:
        return
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _limit_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    free = proc_kib("/proc/meminfo", "MemAvailable")
    used = proc_kib("/proc/self/status", "VmData")
    limit = (used + int(free * MEMORY_SHARE)) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def proc_kib(path: str, field: str) -> int:
    """A field of a file in /proc that is given in kB."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(f"{field} is not in {path}")
