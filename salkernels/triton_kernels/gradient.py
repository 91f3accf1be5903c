r"""Backward: window by window, both roles of a row at once, one write of each gradient.

With g[q,k,p] = ∂L/∂m[q,k,p], the saved `argmax` turns into a matrix of selection weights W between
the rows of two tiles: g at (query pixel, its match) for the role as query, the transpose of the
same for the role as key. Then, for a row r,

    V[r] = Σ_c W[r,c] x̂[c]             ∂x[r] = (V[r] − D[r] x̂[r]) / ‖x[r]‖
    D[r] = x̂[r]·V[r] = Σ_c W[r,c] m    known from `max_sim` before any feature is loaded

so that channels pass by once, in blocks, and nothing is kept of them: no atomics, no second pass.

    gradient_kernel          windows of which a tile holds all pixels
    stream_gradient_kernel   larger windows, a block of pixels of one sample at a time
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import (
    Lanes,
    Rows,
    across,
    channel_offsets,
    count_nodes,
    count_tiles,
    dot,
    down,
    load_channels,
    node_pixels,
    nodes_of,
    pixels_of,
    row_pointers,
    rows_of,
    slots_between,
    slots_of,
    tf32_parts,
)


class Terms(NamedTuple):
    """What each pixel of each pair adds, pixel by pixel, with the pairs innermost: (H, W, P)."""

    max_sim: Any
    argmax: Any
    grad_sim: Any  # ∂L/∂max_sim


class Partners(NamedTuple):
    """Rows of features that weights are multiplied with."""

    pointers: Any
    node: Any
    unit: Any  # 1 / max(‖x‖, eps)
    inverse: Any  # 1 / ‖x‖, and 0 where the row gets no gradient
    finite: Any  # whether it can be multiplied


@triton.jit
def _pixel_weights(terms, pixel, slot, present, sizes):
    """g, m and the match of pixels of pairs; g = 0 where there is no pair."""
    at = pixel.to(tl.int64) * sizes.pairs + slot
    g = tl.load(terms.grad_sim + at, mask=present, other=0.0)
    m = tl.load(terms.max_sim + at, mask=present, other=1.0)
    match = tl.load(terms.argmax + at, mask=present, other=0).to(tl.int32)
    # NaN stays in g alone: 0 · NaN would take it to pixels that are no match.
    return tl.where(m == m, g, m), tl.where(m == m, m, 1.0), match


@triton.jit
def _selected(
    tile_r, r, tile_c, c, window, terms, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr
):
    """g where row c of a tile is the match of row r of another, and g · m, both (rows, columns).

    Loaded as a matrix, though all pixels of a column's sample share a value: they come from the
    first-level cache, and nothing has to change its layout, which would cost bank conflicts.
    """
    rows = rows_of(r, tile_r, window, plan, sizes, FORM, CUT)
    lanes = nodes_of(c // CUT.PIXELS, tile_c, plan, sizes, FORM, CUT)
    slot = slots_of(down(rows), across(lanes), plan, sizes, FORM)
    pixel = (rows.row * sizes.width + rows.column)[:, None]
    g, m, match = _pixel_weights(terms, pixel, slot, slot >= 0, sizes)
    place = c % CUT.PIXELS
    # The number of a pixel without a match, 255 or −1, may be that of a row which is padding.
    place = tl.where(place < sizes.window_rows * sizes.window_columns, place, -2)
    weight = tl.where(match == place[None, :], g, 0.0)
    return weight, weight * m


@triton.jit
def _both_roles(
    tile_r, r, tile_c, c, window, terms, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr
):
    """W[r,c] and its part of D[r]: the match of r, and r as the match of c."""
    weight, product = _selected(tile_r, r, tile_c, c, window, terms, plan, sizes, FORM, CUT)
    along = tl.sum(product, 1)
    back, product = _selected(tile_c, c, tile_r, r, window, terms, plan, sizes, FORM, CUT)
    return weight + tl.trans(back), along + tl.sum(product, 0)


@triton.jit
def _partners(maps, norm, rows, sizes, eps, FORM: tl.constexpr):
    """Where rows of features (or gradients) start, their scales, and which can be multiplied.

    A NaN row would spread through 0 · NaN to samples it is not paired with, so it is not loaded.
    Its partners, and it itself, get their NaN from the weights: they hold it where `max_sim` does.
    """
    value = tl.load(norm + node_pixels(rows, sizes, FORM), mask=rows.inside, other=1.0)
    finite = rows.inside & (value == value) & (value < float("inf"))
    alive = finite & (value > eps)
    inverse = tl.where(alive, 1 / tl.where(alive, value, 1.0), 0.0)
    # Finite for NaN too, which weights carry by themselves.
    unit = 1 / tl.where(value > eps, value, eps)
    return Partners(row_pointers(maps, rows, sizes, FORM), rows.node, unit, inverse, finite)


@triton.jit
def _times_rows(weight, x, total, PRODUCT: tl.constexpr):
    """total + weight @ x without rounding the fp32 weights to the dtype of x."""
    if x.dtype == tl.bfloat16:
        # Three bf16 parts hold a whole fp32 weight, and x is exact.
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = dot(low, x, total, PRODUCT)
        total = dot(middle, x, total, PRODUCT)
        total = dot(high, x, total, PRODUCT)
    elif x.dtype == tl.float16 and PRODUCT.PRECISION == "tf32x3":
        # fp16 has too little range for weights; in tf32, x is exact.
        high, low = tf32_parts(weight)
        total = tl.dot(low, x.to(tl.float32), total, input_precision="tf32")
        total = tl.dot(high, x.to(tl.float32), total, input_precision="tf32")
    else:
        total = dot(weight, x.to(tl.float32), total, PRODUCT)
    return total


@triton.jit
def _store_channels(
    total, start, grads, rows, pointers, sizes, FORM: tl.constexpr, CUT: tl.constexpr
):
    """Writes a block of channels of the gradient of some rows."""
    channel = start + tl.arange(0, CUT.CHANNELS)
    offset = channel_offsets(channel, rows.node, grads, sizes, FORM)
    mask = rows.inside[:, None] & (channel < sizes.channels)[None, :]
    tl.store(pointers[:, None] + offset, total.to(grads.query.dtype.element_ty), mask=mask)


@triton.jit
def _joined(tile_a, tile_b, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """Whether any pair, in either direction, joins the nodes of two tiles."""
    lane = tl.arange(0, CUT.LANES)
    a = nodes_of(lane, tile_a, plan, sizes, FORM, CUT)
    b = nodes_of(lane, tile_b, plan, sizes, FORM, CUT)
    slot, back = slots_between(a, b, plan, sizes, FORM)
    return tl.max(tl.max(tl.maximum(slot, back), 1), 0) >= 0


@triton.jit
def gradient_kernel(
    maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of one tile in one window."""
    tiles = count_tiles(sizes, FORM, CUT)
    first = tl.program_id(0) % tiles
    window = tl.program_id(0) // tiles % sizes.windows
    tile = tl.program_id(0) // tiles // sizes.windows * tiles + first
    apart = False
    if not FORM.MERGED:
        # Tiles hold what belongs together, so that partners elsewhere are the exception.
        for other in range(tiles):
            if other != first:
                apart = apart | _joined(tile, tile - first + other, plan, sizes, FORM, CUT)
    if not apart:
        _within_a_tile(tile, window, maps, grads, terms, norm, plan, sizes, eps, FORM, CUT, PRODUCT)
    if not FORM.MERGED:
        if apart:
            _across_tiles(
                tile, tile - first, tiles, window, maps, grads, terms, norm, plan, sizes, eps,
                FORM, CUT, PRODUCT,
            )  # fmt: skip


