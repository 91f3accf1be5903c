"""Times tiles on the GPU of this machine, prints the best, and writes them for later runs.

    python -m salkernels.triton_kernels.tune --channels 384 --size 44 --window 2
    export SALKERNELS_TRITON_TILES=...        # the path that it prints

Nothing else changes: without the variable the table of `config.py` holds. All tiles are compiled in
parallel, on the other cores, while those that are ready are timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import triton as backend
from . import config, launch
from .config import FILE_VARIABLE, Tile
from .layout import power_of_two
from .offline import Arguments, Compilers, Work

Key = tuple[str, torch.dtype, int]
DEFAULT_PATH = Path("~/.cache/salkernels/triton_tiles.json")
MOST = 12  # candidates of a kernel
ROUNDS, LOOK = 20, 2  # of a candidate; after so many, one that is out of the question is left
OUT_OF_THE_QUESTION = 1.3  # times the best so far
WARM = 0.03  # seconds of calls before the rounds: an idle GPU takes a while to reach its clock
FLUSH_BYTES = 256 << 20
PATIENCE = 120.0  # seconds at a kernel
FORWARD = ("match", "stream_match", "norm")


class Subject(NamedTuple):
    """A kernel and the call by which it is tuned.

    Args:
        label: for people.
        kernel: as in `config.TABLE`.
        make: the operator's arguments, on the CPU; must be picklable.
    """

    label: str
    kernel: str
    dtype: torch.dtype
    make: Callable[[], Arguments]

    @property
    def passes(self) -> str:
        return "forward" if self.kernel in FORWARD else "backward"

    def candidates(self) -> list[Tile]:
        height, width = self.make()[4]
        return candidates(self.kernel, self.dtype, height * width)


class Time(NamedTuple):
    """Of some rounds."""

    median: float  # ms
    noise: float  # ms, half of what the middle half of the rounds spans


class Tuned(NamedTuple):
    """What came of a subject; the first candidate is the one of the table."""

    subject: Subject
    first: Tile
    chosen: Tile
    times: dict[Tile, Time]
    missing: int  # candidates that were not compiled in time


def candidates(kernel: str, dtype: torch.dtype, pixels: int = 1, most: int = MOST) -> list[Tile]:
    """Tiles worth a try that hold a window of so many pixels: the one of the table, and what is
    nearest to it."""
    first = config.TABLE[kernel, dtype]
    small = kernel.startswith(("gradient", "sum")) or dtype == torch.float32
    rows: tuple[int, ...] = (32, 64, 128) if small else (64, 128)
    if kernel.startswith(("match", "gradient")):
        # Else the streamed twin would be timed.
        rows = tuple(n for n in rows if n >= power_of_two(pixels))
    grid = itertools.starmap(Tile, itertools.product(rows, (16, 32, 64), (4, 8), (1, 2, 3)))
    # Four warps have no registers for so many rows.
    fitting = (tile for tile in grid if not (small and tile.rows == 128 and tile.warps == 4))
    # Of those equally near, the larger: they read less.
    others = sorted(
        (tile for tile in fitting if tile != first), key=lambda t: (_distance(t, first), -t.rows)
    )
    return [first, *others[: most - 1]]


def _distance(tile: Tile, first: Tile) -> float:
    """Steps between them; twice the rows with twice the warps is one: each warp does the same."""
    rows, warps, block = (
        math.log2(getattr(tile, name) / getattr(first, name)) for name in ("rows", "warps", "block")
    )
    together = max(abs(rows), abs(warps)) if rows * warps > 0 else abs(rows) + abs(warps)
    return together + abs(block) + abs(tile.stages - first.stages)


@contextmanager
def using(key: Key, tile: Tile) -> Iterator[None]:
    """Calls inside take this tile."""
    before = config.OVERRIDES.copy()
    kernel, dtype, capability = key
    config.OVERRIDES[kernel, dtype, capability // 10] = tile
    try:
        yield
    finally:
        config.OVERRIDES.clear()
        config.OVERRIDES.update(before)


def work(subject: Subject, tile: Tile, capability: int) -> Work:
    """What is compiled for a candidate."""
    key = (subject.kernel, subject.dtype, capability // 10)
    return Work(subject.make, (subject.passes,), ((key, tile),))


def best(
    key: Key, tiles: Sequence[Tile], measure: Callable[[float], Time]
) -> tuple[Tile, dict[Tile, Time]]:
    """The fastest tile, and the time of each; one that does not compile or fit is left out.

    The first stays unless another is faster by more than the noise of both: else the choice would
    be another one next time, for nothing.

    Args:
        measure: is told the best median so far, in ms.

    Raises:
        RuntimeError: none of them runs.
    """
    times: dict[Tile, Time] = {}
    reason: Exception | None = None
    for number, tile in enumerate(tiles, 1):
        with using(key, tile):
            try:
                times[tile] = measure(min((t.median for t in times.values()), default=math.inf))
                said = "{:.4f} ms, ±{:.4f}".format(*times[tile])
            except Exception as error:  # out of shared memory or registers, in many words
                reason = error
                said = f"does not run: {str(error).partition(chr(10))[0]}"
        print(f"{key[0]} {number}/{len(tiles)} {tile}: {said}", file=sys.stderr, flush=True)
    if not times:
        raise RuntimeError(f"no tile of {key[0]} runs on this device; the last said: {reason}")
    fastest, first = min(times, key=lambda tile: times[tile].median), tiles[0]
    if first in times:
        gain = times[first].median - times[fastest].median
        if gain <= times[first].noise + times[fastest].noise:
            fastest = first
    return fastest, times


def milliseconds(call: Callable[[], object], best_so_far: float = math.inf) -> Time:
    """Of the kernels of a call, without what the host does: by replaying a CUDA graph of it, each
    time after the caches have been overwritten."""
    call()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    until = time.monotonic() + WARM
    while time.monotonic() < until:
        _replayed(graph)
    found: list[float] = []
    for _ in range(ROUNDS):
        found.append(_replayed(graph))
        if len(found) == LOOK and min(found) > OUT_OF_THE_QUESTION * best_so_far:
            break
    del kept
    low, median, high = statistics.quantiles(found, n=4)
    return Time(median, (high - low) / 2)


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    # Read, and not written: lines that wait to be written back would cost the call bandwidth. It
    # keeps the device busy until the graph is queued, too.
    torch.sum(_buffer(), dim=0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@functools.cache
def _buffer() -> Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device="cuda")


def call_of(subject: Subject, device: str) -> Callable[[], object]:
    """The pass that the subject's kernel belongs to, on random features."""
    query, key, pairs, valid, window, eps = subject.make()
    generator = torch.Generator(device).manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        made = torch.empty_like(x, device=device)  # keeps the strides
        return made.copy_(torch.randn(x.shape, generator=generator, device=device))

    given = (
        drawn(query),
        None if key is None else drawn(key),
        None if pairs is None else pairs.to(device),
        None if valid is None else valid.to(device),
    )

    def forward() -> tuple[Tensor, ...]:
        return tuple(backend.match(*given, window, eps))

    if subject.passes == "forward":
        return forward
    _, max_sim, argmax, norm = forward()
    return lambda: backend.match_backward(max_sim, *given, max_sim, argmax, norm, window, eps)


