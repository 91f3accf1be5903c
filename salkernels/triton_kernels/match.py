"""Forward: cosine similarities window by window, their row-max and arg-max, and the MAE to 1.

    match_kernel          windows of which a tile holds all pixels: a feature is loaded once, and
                          once more for every other tile with partners of its sample
    stream_match_kernel   larger windows: key pixels pass by in blocks under a running maximum
    norm_kernel           norms for the latter; the former takes them from the loads it makes anyway
    loss_kernel           sums the partial MAE of all windows in a fixed order

`max_sim` and `argmax` lie pixel by pixel with the pairs innermost: pairs of one query are
neighbours, and a program's stores fill whole sectors.
"""

# Arguments of kernels stand in groups (pointers, strides, extents), not one to a line.
# fmt: off
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import (
    channel_offsets,
    dot,
    nodes_of,
    pixels_of,
    row_pointers,
    slots_between,
    slots_of,
    unit_scale,
)

# Stands for NaN in comparisons, so that it wins; a cosine is never infinite itself.
NAN_KEY = tl.constexpr(float("inf"))
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _comparable(sim, inside):
    """NaN as the largest value and padding as the smallest: `tl.max` would drop a NaN."""
    return tl.where(inside, tl.where(sim == sim, sim, NAN_KEY), NOTHING)


@triton.jit
def _from_comparable(best):
    return tl.where(best == NAN_KEY, float("nan"), best)


@triton.jit
def _store_matches(best, where, max_sim, argmax, pixel, slot, capacity, inside):
    """Writes maxima and their places, and returns |1 − m| where a pair is, else 0."""
    best = _from_comparable(best)
    # A mask with more pairs than the outputs have room for must not write beyond them.
    present = inside & (slot >= 0) & (slot < capacity)
    place = pixel.to(tl.int64) * capacity + slot
    tl.store(max_sim + place, best, mask=present)
    tl.store(argmax + place, where.to(argmax.dtype.element_ty), mask=present)
    return tl.where(present, tl.abs(1 - best), 0.0)