@triton.jit
def _within_a_tile(
    tile, window, maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The gradient of rows whose partners are all in their own tile.

    The columns of W, and the rows of x that they multiply, come in two halves: a whole matrix does
    not fit into the registers while it is put together.
    """
    ROWS: tl.constexpr = CUT.LANES * CUT.PIXELS
    CHANNELS: tl.constexpr = CUT.CHANNELS
    r = tl.arange(0, ROWS)
    u = tl.arange(0, ROWS // 2)
    v = ROWS // 2 + u
    rows = rows_of(r, tile, window, plan, sizes, FORM, CUT)
    rows_u = rows_of(u, tile, window, plan, sizes, FORM, CUT)
    rows_v = rows_of(v, tile, window, plan, sizes, FORM, CUT)
    own = _partners(grads, norm, rows, sizes, eps, FORM)
    half_u = _partners(maps, norm, rows_u, sizes, eps, FORM)
    half_v = _partners(maps, norm, rows_v, sizes, eps, FORM)
    weight_u = tl.zeros((ROWS, ROWS // 2), tl.float32)
    weight_v = tl.zeros((ROWS, ROWS // 2), tl.float32)
    # The branch does more than save loads: operands of a product that come from an 8-bit load in
    # sight of the compiler get a layout that reads shared memory with 32-way conflicts.
    if _joined(tile, tile, plan, sizes, FORM, CUT):
        weight_u, along_u = _both_roles(tile, r, tile, u, window, terms, plan, sizes, FORM, CUT)
        weight_v, along_v = _both_roles(tile, r, tile, v, window, terms, plan, sizes, FORM, CUT)
        # What drops out of V[r] goes into W too: one product with x gives the gradient, and x has
        # no other use that would spoil its layout.
        along = (along_u + along_v)[:, None]
        weight_u -= tl.where(r[:, None] == u[None, :], along, 0.0)
        weight_v -= tl.where(r[:, None] == v[None, :], along, 0.0)
        weight_u *= half_u.unit[None, :]
        weight_v *= half_v.unit[None, :]
    for start in range(0, sizes.channels, CUT.CHANNELS):
        x = load_channels(
            half_u.pointers, start, half_u.node, half_u.finite, maps, sizes, FORM, CUT
        )
        y = load_channels(
            half_v.pointers, start, half_v.node, half_v.finite, maps, sizes, FORM, CUT
        )
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = _times_rows(weight_u, x, total, PRODUCT)
        total = _times_rows(weight_v, y, total, PRODUCT)
        # A NaN row has no inverse, but its weights are NaN: NaN · 0 is the NaN it must get.
        total *= own.inverse[:, None]
        _store_channels(total, start, grads, rows, own.pointers, sizes, FORM, CUT)


@triton.jit
def _across_tiles(
    tile, leading, tiles, window, maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The gradient of rows with partners in other tiles of their group, W by halves of tiles.

    D of all tiles together is needed before the part along x̂ can be taken off.
    """
    ROWS: tl.constexpr = CUT.LANES * CUT.PIXELS
    CHANNELS: tl.constexpr = CUT.CHANNELS
    r = tl.arange(0, ROWS)
    u = tl.arange(0, ROWS // 2)
    rows = rows_of(r, tile, window, plan, sizes, FORM, CUT)
    own = _partners(grads, norm, rows, sizes, eps, FORM)
    along = tl.zeros((ROWS,), tl.float32)
    for half in range(2 * tiles):
        other = leading + half // 2
        c = half % 2 * (ROWS // 2) + u
        if _joined(tile, other, plan, sizes, FORM, CUT):
            weight, part = _both_roles(tile, r, other, c, window, terms, plan, sizes, FORM, CUT)
            along += part
    for start in range(0, sizes.channels, CUT.CHANNELS):
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for half in range(2 * tiles):
            other = leading + half // 2
            c = half % 2 * (ROWS // 2) + u
            joined = _joined(tile, other, plan, sizes, FORM, CUT)
            weight = tl.zeros((ROWS, ROWS // 2), tl.float32)
            if joined:
                weight, part = _both_roles(tile, r, other, c, window, terms, plan, sizes, FORM, CUT)
            columns = rows_of(c, other, window, plan, sizes, FORM, CUT)
            partners = _partners(maps, norm, columns, sizes, eps, FORM)
            itself = (r[:, None] == c[None, :]) & (tile == other)
            weight = (weight - tl.where(itself, along[:, None], 0.0)) * partners.unit[None, :]
            if joined | (tile == other):
                y = load_channels(
                    partners.pointers, start, partners.node, partners.finite, maps, sizes, FORM, CUT
                )
                total = _times_rows(weight, y, total, PRODUCT)
        total *= own.inverse[:, None]
        _store_channels(total, start, grads, rows, own.pointers, sizes, FORM, CUT)


@triton.jit
def stream_gradient_kernel(
    maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of pixels of one node in one window, and of a block of channels."""
    PIXELS: tl.constexpr = CUT.PIXELS
    CHANNELS: tl.constexpr = CUT.CHANNELS
    nodes = count_nodes(sizes, FORM)
    blocks = tl.cdiv(sizes.window_rows * sizes.window_columns, CUT.PIXELS)
    channel_blocks = tl.cdiv(sizes.channels, CUT.CHANNELS)
    pid = tl.program_id(0)
    block = pid % blocks
    start = pid // blocks % channel_blocks * CUT.CHANNELS
    window = pid // blocks // channel_blocks % sizes.windows
    index = pid // blocks // channel_blocks // sizes.windows
    itself = Lanes(index // nodes, index % nodes, True)

    p = tl.arange(0, CUT.PIXELS)
    pixel = block * CUT.PIXELS + p
    rows = _pixels_of_node(itself, pixel, window, sizes)
    own = _partners(maps, norm, rows, sizes, eps, FORM)
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    along = tl.zeros((PIXELS,), tl.float32)
    for node in range(nodes):
        other = Lanes(itself.group, node, True)
        slot = slots_of(itself, other, plan, sizes, FORM)
        back = slots_of(other, itself, plan, sizes, FORM)
        if (slot >= 0) | (back >= 0):
            total, along = _add_terms(
                total, along, rows, pixel, other, slot, back, start, window, maps, terms, norm,
                sizes, eps, FORM, CUT, PRODUCT,
            )  # fmt: skip

    x = load_channels(own.pointers, start, own.node, own.finite, maps, sizes, FORM, CUT)
    total = (total - (along * own.unit)[:, None] * x.to(tl.float32)) * own.inverse[:, None]
    _store_channels(
        total, start, grads, rows, row_pointers(grads, rows, sizes, FORM), sizes, FORM, CUT
    )


@triton.jit
def _pixels_of_node(lane, pixel, window, sizes):
    """Pixels of a window of one node, as rows of a tile."""
    row, column, inside = pixels_of(pixel, window, sizes)
    return Rows(lane.group + 0 * pixel, lane.node + 0 * pixel, row, column, inside)


@triton.jit
def _add_terms(
    total, along, rows, pixel, other, slot, back, start, window, maps, terms, norm, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Adds to V and D of a block of pixels what they and the pixels of one other node give."""
    window_pixels = sizes.window_rows * sizes.window_columns
    place = rows.row * sizes.width + rows.column
    g, m, match = _pixel_weights(terms, place, slot, rows.inside & (slot >= 0), sizes)
    # A pixel without a match, 255 or −1, is no term.
    g = tl.where((match >= 0) & (match < window_pixels), g, 0.0)
    along += g * m
    for first in range(0, window_pixels, CUT.PIXELS):
        pixel_c = first + tl.arange(0, CUT.PIXELS)
        columns = _pixels_of_node(other, pixel_c, window, sizes)
        weight = tl.where(match[:, None] == pixel_c[None, :], g[:, None], 0.0)
        place = columns.row * sizes.width + columns.column
        present = columns.inside & (back >= 0)
        g_c, m_c, match_c = _pixel_weights(terms, place, back, present, sizes)
        chose = tl.where(match_c[None, :] == pixel[:, None], g_c[None, :], 0.0)
        along += tl.sum(chose * m_c[None, :], 1)
        weight += chose
        # Matches of real slices lie close together: most blocks choose nothing here.
        if tl.max(tl.max((weight != 0).to(tl.int32), 1), 0) > 0:
            partners = _partners(maps, norm, columns, sizes, eps, FORM)
            y = load_channels(
                partners.pointers, start, partners.node, partners.finite, maps, sizes, FORM, CUT
            )
            total = _times_rows(weight * partners.unit[None, :], y, total, PRODUCT)
    return total, along
