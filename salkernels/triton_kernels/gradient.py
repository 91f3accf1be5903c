r"""Backward: window by window, both roles of a row at once, one write of each gradient.

With g[q,k,p] = ∂L/∂m[q,k,p], the saved `argmax` turns into a matrix of selection weights W between
the rows of two tiles: g at (query pixel, its match) for the role as query, the transpose of the
same for the role as key. Then, for a row r,

    V[r] = Σ_c W[r,c] x̂[c]             ∂x[r] = (V[r] − D[r] x̂[r]) / ‖x[r]‖
    D[r] = x̂[r]·V[r] = Σ_c W[r,c] m    known from `max_sim` before any feature is loaded

so that channels pass by once, in blocks, and nothing is kept of them: no atomics, no second pass.

Here two tiles at most hold a window of a group; for more there are terms.py and sum.py.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import (
    across,
    channel_offsets,
    dot,
    down,
    load_channels,
    node_pixels,
    nodes_of,
    row_pointers,
    rows_of,
    slots_between,
    slots_of,
    tf32_parts,
    with_pairs,
)


class Terms(NamedTuple):
    """The contribution of each pixel of each pair, with the pairs innermost: (H, W, P)."""

    max_sim: Any
    argmax: Any
    grad_sim: Any  # ∂L/∂max_sim


class Partners(NamedTuple):
    """Rows of features, the right operand of the product with weights."""

    pointers: Any
    node: Any
    unit: Any  # 1 / max(‖x‖, eps)
    inverse: Any  # 1 / ‖x‖, and 0 where the row gets no gradient
    finite: Any  # whether it can be multiplied


@triton.jit
def pixel_weights(terms, pixel, slot, present, sizes):
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
    g, m, match = pixel_weights(terms, pixel, slot, slot >= 0, sizes)
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
def times_rows(weight, x, total, PRODUCT: tl.constexpr):
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
def store_channels(
    total, start, grads, rows, pointers, sizes, FORM: tl.constexpr, CUT: tl.constexpr
):
    """Writes a block of channels of the gradient of some rows."""
    channel = start + tl.arange(0, CUT.CHANNELS)
    offset = channel_offsets(channel, rows.node, grads, sizes, FORM)
    mask = rows.inside[:, None]
    if not CUT.EVEN:
        mask = mask & (channel < sizes.channels)[None, :]
    tl.store(pointers[:, None] + offset, total.to(grads.query.dtype.element_ty), mask=mask)


@triton.jit
def _joined(tile_a, tile_b, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """Whether any pair, in either direction, joins the nodes of two tiles."""
    lane = tl.arange(0, CUT.LANES)
    a = nodes_of(lane, tile_a, plan, sizes, FORM, CUT)
    b = nodes_of(lane, tile_b, plan, sizes, FORM, CUT)
    slot, back = slots_between(a, b, plan, sizes, FORM)
    return tl.max(tl.max(tl.maximum(slot, back), 1), 0) >= 0


@triton.jit(do_not_specialize=["pairs"])
def gradient_kernel(
    maps, grads, terms, norm, plan, sizes, eps, pairs,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr, TILES: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of one tile in one window.

    Of TILES = 2 tiles of a group those that pairs join are a launch of their own, ACROSS: its
    weights take twice as many registers.
    """
    sizes = with_pairs(sizes, pairs)
    window = tl.program_id(0) // TILES % sizes.windows
    leading = tl.program_id(0) // TILES // sizes.windows * TILES
    tile = leading + tl.program_id(0) % TILES
    if TILES == 2:
        other = leading + (1 - tl.program_id(0) % TILES)
        if _joined(tile, other, plan, sizes, FORM, CUT) == ACROSS:
            if ACROSS and maps.query.dtype.element_ty != tl.bfloat16:
                _across_tiles(
                    tile, leading, TILES, window, maps, grads, terms, norm, plan, sizes, eps,
                    FORM, CUT, PRODUCT,
                )  # fmt: skip
            else:
                _gradient_of_tile(
                    tile, other, window, maps, grads, terms, norm, plan, sizes, eps,
                    FORM, CUT, PRODUCT, ACROSS,
                )  # fmt: skip
    else:
        _gradient_of_tile(
            tile, tile, window, maps, grads, terms, norm, plan, sizes, eps, FORM, CUT, PRODUCT,
            ACROSS,
        )  # fmt: skip


