"""Backward beyond a tile, second half: each row of the gradient from its list of terms."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import Rows, channel_offsets, count_nodes, pixels_of, row_pointers


@triton.jit
def sum_kernel(
    maps, grads, lists, reach, sizes, shares,
    FORM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
):  # fmt: skip
    """A share of the rows of a window, and a slice of channels.

    A slice is PARTS runs of CHANNELS channels, each of which is one line of a cache: a thread takes
    one vector of each, so that what it reads of a term serves them all.
    """
    slices = tl.cdiv(sizes.channels, CHANNELS * PARTS)
    pid = tl.program_id(0)
    first = pid % slices * CHANNELS * PARTS
    share = pid // slices % shares
    index = pid // slices // shares
    blocks = reach.room // ROWS
    group = (index // sizes.windows).to(tl.int64)
    for block in range(share * blocks // shares, (share + 1) * blocks // shares):
        r = block * ROWS + tl.arange(0, ROWS)
        _sum_rows(
            r, index, group, first, maps, grads, lists, reach, sizes, FORM, CHANNELS, PARTS, EVEN,
            UNIT, KEY_UNIT,
        )  # fmt: skip


@triton.jit
def _sum_rows(
    r, index, group, first, maps, grads, lists, reach, sizes,
    FORM: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
):  # fmt: skip
    """Sums some rows, whose lists are about equally long."""
    ROWS: tl.constexpr = r.shape[0]
    window_pixels = sizes.window_rows * sizes.window_columns
    line = index.to(tl.int64) * reach.room
    r = tl.load(lists.rows + line + r)
    node = r // window_pixels
    row, column, inside = pixels_of(r % window_pixels, index % sizes.windows, sizes)
    rows = Rows(group + 0 * r, node, row, column, inside & (node < count_nodes(sizes, FORM)))
    count = tl.load(lists.counts + line + r)
    list_ = lists.terms + tl.load(lists.starts + line + r)
    lane = first + tl.arange(0, CHANNELS)
    base, unit, step = _partner_maps(node, lane, group, maps, sizes, FORM, UNIT, KEY_UNIT)
    total_0 = tl.zeros((ROWS, CHANNELS), tl.float32)
    total_1 = total_0
    total_2 = total_0
    total_3 = total_0
    some = count > 0
    term = tl.load(list_, mask=some, other=0)
    for j in range(1, tl.max(count, 0) + 1):
        # Rows whose list has ended read their last term again, with the weight 0: of a NaN that
        # makes a NaN, which such a row is already. The next is loaded ahead.
        after = tl.load(list_ + tl.minimum(j, count - 1), mask=some, other=0)
        weight = tl.where(j <= count, term.to(tl.int32).to(tl.float32, bitcast=True), 0.0)[:, None]
        offset = (term >> 32).to(tl.int32)
        pointer = base + (offset.to(tl.int64) * unit)[:, None]
        total_0 += weight * _features(pointer, lane, 0, step, sizes, EVEN)
        if PARTS > 1:
            total_1 += weight * _features(pointer, lane, CHANNELS, step, sizes, EVEN)
        if PARTS > 2:
            total_2 += weight * _features(pointer, lane, 2 * CHANNELS, step, sizes, EVEN)
            total_3 += weight * _features(pointer, lane, 3 * CHANNELS, step, sizes, EVEN)
        term = after
    itself, inverse = tl.load(lists.itself + line + r), tl.load(lists.inverse + line + r)
    for part in tl.static_range(PARTS):
        total = total_0
        if part == 1:
            total = total_1
        if part == 2:
            total = total_2
        if part == 3:
            total = total_3
        total = tl.where(some[:, None], total, 0.0)
        channel = lane + part * CHANNELS
        mask = rows.inside[:, None] & (channel < sizes.channels)[None, :]
        own = row_pointers(maps, rows, sizes, FORM)[:, None]
        own += channel_offsets(channel, node, maps, sizes, FORM)
        x = tl.load(own, mask=mask & (itself != 0)[:, None], other=0.0)
        total = (total + itself[:, None] * x.to(tl.float32)) * inverse[:, None]
        out = row_pointers(grads, rows, sizes, FORM)[:, None]
        out += channel_offsets(channel, node, grads, sizes, FORM)
        tl.store(out, total.to(grads.query.dtype.element_ty), mask=mask)


@triton.jit
def _partner_maps(
    node, channel, group, maps, sizes,
    FORM: tl.constexpr, UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
):  # fmt: skip
    """Where the offsets in the lists of some rows count from, channel by channel, in what units,
    and the step from one channel to the next."""
    channel = channel.to(tl.int64)[None, :]
    if FORM.SET:
        base = maps.query + group * maps.query_strides.group + channel * maps.query_strides.channel
        unit = UNIT
        step = maps.query_strides.channel
    else:
        query = node < sizes.N
        base = tl.where(
            query,
            maps.key + group * maps.key_strides.group,
            maps.query + group * maps.query_strides.group,
        )[:, None]
        unit = tl.where(query, KEY_UNIT, UNIT)
        if FORM.SAME:
            step = maps.query_strides.channel
        else:
            step = tl.where(query, maps.key_strides.channel, maps.query_strides.channel)[:, None]
        base += channel * step
    return base, unit, step


@triton.jit
def _features(pointer, lane, ahead: tl.constexpr, step, sizes, EVEN: tl.constexpr):
    """A run of channels of some rows, so many ahead of a lane's first."""
    if EVEN:
        x = tl.load(pointer + ahead * step)
    else:
        mask = (lane + ahead < sizes.channels)[None, :]
        x = tl.load(pointer + ahead * step, mask=mask, other=0.0)
    return x.to(tl.float32)
