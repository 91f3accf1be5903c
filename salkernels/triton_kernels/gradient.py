r"""Backward: window by window, both roles of a row at once, one write of each gradient.

With g[q,k,p] = −sign(1 − m)·grad[q,k]/(H·W), the saved `argmax` turns into a matrix of selection
weights W between the rows of two tiles: g at (query pixel, its match) for the role as query, the
transpose of the same for the role as key. Then, for a row r,

    V[r] = Σ_c W[r,c] x̂[c]             ∂x[r] = (V[r] − D[r] x̂[r]) / ‖x[r]‖
    D[r] = x̂[r]·V[r] = Σ_c W[r,c] m    known from `max_sim` before any feature is loaded

so that channels pass by once, in blocks, and nothing is kept of them: no atomics, no second pass.

    gradient_kernel          windows of which a tile holds all pixels
    stream_gradient_kernel   larger windows, a block of pixels of one sample at a time
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
    tf32_parts,
    unit_scale,
)


@triton.jit
def _pixel_weights(max_sim, argmax, grad_loss, pixel, slot, place, capacity, pixels, inside):
    """g, m and the match of pixels of pairs; g = 0 where there is no pair."""
    present = inside & (slot >= 0) & (slot < capacity)
    at = pixel.to(tl.int64) * capacity + slot
    m = tl.load(max_sim + at, mask=present, other=1.0)
    match = tl.load(argmax + at, mask=present, other=0).to(tl.int32)
    upstream = tl.load(grad_loss + place, mask=present, other=0.0) / pixels
    sign = tl.where(m > 1, 1.0, 0.0) - tl.where(m < 1, 1.0, 0.0)
    # NaN stays in g alone: 0 · NaN would take it to pixels that are no match.
    return tl.where(m == m, sign * upstream, m), tl.where(m == m, m, 1.0), match


@triton.jit
def _selected(
    tile_r, r, tile_c, c, window, max_sim, argmax, grad_loss, slots, order,
    groups, N, M, height, width, window_rows, window_columns, across, capacity, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr,
):
    """g where row c of a tile is the match of row r of another, and g · m, both (rows, columns).

    Loaded as a matrix, though all pixels of a column's sample share a value: they come from the
    first-level cache, and nothing has to change its layout, which would cost bank conflicts.
    """
    nodes = N if SET else N + M
    row, column, in_window = pixels_of(
        r % PIXELS, window, across, window_rows, window_columns, height, width
    )
    group_r, node_r, inside_r = nodes_of(
        r // PIXELS, tile_r, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    group_c, node_c, inside_c = nodes_of(
        c // PIXELS, tile_c, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    slot, place = slots_of(
        slots, group_r[:, None], node_r[:, None], (inside_r & in_window)[:, None],
        group_c[None, :], node_c[None, :], inside_c[None, :], N, M, SET, HAS_MASK,
    )
    g, m, match = _pixel_weights(
        max_sim, argmax, grad_loss, (row * width + column)[:, None], slot, place, capacity,
        height * width, slot >= 0,
    )
    weight = tl.where(match == (c % PIXELS)[None, :], g, 0.0)
    return weight, weight * m


@triton.jit
def _both_roles(
    tile_r, r, tile_c, c, window, max_sim, argmax, grad_loss, slots, order,
    groups, N, M, height, width, window_rows, window_columns, across, capacity, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr,
):
    """W[r,c] and its part of D[r]: the match of r, and r as the match of c."""
    weight, product = _selected(
        tile_r, r, tile_c, c, window, max_sim, argmax, grad_loss, slots, order,
        groups, N, M, height, width, window_rows, window_columns, across, capacity,
        GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
    )
    along = tl.sum(product, 1)
    back, product = _selected(
        tile_c, c, tile_r, r, window, max_sim, argmax, grad_loss, slots, order,
        groups, N, M, height, width, window_rows, window_columns, across, capacity,
        GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
    )
    return weight + tl.trans(back), along + tl.sum(product, 0)


@triton.jit
def _rows_of(
    tile, r, window, query, key, norm, order, groups, N, M,
    height, width, window_rows, window_columns, across, eps, GROUPS_PER_TILE,
    query_group, query_sample, query_row, query_column,
    key_group, key_sample, key_row, key_column,
    SET: tl.constexpr, MERGED: tl.constexpr, LANES: tl.constexpr, PIXELS: tl.constexpr,
):
    """Where rows of a tile start, their nodes, scales, and which can be multiplied."""
    nodes = N if SET else N + M
    row, column, in_window = pixels_of(
        r % PIXELS, window, across, window_rows, window_columns, height, width
    )
    group, node, inside = nodes_of(
        r // PIXELS, tile, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    inside = inside & in_window
    place = (row * width + column).to(tl.int64) * (groups * nodes) + group * nodes + node
    unit, inverse, finite = _row_scales(norm, place, inside, eps)
    rows = row_pointers(
        query, key, group, node, row, column, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    return rows, node, unit, inverse, finite, inside


@triton.jit
def _times_rows(weight, x, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + weight @ x without rounding the fp32 weights to the dtype of x."""
    if x.dtype == tl.bfloat16:
        # Three bf16 parts hold a whole fp32 weight, and x is exact.
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = dot(low, x, total, PRECISION, UPCAST)
        total = dot(middle, x, total, PRECISION, UPCAST)
        total = dot(high, x, total, PRECISION, UPCAST)
    elif x.dtype == tl.float16 and PRECISION == "tf32x3":
        # fp16 has too little range for weights; in tf32, x is exact.
        high, low = tf32_parts(weight)
        total = dot(low, x.to(tl.float32), total, "tf32", UPCAST)
        total = dot(high, x.to(tl.float32), total, "tf32", UPCAST)
    else:
        total = dot(weight, x.to(tl.float32), total, PRECISION, UPCAST)
    return total


