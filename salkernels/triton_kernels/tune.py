"""Times tiles on the GPU of this machine, prints the best, and writes them for later runs.

    python -m salkernels.triton_kernels.tune --channels 384 --size 44 --window 2
    export SALKERNELS_TRITON_TILES=...        # the path that it prints

Nothing else changes: without the variable the table of `config.py` holds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..backends import triton as backend
from ..reference import Outputs
from . import config, launch
from .config import FILE_VARIABLE, Tile

Key = tuple[str, torch.dtype, int]
DEFAULT_PATH = Path("~/.cache/salkernels/triton_tiles.json")
ROUNDS = 20


def candidates(kernel: str, dtype: torch.dtype, pixels: int = 1) -> list[Tile]:
    """Tiles worth a try that hold a window of so many pixels; the one of the table comes first."""
    first = config.TABLE[kernel, dtype]
    rows: tuple[int, ...]
    small = kernel.startswith(("gradient", "sum")) or dtype == torch.float32
    rows = (32, 64) if small else (64, 128)
    if kernel.startswith(("match", "gradient")):
        rows = tuple(n for n in rows if n >= pixels)  # else the streamed twin would be timed
    grid = itertools.product(rows, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    return [first, *(tile for tile in itertools.starmap(Tile, grid) if tile != first)]


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


class Time(NamedTuple):
    """Of some rounds."""

    median: float  # ms
    noise: float  # ms, half of what the middle half of the rounds spans


def best(
    key: Key, tiles: Sequence[Tile], measure: Callable[[], Time]
) -> tuple[Tile, dict[Tile, Time]]:
    """The fastest tile, and the time of each; one that does not compile or fit is left out.

    The first stays unless another is faster by more than the noise of both: else the choice would
    be another one next time, for nothing.

    Raises:
        RuntimeError: none of them runs.
    """
    times: dict[Tile, Time] = {}
    reason: Exception | None = None
    for number, tile in enumerate(tiles, 1):
        with using(key, tile):
            try:
                times[tile] = measure()
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


def milliseconds(call: Callable[[], object]) -> Time:
    """Of the kernels of a call, without what the host does: by replaying a CUDA graph of it, each
    time after the caches have been overwritten."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    found = []
    for _ in range(ROUNDS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    low, median, high = statistics.quantiles(found, n=4)
    return Time(median, (high - low) / 2)


def calls(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of the set form, by the kernel that takes the time."""
    shape = (1, options.samples, options.size, options.size, options.channels)
    features = torch.randn(shape, device="cuda").to(dtype).movedim(-1, 2)
    scan = torch.arange(options.samples, device="cuda") % 2
    mask = (scan[:, None] == scan) & ~torch.eye(options.samples, device="cuda").bool()
    pairs = mask.flatten().nonzero().squeeze(1)
    window = (min(options.window, options.size),) * 2
    call = (features, None, pairs, None)

    def forward() -> Outputs:
        return backend.match(*call, window, 1e-12)

    found = forward()

    def backward() -> object:
        return backend.match_backward(found.max_sim, *call, *found[1:], window, 1e-12)

    # Tiles of other windows would need other calls: what a window takes is what is tuned.
    rows = window[0] * window[1]
    beyond = options.samples * rows > 2 * config.TABLE["gradient", dtype].rows
    kernel = "stream_match" if rows > config.TABLE["match", dtype].rows else "match"
    return {kernel: forward, "sum" if beyond else "gradient": backward}


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
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for kernel, call in calls(options, dtype).items():
            key = (kernel, dtype, launch.capability(torch.empty(0, device="cuda")))
            tried = candidates(kernel, dtype, options.window**2)
            chosen, times = best(key, tried, functools.partial(milliseconds, call))
            tiles[key] = chosen
            before = times.get(tried[0], Time(float("nan"), 0)).median
            now = times[chosen].median
            print(f"{kernel:15} {dtype}: {now:.4f} ms with {chosen}, was {before:.4f} ms")
            config.write(path, tiles)
    print(f"export {FILE_VARIABLE}={path}")


if __name__ == "__main__":
    main()