@triton.jit
def _gradient_of_tile(
    tile, other, window, maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """The gradient of the rows of a tile, whose partners are in it or, ACROSS, also in another.

    The columns of W, and the rows of x that they multiply, come in halves of a tile: a whole matrix
    does not fit into the registers while it is put together.
    """
    ROWS: tl.constexpr = CUT.LANES * CUT.PIXELS
    CHANNELS: tl.constexpr = CUT.CHANNELS
    r = tl.arange(0, ROWS)
    u = tl.arange(0, ROWS // 2)
    v = ROWS // 2 + u
    rows = rows_of(r, tile, window, plan, sizes, FORM, CUT)
    own = _partners(grads, norm, rows, sizes, eps, FORM)
    half_u = _partners_of(u, tile, window, maps, norm, plan, sizes, eps, FORM, CUT)
    half_v = _partners_of(v, tile, window, maps, norm, plan, sizes, eps, FORM, CUT)
    weight_u = tl.zeros((ROWS, ROWS // 2), tl.float32)
    weight_v = weight_u
    along = tl.zeros((ROWS,), tl.float32)
    # The branch does more than save loads: operands of a product that come from an 8-bit load in
    # sight of the compiler get a layout that reads shared memory with 32-way conflicts.
    if ACROSS:
        half_s = _partners_of(u, other, window, maps, norm, plan, sizes, eps, FORM, CUT)
        half_t = _partners_of(v, other, window, maps, norm, plan, sizes, eps, FORM, CUT)
        weight_s = tl.zeros((ROWS, ROWS // 2), tl.float32)
        weight_t = weight_s
        if _joined(tile, other, plan, sizes, FORM, CUT):
            weight_s, part = _both_roles(tile, r, other, u, window, terms, plan, sizes, FORM, CUT)
            along += part
            weight_t, part = _both_roles(tile, r, other, v, window, terms, plan, sizes, FORM, CUT)
            along += part
            weight_s *= half_s.unit[None, :]
            weight_t *= half_t.unit[None, :]
    if ACROSS or _joined(tile, tile, plan, sizes, FORM, CUT):
        weight_u, part = _both_roles(tile, r, tile, u, window, terms, plan, sizes, FORM, CUT)
        along += part
        weight_v, part = _both_roles(tile, r, tile, v, window, terms, plan, sizes, FORM, CUT)
        along += part
        # What drops out of V[r] goes into W too: one product with x gives the gradient, and x has
        # no other use that would spoil its layout.
        weight_u -= tl.where(r[:, None] == u[None, :], along[:, None], 0.0)
        weight_v -= tl.where(r[:, None] == v[None, :], along[:, None], 0.0)
        weight_u *= half_u.unit[None, :]
        weight_v *= half_v.unit[None, :]
    for start in range(0, sizes.channels, CUT.CHANNELS):
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = _times_partners(weight_u, half_u, start, total, maps, sizes, FORM, CUT, PRODUCT)
        total = _times_partners(weight_v, half_v, start, total, maps, sizes, FORM, CUT, PRODUCT)
        if ACROSS:
            total = _times_partners(weight_s, half_s, start, total, maps, sizes, FORM, CUT, PRODUCT)
            total = _times_partners(weight_t, half_t, start, total, maps, sizes, FORM, CUT, PRODUCT)
        # A NaN row has no inverse, but its weights are NaN: NaN · 0 is the NaN it must get.
        total *= own.inverse[:, None]
        store_channels(total, start, grads, rows, own.pointers, sizes, FORM, CUT)


@triton.jit
def _across_tiles(
    tile, leading, tiles, window, maps, grads, terms, norm, plan, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The same ACROSS tiles where the weights, in two parts each, do not fit into the registers: by
    halves of tiles, made anew for each block of channels.

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
                total = times_rows(weight, y, total, PRODUCT)
        total *= own.inverse[:, None]
        store_channels(total, start, grads, rows, own.pointers, sizes, FORM, CUT)


@triton.jit
def _partners_of(
    r, tile, window, maps, norm, plan, sizes, eps, FORM: tl.constexpr, CUT: tl.constexpr
):
    rows = rows_of(r, tile, window, plan, sizes, FORM, CUT)
    return _partners(maps, norm, rows, sizes, eps, FORM)


@triton.jit
def _times_partners(
    weight, partners, start, total, maps, sizes,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """total + weight @ a block of channels of the partners."""
    x = load_channels(
        partners.pointers, start, partners.node, partners.finite, maps, sizes, FORM, CUT
    )
    return times_rows(weight, x, total, PRODUCT)
