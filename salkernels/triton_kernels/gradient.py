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

# ruff: noqa: ANN001, N803
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import channel_offsets, dot, nodes_of, pixels_of, row_pointers, slots_of, unit_scale


@triton.jit
def _pixel_weights(max_sim, argmax, grad_loss, pixel, slot, place, capacity, pixels, inside):
    """g, m and the match of pixels of pairs; g = 0 where there is no pair."""
    present = inside & (slot >= 0) & (slot < capacity)
    at = pixel.to(tl.int64) * capacity + slot
    m = tl.load(max_sim + at, mask=present, other=1.0)
    match = tl.load(argmax + at, mask=present, other=0).to(tl.int32)
    upstream = tl.load(grad_loss + place, mask=present, other=0.0) / pixels
    sign = tl.where(m > 1, 1.0, 0.0) - tl.where(m < 1, 1.0, 0.0)
    return tl.where(m == m, sign * upstream, m), m, match


@triton.jit
def _selected(
    group_r, node_r, inside_r, group_c, node_c, inside_c, pixel, in_window,
    max_sim, argmax, grad_loss, slots, N, M, capacity, pixels,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, PIXELS: tl.constexpr,
):
    """g where a column is the match of a row, and g · m, both (ROWS, ROWS).

    Loaded as a matrix, though all pixels of a column's sample share a value: they come from the
    first-level cache, and nothing has to change its layout, which costs bank conflicts.
    """
    ROWS: tl.constexpr = pixel.shape[0]
    slot, place = slots_of(
        slots, group_r[:, None], node_r[:, None], inside_r[:, None],
        group_c[None, :], node_c[None, :], inside_c[None, :], N, M, SET, HAS_MASK,
    )
    g, m, match = _pixel_weights(
        max_sim, argmax, grad_loss, pixel[:, None], slot, place, capacity, pixels, in_window[:, None]
    )
    weight = tl.where(match == (tl.arange(0, ROWS) % PIXELS)[None, :], g, 0.0)
    return weight, weight * m