def tuned(
    subjects: Sequence[Subject],
    capability: int,
    patience: float = PATIENCE,
    workers: int | None = None,
) -> Iterator[Tuned | tuple[Subject, Exception]]:
    """Times the candidates of each subject, in order; of one that cannot be timed, why.

    Args:
        patience: seconds until the candidates of a subject have to be compiled; those that are not
            are left out.
    """
    with Compilers(capability, workers) as compilers:
        tried = [subject.candidates() for subject in subjects]
        jobs = [
            compilers.submit(work(subject, tile, capability) for tile in tiles)
            for subject, tiles in zip(subjects, tried, strict=True)
        ]
        for number, (subject, tiles) in enumerate(zip(subjects, tried, strict=True)):
            futures = jobs[number]
            print(f"{subject.label}: compiling {len(tiles)} tiles", file=sys.stderr, flush=True)
            wait(futures, timeout=patience)
            for future in futures:
                future.cancel()
            if any(map(_broke, futures)):  # a compiler that crashes takes all others with it
                compilers.restart()
                jobs[number + 1 :] = [
                    compilers.submit(work(later, tile, capability) for tile in found)
                    for later, found in zip(
                        subjects[number + 1 :], tried[number + 1 :], strict=True
                    )
                ]
            ready = [t for t, f in zip(tiles, futures, strict=True) if t == tiles[0] or _well(t, f)]
            key = (subject.kernel, subject.dtype, capability)
            try:
                call = call_of(subject, "cuda")
                chosen, times = best(key, ready, functools.partial(milliseconds, call))
            except Exception as error:
                yield subject, error
                continue
            missing = sum(not future.done() or future.cancelled() for future in futures)
            yield Tuned(subject, tiles[0], chosen, times, missing)