@triton.jit
def match_kernel(
    query, key, slots, order, max_sim, argmax, norm, partial,
    query_group, query_sample, query_channel, query_row, query_column,
    key_group, key_sample, key_channel, key_row, key_column,
    groups, N, M, channels, height, width, window_rows, window_columns, across, windows,
    capacity, eps, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr, DIAGONAL: tl.constexpr,
    SAME: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """All pairs within a tile, or between two tiles of a group, in one window.

    The first (DIAGONAL) also stores the norms, and the second reads them: so it runs later.
    """
    ROWS: tl.constexpr = LANES * PIXELS
    nodes = N if SET else N + M
    tiles = 1 if MERGED else tl.cdiv(nodes, LANES)
    pid = tl.program_id(0)
    if DIAGONAL:
        # Neighbouring programs take neighbouring windows: in NCHW they share sectors.
        window = pid % windows
        tile_a = pid // windows
        tile_b = tile_a
    else:
        # Neighbouring programs take the tile pairs of one window: they share its features. Pairs
        # first < second are counted along a folded triangle, without a root: row i holds those of
        # tile i and, before them, those of its mirror image.
        even = tiles - 1 + (tiles - 1) % 2
        tile_pairs = even // 2 * (even + 1)
        fold = pid % tile_pairs // (even + 1)
        step = pid % tile_pairs % (even + 1)
        first = tl.where(step > fold, fold, even - 1 - fold)
        second = tl.where(step > fold, step, even - step)
        if second >= tiles:
            return
        window = pid // tile_pairs % windows
        tile_a = pid // tile_pairs // windows * tiles + first
        tile_b = tile_a - first + second

    lane = tl.arange(0, LANES)
    group_a, node_a, inside_a = nodes_of(
        lane, tile_a, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    group_b, node_b, inside_b = nodes_of(
        lane, tile_b, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    slot, slot_back = slots_between(
        slots, group_a, node_a, inside_a, group_b, node_b, inside_b, N, M, SET, HAS_MASK,
    )
    if MERGED or not DIAGONAL:
        # No pair, no work: before any load of features. With several tiles the diagonal stays,
        # for its norms.
        if tl.max(tl.max(tl.maximum(slot, slot_back), 1), 0) < 0:
            return

    r = tl.arange(0, ROWS)
    row, column, in_window = pixels_of(
        r % PIXELS, window, across, window_rows, window_columns, height, width
    )
    pixel = row * width + column
    group_r, node_r, inside_r = nodes_of(
        r // PIXELS, tile_a, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    group_c, node_c, inside_c = nodes_of(
        r // PIXELS, tile_b, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    inside_r = inside_r & in_window
    inside_c = inside_c & in_window
    rows_a = row_pointers(
        query, key, group_r, node_r, row, column, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    rows_b = row_pointers(
        query, key, group_c, node_c, row, column, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    total = tl.zeros((ROWS, ROWS), tl.float32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        in_map = (channel < channels)[None, :]
        offset = channel_offsets(channel, node_r, N, query_channel, key_channel, SAME)
        x = tl.load(rows_a[:, None] + offset, mask=inside_r[:, None] & in_map, other=0.0)
        if DIAGONAL:
            total = dot(x, tl.trans(x), total, PRECISION, UPCAST)
        else:
            offset = channel_offsets(channel, node_c, N, query_channel, key_channel, SAME)
            y = tl.load(rows_b[:, None] + offset, mask=inside_c[:, None] & in_map, other=0.0)
            total = dot(x, tl.trans(y), total, PRECISION, UPCAST)

    place_r = pixel.to(tl.int64) * (groups * nodes) + group_r * nodes + node_r
    if DIAGONAL:
        # The diagonal holds the squared norms: nothing but products has to read x.
        itself = tl.where(r[:, None] == r[None, :], total, 0.0)
        norm_r = tl.sqrt(tl.sum(itself, 1))
        norm_c = tl.sqrt(tl.sum(itself, 0))
        tl.store(norm + place_r, norm_r, mask=inside_r)
    else:
        place_c = pixel.to(tl.int64) * (groups * nodes) + group_c * nodes + node_c
        norm_r = tl.load(norm + place_r, mask=inside_r, other=1.0)
        norm_c = tl.load(norm + place_c, mask=inside_c, other=1.0)
    sim = total * unit_scale(norm_r, eps)[:, None] * unit_scale(norm_c, eps)[None, :]
    sim = _comparable(sim, inside_r[:, None] & inside_c[None, :])

    # Rows of tile a as queries, samples of tile b as keys.
    best, where = tl.max(tl.reshape(sim, (ROWS, LANES, PIXELS)), 2, return_indices=True)
    slot_r, place = slots_of(
        slots, group_r[:, None], node_r[:, None], inside_r[:, None],
        group_b[None, :], node_b[None, :], inside_b[None, :], N, M, SET, HAS_MASK,
    )
    error = _store_matches(
        best, where, max_sim, argmax, pixel[:, None], slot_r, capacity, in_window[:, None]
    )
    error = tl.sum(tl.reshape(error, (LANES, PIXELS, LANES)), 1)
    line = partial + window.to(tl.int64) * capacity
    tl.store(line + slot, error, mask=(slot >= 0) & (slot < capacity))

    if not DIAGONAL:
        # The same products, read down the columns: rows of tile b as queries.
        best, where = tl.max(tl.reshape(sim, (LANES, PIXELS, ROWS)), 1, return_indices=True)
        slot_r, place = slots_of(
            slots, group_c[None, :], node_c[None, :], inside_c[None, :],
            group_a[:, None], node_a[:, None], inside_a[:, None], N, M, SET, HAS_MASK,
        )
        error = _store_matches(
            best, where, max_sim, argmax, pixel[None, :], slot_r, capacity, in_window[None, :]
        )
        error = tl.sum(tl.reshape(error, (LANES, LANES, PIXELS)), 2)
        tl.store(line + slot_back, error, mask=(slot_back >= 0) & (slot_back < capacity))


@triton.jit
def norm_kernel(
    query, key, norm,
    query_group, query_sample, query_channel, query_row, query_column,
    key_group, key_sample, key_channel, key_row, key_column,
    groups, N, M, channels, height, width,
    SET: tl.constexpr, SAME: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Norms of a run of pixels of one node."""
    nodes = N if SET else N + M
    blocks = tl.cdiv(height * width, ROWS)
    pid = tl.program_id(0)
    index = pid // blocks
    pixel = pid % blocks * ROWS + tl.arange(0, ROWS)
    inside = pixel < height * width
    node = index % nodes + 0 * pixel
    rows = row_pointers(
        query, key, index // nodes + 0 * pixel, node, pixel // width, pixel % width, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        offset = channel_offsets(channel, node, N, query_channel, key_channel, SAME)
        x = tl.load(
            rows[:, None] + offset, mask=inside[:, None] & (channel < channels)[None, :], other=0.0
        ).to(tl.float32)
        square += tl.sum(x * x, 1)
    tl.store(norm + pixel.to(tl.int64) * (groups * nodes) + index, tl.sqrt(square), mask=inside)


@triton.jit
def stream_match_kernel(
    query, key, slots, max_sim, argmax, norm, partial,
    query_group, query_sample, query_channel, query_row, query_column,
    key_group, key_sample, key_channel, key_row, key_column,
    groups, N, M, channels, height, width, window_rows, window_columns, across, windows,
    capacity, eps,
    SET: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """One pair, one window, a block of query pixels: all key pixels pass by in blocks."""
    nodes = N if SET else N + M
    blocks = tl.cdiv(window_rows * window_columns, ROWS)
    pid = tl.program_id(0)
    block = pid % blocks
    window = pid // blocks % windows
    pair = pid // blocks // windows
    if HAS_MASK:
        slot = tl.load(slots + pair)
        if slot < 0:
            return
    else:
        slot = pair
    if slot >= capacity:
        return
    group = (pair // (N * M)).to(tl.int64)
    query_index = (pair // M % N).to(tl.int64)
    key_index = (pair % M).to(tl.int64)
    query += group * query_group + query_index * query_sample
    key += group * key_group + key_index * key_sample
    query_norm = norm + group * nodes + query_index
    key_norm = norm + group * nodes + key_index + (0 if SET else N)
    stride = groups * nodes

    r = tl.arange(0, ROWS)
    row, column, inside_r = pixels_of(
        block * ROWS + r, window, across, window_rows, window_columns, height, width
    )
    pixel = (row * width + column).to(tl.int64)
    rows = query + row.to(tl.int64) * query_row + column.to(tl.int64) * query_column
    scale_r = unit_scale(tl.load(query_norm + pixel * stride, mask=inside_r, other=1.0), eps)
    best = tl.full((ROWS,), NOTHING, tl.float32)
    where = tl.zeros((ROWS,), tl.int32)
    for start in range(0, window_rows * window_columns, ROWS):
        row, column, inside_c = pixels_of(
            start + r, window, across, window_rows, window_columns, height, width
        )
        columns = key + row.to(tl.int64) * key_row + column.to(tl.int64) * key_column
        norm_c = tl.load(
            key_norm + (row * width + column).to(tl.int64) * stride, mask=inside_c, other=1.0
        )
        total = tl.zeros((ROWS, ROWS), tl.float32)
        for first in range(0, channels, BLOCK):
            channel = first + tl.arange(0, BLOCK)
            in_map = (channel < channels)[None, :]
            offset = channel.to(tl.int64)[None, :]
            x = tl.load(
                rows[:, None] + offset * query_channel, mask=inside_r[:, None] & in_map, other=0.0
            )
            y = tl.load(
                columns[:, None] + offset * key_channel, mask=inside_c[:, None] & in_map, other=0.0
            )
            total = dot(x, tl.trans(y), total, PRECISION, UPCAST)
        sim = total * scale_r[:, None] * unit_scale(norm_c, eps)[None, :]
        sim = _comparable(sim, inside_r[:, None] & inside_c[None, :])
        here, place = tl.max(sim, 1, return_indices=True)
        # Strictly greater: the first of equals stays, and so does the first NaN.
        better = here > best
        where = tl.where(better, start + place, where)
        best = tl.where(better, here, best)
    error = _store_matches(best, where, max_sim, argmax, pixel, slot, capacity, inside_r)
    line = (window * blocks + block).to(tl.int64)
    tl.store(partial + line * capacity + slot, tl.sum(error, 0))


@triton.jit
def loss_kernel(
    partial, slots, loss, pairs, lines, capacity, pixels,
    HAS_MASK: tl.constexpr, PAIRS: tl.constexpr, LINES: tl.constexpr,
):
    """Loss of each place in (G, N, M): the mean over pixels, 0 where there is no pair.

    NaN for pairs beyond the capacity: on a GPU nobody could raise an error without waiting for it.
    """
    place = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = place < pairs
    slot = tl.load(slots + place, mask=inside, other=-1) if HAS_MASK else place
    present = inside & (slot >= 0) & (slot < capacity)
    total = tl.zeros((LINES, PAIRS), tl.float32)
    for start in range(0, lines, LINES):
        line = start + tl.arange(0, LINES)
        total += tl.load(
            partial + line.to(tl.int64)[:, None] * capacity + slot[None, :],
            mask=(line < lines)[:, None] & present[None, :], other=0.0,
        )
    mean = tl.where(slot < capacity, tl.sum(total, 0) / pixels, float("nan"))
    tl.store(loss + place, mean, mask=inside)
