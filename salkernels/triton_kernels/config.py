"""Tile sizes of the kernels by device, dtype and shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows of a tile, channels of a block, warps, pipeline stages."""

    rows: int
    block: int
    warps: int
    stages: int


def tile_for(kernel: str, itemsize: int, capability: int) -> Tile:
    """The largest tile of a kernel on a device of compute capability 10 · major + minor."""
    if capability == 0:
        return INTERPRETER
    return Tile(64, 64, 4, 3)


INTERPRETER = Tile(64, 128, 4, 1)
