"""How a call is divided into tiles: the signature that decides it, and the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import Tile
from .geometry import Cut, Extents, Form, Product, Strides

TINY = torch.finfo(torch.float32).tiny
LEAST_ROWS = 32  # of a matrix product, whose inner extent comes in halves
MOST_LANES = 32  # nodes of a tile: a tile has lanes x lanes pairs to look up


class Problem(NamedTuple):
    """A call. A node is a sample: N queries, then, unless they are the same, M keys."""

    query: Tensor  # (G, N, C, H, W)
    key: Tensor | None  # (G, M, C, H, W)
    pairs: Tensor | None  # (P,) int64
    valid: Tensor | None  # (G, V, H, W) bool
    window: tuple[int, int]
    eps: float

    @property
    def num_pairs(self) -> int:
        """P, room that is left over included."""
        if self.pairs is not None:
            return self.pairs.shape[0]
        keys = self.query if self.key is None else self.key
        return self.query.shape[0] * self.query.shape[1] * keys.shape[1]

    @property
    def smallest_norm(self) -> float:
        """An eps whose inverse fp32 can hold."""
        return max(self.eps, TINY)


class Signature(NamedTuple):
    """The properties of a call that decide its layout and its kernels, not data or pairs."""

    query: torch.Size
    key: torch.Size | None
    window: tuple[int, int]
    dtype: torch.dtype
    strides: tuple[Strides, ...]  # of queries and keys, and, backward, of their gradients
    listed: bool  # whether the pairs are a list
    valid: bool  # whether some pixels may take no part
    product: Product
    tiles: tuple[Tile, Tile, Tile]  # of windows in a tile, of larger ones, and of a third kernel

    @property
    def keys(self) -> int:
        return (self.query if self.key is None else self.key)[1]

    @property
    def nodes(self) -> int:
        return self.query[1] + (0 if self.key is None else self.key[1])

    @property
    def map_pixels(self) -> int:
        return self.query[3] * self.query[4]

    @property
    def window_pixels(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def across(self) -> int:
        return ceil(self.query[4], self.window[1])

    @property
    def windows(self) -> int:
        return ceil(self.query[3], self.window[0]) * self.across

    def extents(self, groups_per_tile: int = 1) -> Extents:
        groups, samples, channels, height, width = self.query
        return Extents(
            *(groups, samples, self.keys, channels, height, width),
            *(*self.window, self.across, self.windows, 0, groups_per_tile),
        )

    def form(self, merged: bool = False) -> Form:
        pairs = zip(self.strides[::2], self.strides[1::2], strict=True)
        same = all(query.channel == key.channel for query, key in pairs)
        return Form(self.key is None, merged, same)


@dataclass(frozen=True)
class Layout:
    """How the windows and nodes of a call are cut into tiles."""

    signature: Signature
    tile: Tile
    rows: int  # of a tile
    pixels: int  # of a window, padded to a power of two
    streamed: bool = False  # whether a window of one sample is larger than a tile may be

    @classmethod
    def of(cls, signature: Signature) -> Layout:
        """With tiles for whole windows, or, for windows larger than those, for parts of one."""
        pixels = power_of_two(signature.window_pixels)
        tile = signature.tiles[0]
        if pixels > tile.rows:
            tile = signature.tiles[1]
            return cls(signature, tile, min(tile.rows, max(LEAST_ROWS, pixels)), pixels, True)
        everything = power_of_two(signature.query[0] * signature.nodes * pixels)
        rows = max(LEAST_ROWS, min(tile.rows, everything, MOST_LANES * pixels))
        return cls(signature, tile, rows, pixels)

    @property
    def lanes(self) -> int:
        """Nodes of a tile."""
        return 1 if self.streamed else self.rows // self.pixels

    @property
    def merged(self) -> bool:
        """Whether whole groups fit into a tile."""
        return not self.streamed and self.signature.nodes <= self.lanes

    @property
    def ordered(self) -> bool:
        """Whether it matters which nodes share a tile."""
        return not self.merged and not self.streamed

    @property
    def groups_per_tile(self) -> int:
        return self.lanes // self.signature.nodes if self.merged else 1

    @property
    def groups_of_tiles(self) -> int:
        """Groups, or if they are merged as many as tiles are needed for all."""
        return ceil(self.signature.query[0], self.groups_per_tile)

    @property
    def tiles(self) -> int:
        """Tiles of a group."""
        return 1 if self.merged else ceil(self.signature.nodes, self.lanes)

    @property
    def blocks(self) -> int:
        """Tiles of a window of one sample, if it is streamed."""
        return ceil(self.signature.window_pixels, self.rows) if self.streamed else 1

    def extents(self) -> Extents:
        return self.signature.extents(self.groups_per_tile)

    def form(self) -> Form:
        return self.signature.form(self.merged)

    def cut(self, block: int = 0) -> Cut:
        """With blocks of so many channels, or as many as the tile has."""
        block = block or self.tile.block
        even = self.signature.query[2] % block == 0
        return Cut(self.lanes, self.rows if self.streamed else self.pixels, block, even)


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(0, n - 1).bit_length()


def ceil(n: int, d: int) -> int:
    return -(-n // d)