def _broke(future: Future[int]) -> bool:
    if future.cancelled() or not future.done():
        return False
    return isinstance(future.exception(), BrokenProcessPool)


def _well(tile: Tile, future: Future[int]) -> bool:
    if future.cancelled() or not future.done():
        return False
    if (error := future.exception()) is not None:
        said = " ".join(str(error).split())[:120]
        print(f"{tile} does not compile: {said}", file=sys.stderr, flush=True)
    return error is None


def settled(found: Iterable[Tuned], capability: int) -> dict[Key, Tile]:
    """One tile for each kernel and dtype: the one with the smallest geometric mean of the times of
    all its subjects, each relative to that of the table's tile."""
    by_key: dict[Key, list[Tuned]] = {}
    for one in found:
        key = (one.subject.kernel, one.subject.dtype, capability)
        by_key.setdefault(key, []).append(one)
    return {key: _together(several) for key, several in by_key.items()}


def _together(several: Sequence[Tuned]) -> Tile:
    if len({one.chosen for one in several}) == 1:
        return several[0].chosen
    common = set.intersection(*(set(one.times) for one in several)) or {several[0].chosen}

    def mean(tile: Tile) -> float:
        ratios = [
            one.times[tile].median / one.times[one.first].median
            for one in several
            if tile in one.times and one.first in one.times
        ]
        return statistics.geometric_mean(ratios) if ratios else math.inf

    return min(common, key=mean)


def arguments(dtype: torch.dtype, samples: int, channels: int, size: int, window: int) -> Arguments:
    """Of a batch whose samples come from two scans in turns; each is paired with its own scan's."""
    features = torch.empty(1, samples, size, size, channels, dtype=dtype).movedim(-1, 2)
    scan = torch.arange(samples) % 2
    mask = (scan[:, None] == scan) & ~torch.eye(samples, dtype=torch.bool)
    edge = min(window, size)
    return features, None, mask.flatten().nonzero().squeeze(1), None, (edge, edge), 1e-12


def subjects_of(options: argparse.Namespace) -> Iterator[Subject]:
    """Forward and backward of the set form, by the kernels that take the time."""
    for dtype in (getattr(torch, name) for name in options.dtypes):
        sizes = (options.samples, options.channels, options.size, options.window)
        make = functools.partial(arguments, dtype, *sizes)
        # Tiles of other windows would need other calls: what a window takes is what is tuned.
        pixels = power_of_two(min(options.window, options.size) ** 2)
        rows = config.TABLE["gradient", dtype].rows
        kernels = ["stream_match" if pixels > config.TABLE["match", dtype].rows else "match"]
        if options.samples * pixels > launch.MOST_TILES * rows:
            kernels.append("sum")
        else:
            kernels.append("gradient")
            if options.samples * pixels > rows:
                kernels.append("gradient_across")
        for kernel in kernels:
            yield Subject(f"{kernel} {str(dtype)[6:]}", kernel, dtype, make)


def table(one: Tuned) -> str:
    """Candidates from the fastest on."""
    lines = [f"{one.subject.label}: {one.chosen}, of {len(one.times)} that run"]
    for tile in sorted(one.times, key=lambda tile: one.times[tile].median):
        mark = "*" if tile == one.chosen else " "
        note = "  the table's" if tile == one.first else ""
        shape = (
            f"{tile.rows:4} rows {tile.block:4} channels {tile.warps} warps {tile.stages} stages"
        )
        median, noise = one.times[tile]
        lines.append(f" {mark} {shape}  {median:.4f} ms ±{noise:.4f}{note}")
    if one.missing:
        lines.append(f"   {one.missing} were not compiled in time")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--size", type=int, default=44, help="height and width of the maps")
    parser.add_argument("--window", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH)
    options = parser.parse_args()
    reason = backend.status() or ("the interpreter has no times" if backend.INTERPRETED else None)
    if reason is not None:
        sys.exit(f"nothing to tune: {reason}")
    os.environ.pop(FILE_VARIABLE, None)  # it would hide the tiles that are tried
    path = options.out.expanduser()
    tiles = dict(config.read(str(path))) if path.exists() else {}
    capability = launch.capability(torch.empty(0, device="cuda"))
    found: list[Tuned] = []
    for one in tuned(list(subjects_of(options)), capability):
        if not isinstance(one, Tuned):
            print(f"{one[0].label}: {one[1]}", file=sys.stderr)
            continue
        print(table(one), flush=True)
        found.append(one)
        config.write(path, tiles | settled(found, capability))
    print(f"export {FILE_VARIABLE}={path}")


if __name__ == "__main__":
    main()
