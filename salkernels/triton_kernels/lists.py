"""From tensors to launches, backward beyond two tiles: what terms.py and sum.py are given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import Tile
from .geometry import Strides
from .gradient import Terms
from .launcher import SMALL, Launcher, list_of_pairs, maps_of, planner
from .layout import Layout, Problem, Signature, ceil, power_of_two
from .plan import Partners, partners_kernel
from .sum import sum_kernel
from .terms import Lists, Reach, count_kernel, list_kernel

ROWS = 128  # of a program that makes lists: one for each of its threads
WORD = 64  # bits
ELEMENTS = 1024  # pixels x pairs of a program that counts terms
CACHE_BYTES = 160 << 10  # of a first-level cache, that a window's rows may take
PROGRAMS = 1056  # that keep a GPU busy: 8 for each multiprocessor of an H100


class BackwardByLists:
    """The launches of a signature's backward; see terms.py."""

    def __init__(self, signature: Signature) -> None:
        self.sizes, form = signature.extents(), signature.form()
        self.lines = signature.query[0] * signature.windows
        bits = 16 if signature.window_pixels < 1 << 16 else 32
        self.reach = _reach(signature, bits)
        self.map_pixels = signature.map_pixels
        pixels = self.reach.words * (WORD // bits)
        block = min(32, power_of_two(pixels))
        self.pairs_each = ELEMENTS // block
        self.count_blocks = ceil(pixels, block) * signature.windows
        self.count = Launcher(
            count_kernel, SMALL, FORM=form, PIXELS=block, PAIRS=self.pairs_each, BITS=bits
        )
        blocks = self.reach.room // ROWS
        self.list = Launcher(
            list_kernel, SMALL, self.lines * blocks, FORM=form, ROWS=ROWS, BITS=bits
        )
        self.sum, self.shares = _summation(signature, self.lines, self.reach.room)
        nodes = (signature.query[0], signature.nodes)
        self.partners_shape = (2, *nodes, self.reach.partners)
        self.partners = Launcher(
            partners_kernel, Tile(0, 0, 1, 1), nodes[0] * nodes[1], FORM=form, NODES=128
        )
        self.plan = planner(Layout.of(signature), ordered=False)

    def __call__(
        self,
        problem: Problem,
        saved: Terms,
        norm: Tensor,
        grad_query: Tensor,
        grad_key: Any,
        stream: int,
    ) -> None:
        reach, sizes, pairs = self.reach, self.sizes, problem.num_pairs
        eps, listed = problem.smallest_norm, list_of_pairs(problem)
        lists = self._lists(norm, pairs)
        programs = ceil(pairs, self.pairs_each) * self.count_blocks
        given = (saved, norm, listed, lists, reach, sizes, eps, pairs)
        self.count(*given, stream=stream, programs=programs)
        partners = self._partners(listed, norm, pairs, stream)
        self.list(saved, norm, partners, lists, reach, sizes, eps, pairs, stream=stream)
        maps, grads = maps_of(problem.query, problem.key), maps_of(grad_query, grad_key)
        self.sum(maps, grads, lists, reach, sizes, self.shares, stream=stream)

    def _lists(self, like: Tensor, pairs: int) -> Lists:
        """Room for two terms of each match."""
        shape = (self.lines, self.reach.room)
        words = (pairs, self.sizes.windows, self.reach.words)
        return Lists(
            matches=like.new_empty(words, dtype=torch.int64),
            counts=like.new_zeros(shape, dtype=torch.int32),
            starts=like.new_empty(shape, dtype=torch.int64),
            terms=like.new_empty((2 * pairs * self.map_pixels,), dtype=torch.int64),
            itself=like.new_empty(shape),
            inverse=like.new_empty(shape),
            rows=like.new_empty(shape, dtype=torch.int32),
            cursor=like.new_zeros((1,), dtype=torch.int64),
        )

    def _partners(self, listed: Tensor | None, like: Tensor, pairs: int, stream: int) -> Partners:
        """Which pairs each node is in."""
        as_query, as_key = like.new_empty(self.partners_shape, dtype=torch.int64)
        degrees = like.new_empty((*self.partners_shape[1:3], 2), dtype=torch.int32)
        found = Partners(degrees, as_query, as_key)
        slots = self.plan(listed, pairs, stream).slots
        self.partners(slots, found, self.reach.partners, self.sizes, pairs, stream=stream)
        return found


def addressable(x: Tensor) -> Tensor:
    """x, or a copy with neighbouring channels if lists could not name the rows of its groups."""
    strides = Strides(*x.stride())
    if _furthest(x.shape, strides) < _unit(x.shape, strides) << 31:
        return x
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def _summation(signature: Signature, lines: int, room: int) -> tuple[Launcher, int]:
    """The launch of the sums, and the shares of a window's rows that programs take."""
    tile, channels = signature.tiles[1], signature.query[2]
    parts = _parts(signature, tile)
    slices = ceil(channels, tile.block * parts)
    shares = min(ceil(PROGRAMS, lines * slices), room // tile.rows)
    shapes = (signature.query, signature.key or signature.query)
    query_unit, key_unit = map(_unit, shapes, signature.strides[:2])
    launcher = Launcher(
        sum_kernel,
        tile,
        lines * slices * shares,
        FORM=signature.form(),
        ROWS=tile.rows,
        CHANNELS=tile.block,
        PARTS=parts,
        EVEN=channels % (tile.block * parts) == 0,
        UNIT=query_unit,
        KEY_UNIT=key_unit,
    )
    return launcher, shares


def _parts(signature: Signature, tile: Tile) -> int:
    """How many runs of channels a program takes: as many as leave a window's rows in the cache,
    and no fewer than two where they do not fit at all."""
    rows = signature.nodes * signature.window_pixels
    fitting = CACHE_BYTES // (rows * tile.block * signature.dtype.itemsize) or 2
    parts = min(fitting, ceil(signature.query[2], tile.block))
    return 4 if parts >= 4 else 2 if parts >= 2 else 1


def _reach(signature: Signature, bits: int) -> Reach:
    """How lists name rows: by offsets in units."""
    shapes = (signature.query, signature.key or signature.query)
    steps: list[int] = []
    for shape, strides in zip(shapes, signature.strides[:2], strict=True):
        each = _unit(shape, strides)
        steps += [strides.sample // each, strides.row // each, strides.column // each]
    pixels = signature.window_pixels
    room = ceil(signature.nodes * pixels, ROWS) * ROWS
    partners = max(signature.query[1], signature.keys)
    return Reach(*(*steps, room, ceil(pixels * bits, WORD), partners))


def _unit(shape: torch.Size, strides: Strides) -> int:
    """Elements, a divisor of the strides: the largest power of two, so that a row's offset is a
    shift away and the compiler sees its alignment; the largest at all where the offset of the last
    row of a group would take more than 31 bits."""
    divisor = math.gcd(strides.sample, strides.row, strides.column) or 1
    shift = divisor & -divisor
    return shift if _furthest(shape, strides) < shift << 31 else divisor


def _furthest(shape: torch.Size, strides: Strides) -> int:
    """Elements from the first row of a group to its last."""
    steps = (strides.sample, strides.row, strides.column)
    return sum((shape[i] - 1) * step for i, step in zip((1, 3, 4), steps, strict=True))
