r"""The log-sum-exp over windows of negatives, backward: one write of each gradient, no atomics.

With g = ∂L/∂lse, the row of a query q and that of a key k have the weight

    W[q,k] = g[q] · e^{sim[q,k] / τ − lse[q]} / τ

A program owns a block of rows and some of their channels. All partners pass by in blocks: their
cosines are computed again, and the weights of both roles of a row that follow from them give

    V[r] = Σ_c (W[r,c] + W[c,r]) x̂[c]             ∂x[r] = (V[r] − D[r] x̂[r]) / ‖x[r]‖
    D[r] = x̂[r]·V[r] = Σ_c (W[r,c] + W[c,r]) sim[r,c]

In the set form a row has both roles; else queries and keys are a launch each.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import across, down, load_channels, row_pointers, slots_of
from .gradient import store_channels, times_rows
from .lse import (
    INF,
    NOTHING,
    any_of,
    block_of,
    norms_at,
    products,
    rows_at,
    side_of,
    taking_part,
    window_of,
)

LOG2E = tl.constexpr(1.4426950408889634)


class Sums(NamedTuple):
    """Of the queries (G, N, H, W): the results of the forward, and their gradient."""

    lse: Any
    grad: Any


class Roles(NamedTuple):
    """The roles of the rows whose gradient it is; compiled in."""

    QUERY: bool
    KEY: bool


class Terms(NamedTuple):
    """How rows as queries weight their terms: slope · 2^(logit − shift)."""

    slope: Any
    shift: Any
    any: Any  # whether they weight any


@triton.jit
def terms_of(rows, loaded, sums, sizes, slope, ARE_QUERIES: tl.constexpr):
    """Of rows as queries. Where no gradient comes from, or no term was summed, there is none."""
    if ARE_QUERIES:
        node = (rows.group * sizes.N + rows.node).to(tl.int64)
        place = (node * sizes.height + rows.row) * sizes.width + rows.column
        lse = tl.load(sums.lse + place, mask=loaded, other=NOTHING)
        grad = tl.load(sums.grad + place, mask=loaded, other=0.0)
    else:
        lse = tl.zeros(rows.node.shape, tl.float32)
        grad = lse
    return Terms(slope * grad, lse * LOG2E, loaded & (lse != NOTHING) & (grad != 0))


@triton.jit
def roles_of(
    rows, present, own, columns, present_c, theirs, plan, sizes,
    FORM: tl.constexpr, ROLES: tl.constexpr,
):  # fmt: skip
    """Whether rows are queries of columns, and whether they are keys of them, (rows, columns)."""
    if ROLES.QUERY:
        queries, keys = taking_part(rows, own.any), taking_part(columns, present_c)
        forth = slots_of(down(queries), across(keys), plan, sizes, FORM) >= 0
        back = forth
    if ROLES.KEY:
        queries, keys = taking_part(columns, theirs.any), taking_part(rows, present)
        back = slots_of(across(queries), down(keys), plan, sizes, FORM) >= 0
        if not ROLES.QUERY:
            forth = back
    return forth, back


@triton.jit
def weights_of(logit, forth, back, own, theirs, ROLES: tl.constexpr):
    """The weights of both roles, added up."""
    weight = tl.zeros(logit.shape, tl.float32)
    if ROLES.QUERY:
        term = own.slope[:, None] * tl.exp2(logit - own.shift[:, None])
        weight += tl.where(forth, term, 0.0)
    if ROLES.KEY:
        term = theirs.slope[None, :] * tl.exp2(logit - theirs.shift[None, :])
        weight += tl.where(back, term, 0.0)
    return weight


@triton.jit
def window_lse_gradient_kernel(
    maps, grads, norm, plan, sums, sizes, eps, scale, slope,
    FORM: tl.constexpr, SIDE: tl.constexpr, CUT: tl.constexpr, PART: tl.constexpr,
    PRODUCT: tl.constexpr, WEIGHTED: tl.constexpr, ROLES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of some channels, PARTS blocks, of a block of rows.

    `scale` is log2(e) / τ and `slope` 1 / τ; PRODUCT is the arithmetic of cosines, and WEIGHTED
    that of weights with features.
    """
    CHANNELS: tl.constexpr = PART.CHANNELS
    samples = sizes.N if ROLES.QUERY else sizes.M
    slices = tl.cdiv(sizes.channels, PARTS * CHANNELS)
    channel = tl.program_id(0) % slices * (PARTS * CHANNELS)
    block, window, group = block_of(tl.program_id(0) // slices, samples, sizes, ROWS)
    _, _, _, pixels = window_of(window, sizes)
    if block * ROWS >= samples * pixels:  # a smaller window has fewer
        return
    first = 0 if ROLES.QUERY else sizes.N
    rows = rows_at(block * ROWS + tl.arange(0, ROWS), first, samples, group, window, sizes)
    value = norms_at(norm, rows, sizes, FORM)
    # A NaN row would spread through 0 · NaN, so it is not loaded. Weights that it is part of, its
    # own among them, hold NaN by the log-sum-exp.
    present, finite = value != INF, value < INF
    unit = 1 / tl.where(value > eps, value, eps)
    own = terms_of(rows, present, sums, sizes, slope, ROLES.QUERY)
    total_0 = tl.zeros((ROWS, CHANNELS), tl.float32)
    total_1, total_2, total_3 = total_0, total_0, total_0
    along = tl.zeros((ROWS,), tl.float32)
    others = sizes.M if ROLES.QUERY else sizes.N
    other_first = 0 if FORM.SET or not ROLES.QUERY else sizes.N
    own_maps = side_of(maps, sizes, FORM, not ROLES.QUERY)
    their_maps = side_of(maps, sizes, FORM, ROLES.QUERY)
    for start in range(0, others * pixels, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        columns = rows_at(c, other_first, others, group, window, sizes)
        value_c = norms_at(norm, columns, sizes, FORM)
        present_c, finite_c = value_c != INF, value_c < INF
        theirs = terms_of(columns, present_c, sums, sizes, slope, ROLES.KEY)
        forth, back = roles_of(
            rows, present, own, columns, present_c, theirs, plan, sizes, FORM, ROLES
        )
        if any_of(forth | back):
            sim = products(
                rows, finite, own_maps, columns, finite_c, their_maps, sizes, SIDE, CUT, PRODUCT
            )
            unit_c = 1 / tl.where(value_c > eps, value_c, eps)
            sim = sim * unit[:, None] * unit_c[None, :]
            weight = weights_of(sim * scale, forth, back, own, theirs, ROLES)
            along += tl.sum(weight * sim, 1)
            weight *= unit_c[None, :]
            given = (weight, columns, finite_c, their_maps, sizes)
            total_0 = _add(total_0, channel, *given, SIDE, PART, WEIGHTED)
            if PARTS > 1:
                total_1 = _add(total_1, channel + CHANNELS, *given, SIDE, PART, WEIGHTED)
            if PARTS > 2:
                total_2 = _add(total_2, channel + 2 * CHANNELS, *given, SIDE, PART, WEIGHTED)
                total_3 = _add(total_3, channel + 3 * CHANNELS, *given, SIDE, PART, WEIGHTED)
    own_grads = side_of(grads, sizes, FORM, not ROLES.QUERY)
    _store_all(
        total_0, total_1, total_2, total_3, channel, along * unit, value, eps, rows, own_maps,
        own_grads, sizes, SIDE, PART, PARTS,
    )  # fmt: skip


@triton.jit
def _add(
    total, channel, weight, columns, finite, maps, sizes,
    SIDE: tl.constexpr, PART: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """total + weight @ a block of channels of the partners."""
    pointers = row_pointers(maps, columns, sizes, SIDE)
    y = load_channels(pointers, channel, columns.node, finite, maps, sizes, SIDE, PART)
    return times_rows(weight, y, total, WEIGHTED)


@triton.jit
def _store(
    total, channel, along, inverse, rows, finite, maps, grads, sizes,
    SIDE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Takes off the part along x̂, and writes a block of channels."""
    pointers = row_pointers(maps, rows, sizes, SIDE)
    x = load_channels(pointers, channel, rows.node, finite, maps, sizes, SIDE, PART)
    total = (total - along[:, None] * x.to(tl.float32)) * inverse[:, None]
    pointers = row_pointers(grads, rows, sizes, SIDE)
    store_channels(total, channel, grads, rows, pointers, sizes, SIDE, PART)


@triton.jit
def _store_all(
    total_0, total_1, total_2, total_3, channel, along, norm, eps, rows, maps, grads, sizes,
    SIDE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes PARTS blocks of channels."""
    CHANNELS: tl.constexpr = PART.CHANNELS
    finite = norm < INF
    # 0 where the row gets no gradient. Of a NaN row weights are NaN or none: it gets NaN or 0.
    alive = finite & (norm > eps)
    inverse = tl.where(alive, 1 / tl.where(alive, norm, 1.0), 0.0)
    given = (along, inverse, rows, finite, maps, grads, sizes)
    _store(total_0, channel, *given, SIDE, PART)
    if PARTS > 1:
        _store(total_1, channel + CHANNELS, *given, SIDE, PART)
    if PARTS > 2:
        _store(total_2, channel + 2 * CHANNELS, *given, SIDE, PART)
        _store(total_3, channel + 3 * CHANNELS, *given, SIDE, PART)
