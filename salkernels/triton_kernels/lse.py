"""The log-sum-exp over windows of negatives, forward; and what its backward shares with it.

A program takes a block of query rows of one window of a group. The rows of all keys of that window
pass by in blocks, as in flash attention: cosines by channels, then a running maximum and a running
sum of powers of two. Nothing is kept but the result.

Rows are counted without padding, node by node: those of a window are (nodes x pixels), so that one
kernel serves windows of one pixel and windows as large as the map, and smaller ones at the edge.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import (
    Lanes,
    Maps,
    Rows,
    across,
    dot,
    down,
    load_channels,
    node_pixels,
    row_pointers,
    slots_of,
)

INF = tl.constexpr(float("inf"))
NOTHING = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def window_of(window, sizes):
    """First row and column of a window, its columns and its pixels: at the edge it is smaller."""
    top = window // sizes.across * sizes.window_rows
    left = window % sizes.across * sizes.window_columns
    columns = tl.minimum(sizes.width - left, sizes.window_columns)
    return top, left, columns, columns * tl.minimum(sizes.height - top, sizes.window_rows)


@triton.jit
def block_of(number, count, sizes, ROWS: tl.constexpr):
    """Block of rows, of those of `count` nodes, window and group of a program: neighbouring
    programs share the features of a window."""
    blocks = tl.cdiv(count * sizes.window_rows * sizes.window_columns, ROWS)
    return number % blocks, number // blocks % sizes.windows, number // blocks // sizes.windows


@triton.jit
def rows_at(i, first, count, group, window, sizes):
    """Rows i of those that `count` nodes, from the node `first` on, have in a window."""
    top, left, columns, pixels = window_of(window, sizes)
    node, pixel = i // pixels, i % pixels
    row, column = top + pixel // columns, left + pixel % columns
    return Rows(group + 0 * i, first + node, row, column, node < count)


@triton.jit
def norms_at(norm, rows, sizes, FORM: tl.constexpr):
    """Norms of rows; Inf, as of those that are not valid, where there is no row."""
    return tl.load(norm + node_pixels(rows, sizes, FORM), mask=rows.inside, other=INF)


@triton.jit
def unit_scale(norm, eps):
    """1 / max(‖x‖, eps); NaN stays NaN."""
    return 1 / tl.where(norm <= eps, eps, norm)


@triton.jit
def taking_part(rows, which):
    """Rows, of which only some are in a pair."""
    return Lanes(rows.group, rows.node, which)


@triton.jit
def any_of(table):
    return tl.max(tl.max(table.to(tl.int32), 1), 0) > 0


@triton.jit
def side_of(maps, sizes, FORM: tl.constexpr, KEYS: tl.constexpr):
    """The maps of queries or of keys alone, by the numbers of their nodes: a block of rows is of
    one side, and to choose for each row would take registers. Their form is SIDE, that of a set."""
    if KEYS and not FORM.SET:
        step = maps.key_strides
        pointer = maps.key - tl.cast(sizes.N, tl.int64) * step.sample
        side = Maps(pointer, pointer, step, step)
    else:
        side = Maps(maps.query, maps.query, maps.query_strides, maps.query_strides)
    return side


@triton.jit
def products(
    rows, loaded, maps, others, loaded_other, other_maps, sizes,
    SIDE: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Products of rows with others; 0 of those that are not loaded."""
    ROWS: tl.constexpr = rows.node.shape[0]
    OTHERS: tl.constexpr = others.node.shape[0]
    pointers = row_pointers(maps, rows, sizes, SIDE)
    other_pointers = row_pointers(other_maps, others, sizes, SIDE)
    total = tl.zeros((ROWS, OTHERS), tl.float32)
    for start in range(0, sizes.channels, CUT.CHANNELS):
        x = load_channels(pointers, start, rows.node, loaded, maps, sizes, SIDE, CUT)
        y = load_channels(
            other_pointers, start, others.node, loaded_other, other_maps, sizes, SIDE, CUT
        )
        total = dot(x, tl.trans(y), total, PRODUCT)
    return total


@triton.jit
def window_lse_kernel(
    maps, norm, plan, lse, sizes, eps, scale,
    FORM: tl.constexpr, SIDE: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """lse (G, N, H, W) of a block of query rows; `scale` is log2(e) / τ."""
    block, window, group = block_of(tl.program_id(0), sizes.N, sizes, ROWS)
    _, _, _, pixels = window_of(window, sizes)
    if block * ROWS >= sizes.N * pixels:  # a smaller window has fewer
        return
    rows = rows_at(block * ROWS + tl.arange(0, ROWS), 0, sizes.N, group, window, sizes)
    value = norms_at(norm, rows, sizes, FORM)
    loaded = value != INF
    unit = unit_scale(value, eps)
    queries = down(taking_part(rows, loaded))
    highest = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    query_maps, key_maps = side_of(maps, sizes, FORM, False), side_of(maps, sizes, FORM, True)
    first = 0 if FORM.SET else sizes.N
    for start in range(0, sizes.M * pixels, COLUMNS):
        keys = rows_at(start + tl.arange(0, COLUMNS), first, sizes.M, group, window, sizes)
        value = norms_at(norm, keys, sizes, FORM)
        loaded_key = value != INF
        lanes = across(taking_part(keys, loaded_key))
        negative = slots_of(queries, lanes, plan, sizes, FORM) >= 0
        if any_of(negative):
            term = products(
                rows, loaded, query_maps, keys, loaded_key, key_maps, sizes, SIDE, CUT, PRODUCT
            )
            term = term * unit[:, None] * unit_scale(value, eps)[None, :]
            term = tl.where(negative, term * scale, NOTHING)
            higher = tl.maximum(highest, tl.max(term, 1))
            # Not the difference of two infinities. A NaN may not count as a maximum: it stays in
            # the sum.
            shift = tl.where(higher == NOTHING, 0.0, higher)
            total = total * tl.exp2(highest - shift) + tl.sum(tl.exp2(term - shift[:, None]), 1)
            highest = higher
    nothing = total == 0
    result = LN2 * (highest + tl.log2(tl.where(nothing, 1.0, total)))
    node = (rows.group * sizes.N + rows.node).to(tl.int64)
    place = (node * sizes.height + rows.row) * sizes.width + rows.column
    tl.store(lse + place, tl.where(nothing, NOTHING, result), mask=rows.inside)