@triton.jit
def _row_scales(norm, place, inside, eps):
    """1 / max(‖x‖, eps), 1 / ‖x‖ (0 for dead and NaN rows), and whether the row can be multiplied.

    A NaN row would spread through 0 · NaN to samples it is not paired with, so it is not loaded.
    Its partners, and it itself, get their NaN from the weights: they hold it where `max_sim` does.
    """
    value = tl.load(norm + place, mask=inside, other=1.0)
    finite = inside & (value == value) & (value < float("inf"))
    alive = finite & (value > eps)
    inverse = tl.where(alive, 1 / tl.where(alive, value, 1.0), 0.0)
    return unit_scale(value, eps), inverse, finite


@triton.jit
def _joined(
    tile_a, tile_b, slots, order, groups, N, M, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr, LANES: tl.constexpr,
):
    """Whether any pair, in either direction, joins the nodes of two tiles."""
    nodes = N if SET else N + M
    lane = tl.arange(0, LANES)
    group_a, node_a, inside_a = nodes_of(
        lane, tile_a, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    group_b, node_b, inside_b = nodes_of(
        lane, tile_b, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    slot, back = slots_between(
        slots, group_a, node_a, inside_a, group_b, node_b, inside_b, N, M, SET, HAS_MASK,
    )
    return tl.max(tl.max(tl.maximum(slot, back), 1), 0) >= 0


@triton.jit
def gradient_kernel(
    query, key, grad_query, grad_key, grad_loss, slots, order, max_sim, argmax, norm,
    query_group, query_sample, query_channel, query_row, query_column,
    key_group, key_sample, key_channel, key_row, key_column,
    gq_group, gq_sample, gq_channel, gq_row, gq_column,
    gk_group, gk_sample, gk_channel, gk_row, gk_column,
    groups, N, M, channels, height, width, window_rows, window_columns, across, windows,
    capacity, eps, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr, SAME: tl.constexpr,
    LANES: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Gradients of the rows of one tile in one window.

    The columns of W, and the rows of x that they multiply, come in two halves: a whole matrix does
    not fit into the registers while it is put together.
    """
    ROWS: tl.constexpr = LANES * PIXELS
    HALF: tl.constexpr = ROWS // 2
    nodes = N if SET else N + M
    tiles = 1 if MERGED else tl.cdiv(nodes, LANES)
    pid = tl.program_id(0)
    first = pid % tiles
    window = pid // tiles % windows
    tile = pid // tiles // windows * tiles + first

    r = tl.arange(0, ROWS)
    upper = tl.arange(0, HALF)
    lower = HALF + upper
    out, node_r, unit_r, inverse, finite_r, inside_r = _rows_of(
        tile, r, window, grad_query, grad_key, norm, order, groups, N, M,
        height, width, window_rows, window_columns, across, eps, GROUPS_PER_TILE,
        gq_group, gq_sample, gq_row, gq_column, gk_group, gk_sample, gk_row, gk_column,
        SET, MERGED, LANES, PIXELS,
    )
    rows_u, node_u, unit_u, _, finite_u, _ = _rows_of(
        tile, upper, window, query, key, norm, order, groups, N, M,
        height, width, window_rows, window_columns, across, eps, GROUPS_PER_TILE,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET, MERGED, LANES, PIXELS,
    )
    rows_l, node_l, unit_l, _, finite_l, _ = _rows_of(
        tile, lower, window, query, key, norm, order, groups, N, M,
        height, width, window_rows, window_columns, across, eps, GROUPS_PER_TILE,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET, MERGED, LANES, PIXELS,
    )
    apart = False
    if not MERGED:
        # Tiles hold what belongs together, so that partners elsewhere are the exception.
        for other in range(tiles):
            if other != first:
                apart = apart | _joined(
                    tile, tile - first + other, slots, order, groups, N, M, GROUPS_PER_TILE,
                    SET, HAS_MASK, MERGED, LANES,
                )
    if not apart:
        weight_u = tl.zeros((ROWS, HALF), tl.float32)
        weight_l = tl.zeros((ROWS, HALF), tl.float32)
        # The branch does more than save loads: operands of a product that come from an 8-bit load
        # in sight of the compiler get a layout that reads shared memory with 32-way conflicts.
        if _joined(
            tile, tile, slots, order, groups, N, M, GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES
        ):
            weight_u, along_u = _both_roles(
                tile, r, tile, upper, window, max_sim, argmax, grad_loss, slots, order,
                groups, N, M, height, width, window_rows, window_columns, across, capacity,
                GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
            )
            weight_l, along_l = _both_roles(
                tile, r, tile, lower, window, max_sim, argmax, grad_loss, slots, order,
                groups, N, M, height, width, window_rows, window_columns, across, capacity,
                GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
            )
            # What drops out of V[r] goes into W too: one product with x gives the gradient, and x
            # has no other use that would spoil its layout.
            along = (along_u + along_l)[:, None]
            weight_u -= tl.where(r[:, None] == upper[None, :], along, 0.0)
            weight_l -= tl.where(r[:, None] == lower[None, :], along, 0.0)
            weight_u *= unit_u[None, :]
            weight_l *= unit_l[None, :]
        for start in range(0, channels, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            in_map = (channel < channels)[None, :]
            offset = channel_offsets(channel, node_u, N, query_channel, key_channel, SAME)
            x_u = tl.load(rows_u[:, None] + offset, mask=finite_u[:, None] & in_map, other=0.0)
            offset = channel_offsets(channel, node_l, N, query_channel, key_channel, SAME)
            x_l = tl.load(rows_l[:, None] + offset, mask=finite_l[:, None] & in_map, other=0.0)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            total = _times_rows(weight_u, x_u, total, PRECISION, UPCAST)
            total = _times_rows(weight_l, x_l, total, PRECISION, UPCAST)
            # A NaN row has no inverse, but its weights are NaN: NaN · 0 is the NaN it must get.
            grad = total * inverse[:, None]
            offset = channel_offsets(channel, node_r, N, gq_channel, gk_channel, SAME)
            tl.store(
                out[:, None] + offset, grad.to(grad_query.dtype.element_ty),
                mask=inside_r[:, None] & in_map,
            )
    if not MERGED:
        if apart:
            # D of all tiles together is needed before the part along x̂ can be taken off.
            along = tl.zeros((ROWS,), tl.float32)
            for other in range(2 * tiles):
                tile_b = tile - first + other // 2
                if _joined(
                    tile, tile_b, slots, order, groups, N, M, GROUPS_PER_TILE,
                    SET, HAS_MASK, MERGED, LANES,
                ):
                    weight, part = _both_roles(
                        tile, r, tile_b, other % 2 * HALF + upper, window,
                        max_sim, argmax, grad_loss, slots, order,
                        groups, N, M, height, width, window_rows, window_columns, across, capacity,
                        GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
                    )
                    along += part
            for start in range(0, channels, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                in_map = (channel < channels)[None, :]
                total = tl.zeros((ROWS, BLOCK), tl.float32)
                for other in range(2 * tiles):
                    tile_b = tile - first + other // 2
                    c = other % 2 * HALF + upper
                    joined = _joined(
                        tile, tile_b, slots, order, groups, N, M, GROUPS_PER_TILE,
                        SET, HAS_MASK, MERGED, LANES,
                    )
                    weight = tl.zeros((ROWS, HALF), tl.float32)
                    if joined:
                        weight, part = _both_roles(
                            tile, r, tile_b, c, window, max_sim, argmax, grad_loss, slots, order,
                            groups, N, M, height, width, window_rows, window_columns, across,
                            capacity, GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES, PIXELS,
                        )
                    rows_c, node_c, unit_c, _, finite_c, _ = _rows_of(
                        tile_b, c, window, query, key, norm, order, groups, N, M,
                        height, width, window_rows, window_columns, across, eps, GROUPS_PER_TILE,
                        query_group, query_sample, query_row, query_column,
                        key_group, key_sample, key_row, key_column, SET, MERGED, LANES, PIXELS,
                    )
                    itself = (r[:, None] == c[None, :]) & (tile == tile_b)
                    weight = (weight - tl.where(itself, along[:, None], 0.0)) * unit_c[None, :]
                    if joined | (tile == tile_b):
                        offset = channel_offsets(
                            channel, node_c, N, query_channel, key_channel, SAME
                        )
                        y = tl.load(
                            rows_c[:, None] + offset, mask=finite_c[:, None] & in_map, other=0.0
                        )
                        total = _times_rows(weight, y, total, PRECISION, UPCAST)
                grad = total * inverse[:, None]
                offset = channel_offsets(channel, node_r, N, gq_channel, gk_channel, SAME)
                tl.store(
                    out[:, None] + offset, grad.to(grad_query.dtype.element_ty),
                    mask=inside_r[:, None] & in_map,
                )


@triton.jit
def stream_gradient_kernel(
    query, key, grad_query, grad_key, grad_loss, slots, max_sim, argmax, norm,
    query_group, query_sample, query_channel, query_row, query_column,
    key_group, key_sample, key_channel, key_row, key_column,
    gq_group, gq_sample, gq_channel, gq_row, gq_column,
    gk_group, gk_sample, gk_channel, gk_row, gk_column,
    groups, N, M, channels, height, width, window_rows, window_columns, across, windows,
    capacity, eps,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """Gradients of a block of pixels of one node in one window, and of a block of channels."""
    nodes = N if SET else N + M
    pixels = height * width
    window_pixels = window_rows * window_columns
    blocks = tl.cdiv(window_pixels, ROWS)
    channel_blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0)
    block = pid % blocks
    channel_block = pid // blocks % channel_blocks
    window = pid // blocks // channel_blocks % windows
    index = pid // blocks // channel_blocks // windows
    group = index // nodes
    node = index % nodes

    p = tl.arange(0, ROWS)
    pixel_r = block * ROWS + p
    row, column, inside_r = pixels_of(
        pixel_r, window, across, window_rows, window_columns, height, width
    )
    place_r = (row * width + column).to(tl.int64)
    stride = groups * nodes
    norms = norm + group * nodes
    unit, inverse, finite = _row_scales(norms + node, place_r * stride, inside_r, eps)
    channel = channel_block * BLOCK + tl.arange(0, BLOCK)
    in_map = (channel < channels)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)

    for other in range(nodes):
        # As numbers of one lane each, so that one function numbers pairs everywhere.
        slot, place = slots_of(
            slots, group, node, True, group, other, True, N, M, SET, HAS_MASK
        )
        slot_back, place_back = slots_of(
            slots, group, other, True, group, node, True, N, M, SET, HAS_MASK
        )
        if (slot >= 0) | (slot_back >= 0):
            g, m, match = _pixel_weights(
                max_sim, argmax, grad_loss, place_r, slot + 0 * p, place + 0 * p, capacity, pixels,
                inside_r,
            )
            along += g * m
            for start in range(0, window_pixels, ROWS):
                pixel_c = start + p
                row_c, column_c, inside_c = pixels_of(
                    pixel_c, window, across, window_rows, window_columns, height, width
                )
                place_c = (row_c * width + column_c).to(tl.int64)
                weight = tl.where(match[:, None] == pixel_c[None, :], g[:, None], 0.0)
                g_c, m_c, match_c = _pixel_weights(
                    max_sim, argmax, grad_loss, place_c, slot_back + 0 * p, place_back + 0 * p,
                    capacity, pixels, inside_c,
                )
                back = tl.where(match_c[None, :] == pixel_r[:, None], g_c[None, :], 0.0)
                along += tl.sum(back * m_c[None, :], 1)
                weight += back
                # Matches of real slices lie close together: most blocks choose nothing here.
                if tl.max(tl.max((weight != 0).to(tl.int32), 1), 0) > 0:
                    unit_c, inverse_c, finite_c = _row_scales(
                        norms + other, place_c * stride, inside_c, eps
                    )
                    rows_c = row_pointers(
                        query, key, group + 0 * p, other + 0 * p, row_c, column_c, N,
                        query_group, query_sample, query_row, query_column,
                        key_group, key_sample, key_row, key_column, SET,
                    )
                    offset = channel_offsets(
                        channel, other + 0 * p, N, query_channel, key_channel, SAME
                    )
                    y = tl.load(
                        rows_c[:, None] + offset, mask=finite_c[:, None] & in_map, other=0.0
                    )
                    total = _times_rows(weight * unit_c[None, :], y, total, PRECISION, UPCAST)

    rows = row_pointers(
        query, key, group + 0 * p, node + 0 * p, row, column, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    offset = channel_offsets(channel, node + 0 * p, N, query_channel, key_channel, SAME)
    x = tl.load(rows[:, None] + offset, mask=finite[:, None] & in_map, other=0.0).to(tl.float32)
    grad = (total - (along * unit)[:, None] * x) * inverse[:, None]
    out = row_pointers(
        grad_query, grad_key, group + 0 * p, node + 0 * p, row, column, N,
        gq_group, gq_sample, gq_row, gq_column, gk_group, gk_sample, gk_row, gk_column, SET,
    )
    offset = channel_offsets(channel, node + 0 * p, N, gq_channel, gk_channel, SAME)
    tl.store(
        out[:, None] + offset, grad.to(grad_query.dtype.element_ty), mask=inside_r[:, None] & in_map
    )
