"""Tiles of the Triton kernels on real shapes: that of the table, and what is nearest to it."""

from __future__ import annotations

import functools
import itertools
import os
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import ACDC, PAPER, QUICK, Case
from salkernels.backends import get
from salkernels.triton_kernels import config
from salkernels.triton_kernels import tune as tuner
from salkernels.triton_kernels.config import Tile
from salkernels.triton_kernels.offline import Work
from salkernels.triton_kernels.tune import Subject, Tuned

from .record import Context
from .timing import wanted
from .warm import arguments

TILES = "triton_tiles.json"
PATIENCE = 40.0  # seconds until a kernel's candidates have to be compiled


def subjects(cases: tuple[str, ...] = ()) -> list[Subject]:
    """Kernels and shapes in the order of worth."""
    half, scans = replace(PAPER, dtype="bfloat16"), replace(ACDC, order="scans")
    wide = replace(PAPER, window=6)
    order: list[tuple[str, Case]] = [
        ("match", half),
        ("match", PAPER),
        ("gradient", PAPER),
        ("gradient", half),
        ("match", scans),
        ("gradient", scans),
        ("gradient_across", scans),
        ("match", wide),
        ("sum", replace(PAPER, window=3)),
        ("sum", wide),
        ("stream_match", replace(half, window=22)),
        ("match", replace(PAPER, dtype="float16")),
    ]
    return [subject(kernel, case) for kernel, case in order if wanted(case, cases)]


def subject(kernel: str, case: Case) -> Subject:
    make = functools.partial(arguments, "pairs", case)
    return Subject(f"{kernel} {case.key}", kernel, case.torch_dtype, make)


def candidates_work(capability: int, cases: tuple[str, ...] = ()) -> dict[str, Work]:
    """What `warm` compiles for this step."""
    return {
        f"{one.label} {_name(tile)}": tuner.work(one, tile, capability)
        for one in subjects(cases)
        for tile in one.candidates()
    }


def tune(context: Context) -> None:
    """A row for each kernel and shape, and a file for SALKERNELS_TRITON_TILES."""
    if not context.on_gpu:
        _rehearse(context)
        return
    from salkernels.triton_kernels import launch

    os.environ.pop(config.FILE_VARIABLE, None)  # it would hide the tiles that are tried
    capability = launch.capability(torch.empty(0, device="cuda"))
    left = [one for one in subjects(context.cases) if one.label not in context.finished]
    found: list[Tuned] = []
    patience = min(PATIENCE, context.left / 2)
    begin = time.monotonic()
    for one in tuner.tuned(left, capability, patience):
        label = (one.subject if isinstance(one, Tuned) else one[0]).label
        with context.measuring(label) as row:
            if not isinstance(one, Tuned):
                raise one[1]
            found.append(one)
            print(tuner.table(one), flush=True)
            row.update(told(one), at=time.monotonic() - begin)
        _write(context, found, capability)
        context.need(3, "the next kernel")


def told(one: Tuned) -> dict[str, Any]:
    """Of a row."""
    order = sorted(one.times, key=lambda tile: one.times[tile].median)
    return {
        "kernel": one.subject.kernel,
        "dtype": str(one.subject.dtype)[6:],
        "tile": _name(one.first),
        "ms": one.times[one.first].median if one.first in one.times else None,
        "best": _name(one.chosen),
        "best_ms": one.times[one.chosen].median,
        "all": {_name(tile): one.times[tile].median for tile in order},
        "not_compiled": one.missing,
    }


def _name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.block} w{tile.warps} s{tile.stages}"


def _write(context: Context, found: list[Tuned], capability: int) -> None:
    if found:
        config.write(context.folder / TILES, tuner.settled(found, capability))


def _rehearse(context: Context) -> None:
    """The same way with the wall clock of another backend, which knows no tiles."""
    one = subject("match", QUICK)
    name = context.backends[0]
    given = one.make()
    ticks = itertools.count()

    def measure(best_so_far: float) -> tuner.Time:
        start = time.perf_counter()
        get(name).match(*given)
        next(ticks)
        return tuner.Time((time.perf_counter() - start) * 1e3, 1e9)  # nothing but noise

    with context.measuring(one.label, backend=name) as row:
        tiles = one.candidates()
        chosen, times = tuner.best((one.kernel, one.dtype, 90), tiles, measure)
        found = Tuned(one, tiles[0], chosen, times, 0)
        print(tuner.table(found), flush=True)
        row.update(told(found), ok=chosen == tiles[0] and next(ticks) == len(tiles))
        _write(context, [found], 90)