@triton.jit
def _times_rows(weight, x, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + weight @ x without rounding the fp32 weights to the dtype of x."""
    if x.dtype == tl.bfloat16:
        # Two bf16 parts keep 16 bits of a weight, and x is exact.
        high = weight.to(tl.bfloat16)
        low = (weight - high.to(tl.float32)).to(tl.bfloat16)
        return dot(high, x, dot(low, x, total, PRECISION, UPCAST), PRECISION, UPCAST)
    # fp16 has too little range for weights, but fits tf32.
    return dot(weight, x.to(tl.float32), total, PRECISION, UPCAST)


@triton.jit
def _row_scales(norm, place, inside, eps):
    """1 / max(‖x‖, eps), 1 / ‖x‖ (0 for dead and NaN rows), and whether the row can be multiplied.

    A NaN row would spread through 0 · NaN to samples it is not paired with, so it is not loaded.
    Its partners, and it itself, get their NaN from the weights, which hold NaN where `max_sim` does.
    """
    value = tl.load(norm + place, mask=inside, other=1.0)
    finite = inside & (value == value) & (value < float("inf"))
    alive = finite & (value > eps)
    inverse = tl.where(alive, 1 / tl.where(alive, value, 1.0), 0.0)
    return unit_scale(value, eps), inverse, finite


@triton.jit
def _joined(
    group_a, node_a, inside_a, tile_b, slots, order, groups, N, M, nodes, GROUPS_PER_TILE,
    SET: tl.constexpr, HAS_MASK: tl.constexpr, MERGED: tl.constexpr, LANES: tl.constexpr,
):
    """Whether any pair, in either direction, joins the nodes of two tiles."""
    group_b, node_b, inside_b = nodes_of(
        tl.arange(0, LANES), tile_b, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    slot, place = slots_of(
        slots, group_a[:, None], node_a[:, None], inside_a[:, None],
        group_b[None, :], node_b[None, :], inside_b[None, :], N, M, SET, HAS_MASK,
    )
    back, place_back = slots_of(
        slots, group_b[None, :], node_b[None, :], inside_b[None, :],
        group_a[:, None], node_a[:, None], inside_a[:, None], N, M, SET, HAS_MASK,
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
    """Gradients of the rows of one tile in one window."""
    ROWS: tl.constexpr = LANES * PIXELS
    nodes = N if SET else N + M
    pixels = height * width
    pid = tl.program_id(0)
    if MERGED:
        window = pid % windows
        tile = pid // windows
    else:
        tiles = tl.cdiv(nodes, LANES)
        first = pid % tiles
        window = pid // tiles % windows
        tile = pid // tiles // windows * tiles + first

    r = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    row, column, in_window = pixels_of(
        r % PIXELS, window, across, window_rows, window_columns, height, width
    )
    pixel = row * width + column
    group_a, node_a, inside_a = nodes_of(lane, tile, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED)
    group_r, node_r, inside_r = nodes_of(
        r // PIXELS, tile, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
    )
    inside_r = inside_r & in_window
    place_n = pixel.to(tl.int64) * (groups * nodes) + group_r * nodes + node_r
    unit, inverse, finite = _row_scales(norm, place_n, inside_r, eps)
    rows = row_pointers(
        query, key, group_r, node_r, row, column, N,
        query_group, query_sample, query_row, query_column,
        key_group, key_sample, key_row, key_column, SET,
    )
    out = row_pointers(
        grad_query, grad_key, group_r, node_r, row, column, N,
        gq_group, gq_sample, gq_row, gq_column, gk_group, gk_sample, gk_row, gk_column, SET,
    )
    apart = False
    if not MERGED:
        # Tiles hold what belongs together, so that partners elsewhere are the exception.
        for other in range(0, tiles):
            if other != first:
                apart = apart | _joined(
                    group_a, node_a, inside_a, tile - first + other, slots, order, groups, N, M,
                    nodes, GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES,
                )
    if not apart:
        weight = tl.zeros((ROWS, ROWS), tl.float32)
        # The branch does more than save loads: operands of a product that come from an 8-bit load
        # in sight of the compiler get a layout that reads shared memory with 32-way conflicts.
        if _joined(
            group_a, node_a, inside_a, tile, slots, order, groups, N, M, nodes, GROUPS_PER_TILE,
            SET, HAS_MASK, MERGED, LANES,
        ):
            # Both roles of a row: its own match, and the rows that chose it.
            weight, product = _selected(
                group_r, node_r, inside_r, group_r, node_r, inside_r, pixel, in_window,
                max_sim, argmax, grad_loss, slots, N, M, capacity, pixels, SET, HAS_MASK, PIXELS,
            )
            along = tl.sum(product, 1) + tl.sum(product, 0)
            # Row r of W and, on the diagonal, the part of V[r] along x̂[r] that drops out: one product
            # with x gives the gradient, and x has no other use that would spoil its layout.
            itself = r[:, None] == r[None, :]
            weight = (weight + tl.trans(weight) - tl.where(itself, along[:, None], 0.0)) * unit[None, :]
        for start in range(0, channels, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            in_map = (channel < channels)[None, :]
            offset = channel_offsets(channel, node_r, N, query_channel, key_channel, SAME)
            x = tl.load(rows[:, None] + offset, mask=finite[:, None] & in_map, other=0.0)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            # A NaN row has no inverse, but its weights are NaN: NaN · 0 is the NaN it must get.
            grad = _times_rows(weight, x, total, PRECISION, UPCAST) * inverse[:, None]
            offset = channel_offsets(channel, node_r, N, gq_channel, gk_channel, SAME)
            tl.store(
                out[:, None] + offset, grad.to(grad_query.dtype.element_ty),
                mask=inside_r[:, None] & in_map,
            )
    if not MERGED:
        if apart:
            for start in range(0, channels, BLOCK):
                channel = start + tl.arange(0, BLOCK)
                in_map = (channel < channels)[None, :]
                total = tl.zeros((ROWS, BLOCK), tl.float32)
                along = tl.zeros((ROWS,), tl.float32)
                for other in range(0, tiles):
                    tile_b = tile - first + other
                    joined = _joined(
                        group_a, node_a, inside_a, tile_b, slots, order, groups, N, M, nodes,
                        GROUPS_PER_TILE, SET, HAS_MASK, MERGED, LANES,
                    )
                    group_c, node_c, inside_c = nodes_of(
                        r // PIXELS, tile_b, order, groups, nodes, GROUPS_PER_TILE, LANES, MERGED
                    )
                    inside_c = inside_c & in_window
                    weight = tl.zeros((ROWS, ROWS), tl.float32)
                    if joined:
                        weight, product = _selected(
                            group_r, node_r, inside_r, group_c, node_c, inside_c, pixel, in_window,
                            max_sim, argmax, grad_loss, slots, N, M, capacity, pixels,
                            SET, HAS_MASK, PIXELS,
                        )
                        along += tl.sum(product, 1)
                        back, product = _selected(
                            group_c, node_c, inside_c, group_r, node_r, inside_r, pixel, in_window,
                            max_sim, argmax, grad_loss, slots, N, M, capacity, pixels,
                            SET, HAS_MASK, PIXELS,
                        )
                        along += tl.sum(product, 0)
                        weight += tl.trans(back)
                    place_c = pixel.to(tl.int64) * (groups * nodes) + group_c * nodes + node_c
                    unit_c, inverse_c, finite_c = _row_scales(norm, place_c, inside_c, eps)
                    rows_b = row_pointers(
                        query, key, group_c, node_c, row, column, N,
                        query_group, query_sample, query_row, query_column,
                        key_group, key_sample, key_row, key_column, SET,
                    )
                    offset = channel_offsets(channel, node_c, N, query_channel, key_channel, SAME)
                    if joined:
                        y = tl.load(rows_b[:, None] + offset, mask=finite_c[:, None] & in_map, other=0.0)
                        total = _times_rows(weight * unit_c[None, :], y, total, PRECISION, UPCAST)
                offset = channel_offsets(channel, node_r, N, query_channel, key_channel, SAME)
                x = tl.load(rows[:, None] + offset, mask=finite[:, None] & in_map, other=0.0)
                grad = (total - (along * unit)[:, None] * x.to(tl.float32)) * inverse[:, None]
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
    unit, inverse, finite = _row_scales(norm + group * nodes + node, place_r * stride, inside_r, eps)
    channel = channel_block * BLOCK + tl.arange(0, BLOCK)
    in_map = (channel < channels)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)

    for other in range(0, nodes):
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
                    max_sim, argmax, grad_loss, place_c, slot_back + 0 * p, place_back + 0 * p, capacity,
                    pixels, inside_c,
                )
                back = tl.where(match_c[None, :] == pixel_r[:, None], g_c[None, :], 0.0)
                along += tl.sum(back * m_c[None, :], 1)
                weight += back
                # Matches of real slices lie close together: most blocks choose nothing here.
                if tl.max(tl.max((weight != 0).to(tl.int32), 1), 0) > 0:
                    unit_c, inverse_c, finite_c = _row_scales(
                        norm + group * nodes + other, place_c * stride, inside_c, eps
                    )
                    rows_c = row_pointers(
                        query, key, group + 0 * p, other + 0 * p, row_c, column_c, N,
                        query_group, query_sample, query_row, query_column,
                        key_group, key_sample, key_row, key_column, SET,
                    )
                    offset = channel_offsets(channel, other + 0 * p, N, query_channel, key_channel, SAME)
                    y = tl.load(rows_c[:, None] + offset, mask=finite_c[:, None] & in_map, other=0.0)
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
