"""Tile sizes of the kernels: a table by kernel and dtype, and a file that may replace it.

How the table came about, without a GPU: of the tiles whose code spills no register on any of
sm_80, 90, 100 and 120 (offline compilation, `tests/test_triton_offline.py`), the ones that read
shared memory least (compiled sm_80 code, counted by an emulator; `benchmarks/results`).

- fp32 takes one pipeline stage: with more, the loads land in shared memory in a layout that two
  uses pull apart, and every product reads it with bank conflicts (2.7 times the wavefronts).
- Four warps, not eight: Triton gives each warp rows of its own, and 64 rows are four warps' worth;
  with eight, each product is computed twice.
- 64 rows: with 128 the fp32 backward spills, and a tile of 16 samples at ω = 2 already holds the
  slices of one scan that are paired.

On a machine with a GPU, `python -m salkernels.triton_kernels.tune` times more of them and writes a
file; `SALKERNELS_TRITON_TILES` names it.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._shared.files import write_atomically


class Tile(NamedTuple):  # found by its hash in each call, which tuples have at once
    """How a kernel is cut: rows of a tile, channels of a block, warps, pipeline stages."""

    rows: int
    block: int
    warps: int
    stages: int


TABLE = {
    ("match", torch.float32): Tile(64, 16, 4, 1),
    ("match", torch.bfloat16): Tile(64, 64, 4, 3),
    ("match", torch.float16): Tile(64, 64, 4, 3),
    ("gradient", torch.float32): Tile(64, 32, 4, 1),
    ("gradient", torch.bfloat16): Tile(64, 64, 4, 1),
    ("gradient", torch.float16): Tile(64, 32, 4, 1),
    ("gradient_across", torch.float32): Tile(64, 32, 4, 1),
    ("gradient_across", torch.bfloat16): Tile(64, 64, 4, 1),
    ("gradient_across", torch.float16): Tile(64, 32, 4, 1),
    ("stream_match", torch.float32): Tile(64, 16, 4, 1),
    ("stream_match", torch.bfloat16): Tile(64, 64, 4, 3),
    ("stream_match", torch.float16): Tile(64, 64, 4, 3),
    ("sum", torch.float32): Tile(32, 32, 4, 1),
    ("sum", torch.bfloat16): Tile(32, 64, 4, 1),
    ("sum", torch.float16): Tile(32, 64, 4, 1),
    ("norm", torch.float32): Tile(32, 64, 4, 1),
    ("norm", torch.bfloat16): Tile(32, 64, 4, 1),
    ("norm", torch.float16): Tile(32, 64, 4, 1),
}
# Where the code of an architecture is different enough: by the major number of its capability.
OVERRIDES = {
    # Two parts of the weights, and of what they multiply: a few registers too many on sm_90.
    ("gradient_across", torch.float16, 9): Tile(64, 16, 4, 1),
    # Tensor memory and its copies cost registers on sm_100: the tiles above would spill.
    ("gradient", torch.bfloat16, 10): Tile(64, 32, 4, 1),
    # Its weights fit into registers only where eight warps share them; they multiply twice.
    ("gradient_across", torch.bfloat16, 10): Tile(64, 32, 8, 1),
    ("stream_match", torch.bfloat16, 10): Tile(64, 32, 4, 3),
    ("stream_match", torch.float16, 10): Tile(64, 32, 4, 3),
}
KERNELS = tuple(dict.fromkeys(kernel for kernel, _ in TABLE))
# The interpreter's time goes by the operation, whatever its size.
INTERPRETER = Tile(256, 128, 4, 1)
FILE_VARIABLE = "SALKERNELS_TRITON_TILES"


def tile_for(kernel: str, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of a kernel on compute capability 10 · major + minor; 0 is the interpreter."""
    return tiles_for((kernel,), dtype, capability)[0]


def tiles_for(kernels: tuple[str, ...], dtype: torch.dtype, capability: int) -> tuple[Tile, ...]:
    """The tiles of several kernels: each call asks, and the environment takes time to answer."""
    if capability == 0:
        return (INTERPRETER,) * len(kernels)
    path = os.environ.get(FILE_VARIABLE)
    measured = read(path) if path else {}
    return tuple(
        measured.get((kernel, dtype, capability))
        or OVERRIDES.get((kernel, dtype, capability // 10))
        or TABLE[kernel, dtype]
        for kernel in kernels
    )


@cache
def read(path: str) -> dict[tuple[str, torch.dtype, int], Tile]:
    """The tiles of a file that `write` wrote."""
    try:
        rows = json.loads(Path(path).read_text())
        return {
            (row["kernel"], getattr(torch, row["dtype"]), int(row["capability"])): Tile(
                **{name: int(row[name]) for name in ("rows", "block", "warps", "stages")}
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{FILE_VARIABLE} names {path}, which is no table of tiles ({error!r}); write one with "
            "`python -m salkernels.triton_kernels.tune`, or unset the variable"
        ) from error


def write(path: Path, tiles: dict[tuple[str, torch.dtype, int], Tile]) -> None:
    """The table as JSON."""
    rows: list[dict[str, Any]] = [
        {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "capability": capability}
        | tile._asdict()
        for (kernel, dtype, capability), tile in tiles.items()
    ]
    write_atomically(path, json.dumps(rows, indent=1) + "\n")
