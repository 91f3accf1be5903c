r"""Backward beyond a tile: the gradient of a row as a short list of weighted rows.

With g[q,k,p] = ∂L/∂m[q,k,p], the gradient of a row r (a pixel of a node) is

    ∂x[r] = (Σ_c w[r,c] x[c] + w[r,r] x[r]) / ‖x[r]‖     c: its matches, and who chose it
    w[r,c] = g / ‖x[c]‖                                  w[r,r] = −Σ_c g m / ‖x[r]‖

whose weights no longer depend on channels: so they are made once per window, and then each slice of
channels is a product of that sparse matrix with the rows of a window, all of which fit into the
first-level cache. Each feature comes from memory once, however often it is gathered:

    terms   r0 |c w|c w|c w|     r1 |c w|     r2 |c w|c w|       made by the first two kernels
                 \                                               for a window of all nodes
    slice of     x[c][0..32)  +  x[c'][0..32)  +  ..  = ∂x[r0][0..32)      by the third
    channels

    count_kernel   how many terms each row has, and the matches of each pair as a line of pixels
    list_kernel    the terms of each row: first as a query, then as a key, in the order of nodes
                   and pixels, whichever program runs first
    sum_kernel     the gradient
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import Rows, count_nodes, node_pixels, pair_nodes, pixels_of, with_pairs
from .gradient import pixel_weights


class Lists(NamedTuple):
    """The terms of all rows. Rows of a window are its pixels, node by node, G · windows · R."""

    matches: Any  # (P, windows, words) int64: 4 (or 2) pixels a word, what each chose
    counts: Any  # (G · windows, R) int32
    starts: Any  # (G · windows, R) int64, of a row's terms
    terms: Any  # int64: which row, as an offset, in the upper half, its weight in the lower
    itself: Any  # (G · windows, R) fp32, the weight of the row itself
    inverse: Any  # (G · windows, R) fp32, 1 / ‖x‖, and 0 for rows that get no gradient
    rows: Any  # (G · windows, R) int32: the rows, some 128 at a time sorted by their counts
    cursor: Any  # (1,) int64: how much of `terms` is taken


class Reach(NamedTuple):
    """How the list names rows: by offsets in units, so that they take 32 bits."""

    query_sample: int  # units from one to the next
    query_row: int
    query_column: int
    key_sample: int
    key_row: int
    key_column: int
    room: int  # R, a multiple of the rows that a program of `list_kernel` takes
    words: int
    partners: int  # that a node may have


@triton.jit
def _is_term(g, alive):
    """Whether a weight is not 0. A row without a unit vector takes what is NaN and nothing else."""
    return (g != 0.0) & (alive | (g != g))


@triton.jit
def _scales(norm, rows, sizes, eps, FORM: tl.constexpr):
    """1 / max(‖x‖, eps), finite for NaN too; 1 / ‖x‖, and 0 for rows that get no gradient."""
    value = tl.load(norm + node_pixels(rows, sizes, FORM), mask=rows.inside, other=0.0)
    alive = (value > eps) & (value < float("inf"))
    unit = 1 / tl.where(value > eps, value, eps)
    return unit, tl.where(alive, unit, 0.0), alive


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    saved, norm, listed, lists, reach, sizes, eps, pairs,
    FORM: tl.constexpr, PIXELS: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Some pairs and some pixels of a window: counts the terms of their rows.

    Sums of integers do not depend on the order of additions, so these are atomic.
    """
    sizes = with_pairs(sizes, pairs)
    window_pixels = sizes.window_rows * sizes.window_columns
    pair_blocks = tl.cdiv(sizes.pairs, PAIRS)
    blocks = tl.cdiv(reach.words * (64 // BITS), PIXELS)
    pid = tl.program_id(0)
    slot = pid % pair_blocks * PAIRS + tl.arange(0, PAIRS)
    p = pid // pair_blocks % blocks * PIXELS + tl.arange(0, PIXELS)
    window = pid // pair_blocks // blocks
    group, query, key, exists = pair_nodes(slot, listed, sizes, FORM)
    row, column, inside = pixels_of(p, window, sizes)
    group, query, key = group[None, :], query[None, :], key[None, :]
    row, column = row[:, None], column[:, None]
    present = inside[:, None] & exists[None, :]
    place = row * sizes.width + column
    g, m, match = pixel_weights(saved, place, slot[None, :], present, sizes)
    row_k, column_k, matched = pixels_of(match, window, sizes)
    matched = matched & present & (match >= 0)
    _, _, alive = _scales(norm, Rows(group, query, row, column, matched), sizes, eps, FORM)
    _, _, alive_k = _scales(norm, Rows(group, key, row_k, column_k, matched), sizes, eps, FORM)
    as_query = matched & _is_term(g, alive)
    as_key = matched & _is_term(g, alive_k)
    line = (group * sizes.windows + window).to(tl.int64) * reach.room
    r = line + query * window_pixels + p[:, None]
    tl.atomic_add(lists.counts + r, 1, mask=as_query, sem="relaxed")
    r = line + key * window_pixels + match
    tl.atomic_add(lists.counts + r, 1, mask=as_key, sem="relaxed")
    line = (slot.to(tl.int64) * sizes.windows + window) * (reach.words * (64 // BITS))
    quarter = lists.matches.to(tl.pointer_type(tl.int16 if BITS == 16 else tl.int32))
    match = tl.where(as_key, match, -1).to(quarter.dtype.element_ty)
    room = (p < reach.words * (64 // BITS))[:, None] & (slot < sizes.pairs)[None, :]
    tl.store(quarter + line[None, :] + p[:, None], match, mask=room)


@triton.jit
def _packed(offset, weight):
    """A term: an offset and a weight in one word."""
    low = weight.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (offset.to(tl.int64) << 32) | low


@triton.jit
def _offset_of(node, row, column, reach, sizes, FORM: tl.constexpr):
    """Where a row of features starts, in units, from the first of its group."""
    offset = node * reach.query_sample + row * reach.query_row + column * reach.query_column
    if not FORM.SET:
        other = (node - sizes.N) * reach.key_sample
        other += row * reach.key_row + column * reach.key_column
        offset = tl.where(node < sizes.N, offset, other)
    return offset


@triton.jit(do_not_specialize=["pairs"])
def list_kernel(
    saved, norm, partners, lists, reach, sizes, eps, pairs,
    FORM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The terms of some rows of a window; each thread has a row of its own."""
    sizes = with_pairs(sizes, pairs)
    window_pixels = sizes.window_rows * sizes.window_columns
    nodes = count_nodes(sizes, FORM)
    blocks = reach.room // ROWS
    index = tl.program_id(0) // blocks
    lane = tl.arange(0, ROWS)
    r = tl.program_id(0) % blocks * ROWS + lane
    group, window = index // sizes.windows, index % sizes.windows
    node, pixel = r // window_pixels, r % window_pixels
    row, column, inside = pixels_of(pixel, window, sizes)
    inside = inside & (node < nodes)
    rows = Rows(group + 0 * r, node, row, column, inside)
    here = index.to(tl.int64) * reach.room + r
    expected = tl.load(lists.counts + here)
    # Where the lists stand does not matter, what stands in them does.
    start = tl.atomic_add(lists.cursor, tl.sum(expected, 0).to(tl.int64), sem="relaxed")
    start += tl.cumsum(expected, 0) - expected
    list_ = lists.terms + start
    unit, inverse, alive = _scales(norm, rows, sizes, eps, FORM)

    who = group * nodes + node
    degree = tl.load(partners.degrees + 2 * who, mask=inside, other=0)
    degree_k = tl.load(partners.degrees + 2 * who + 1, mask=inside, other=0)
    line = who.to(tl.int64) * reach.partners
    count = tl.zeros((ROWS,), tl.int32)
    along = tl.zeros((ROWS,), tl.float32)
    for i in range(tl.max(degree, 0)):
        pair = tl.load(partners.as_query + line + i, mask=i < degree, other=-1)
        count, along = _add_match(
            rows, window, pair, list_, count, along, alive, saved, norm, reach, sizes, eps, FORM
        )
    first = count
    for i in range(tl.max(degree_k, 0)):
        pair = tl.load(partners.as_key + line + i, mask=i < degree_k, other=-1)
        count = _add_choosers(pixel, window, i, pair, list_, count, lists, reach, sizes, BITS)
    tl.debug_barrier()
    for j in range(tl.max(count - first, 0)):
        along += _weigh_chooser(
            group, window, partners.as_key + line, list_ + first + j, first + j < count, saved,
            norm, reach, sizes, eps, FORM,
        )  # fmt: skip
    # Neighbours in the order of the counts end at about the same time in `sum_kernel`.
    sorted_ = tl.sort(count * ROWS + lane)
    tl.store(lists.rows + here, r - lane + sorted_ % ROWS)
    tl.store(lists.counts + here, count)
    tl.store(lists.starts + here, start)
    # Not of a row without a unit vector: 0 · NaN would be NaN.
    tl.store(lists.itself + here, tl.where(alive, -along * unit, 0.0))
    tl.store(lists.inverse + here, inverse)


@triton.jit
def _add_match(
    rows, window, pair, list_, count, along, alive, saved, norm, reach, sizes, eps,
    FORM: tl.constexpr,
):  # fmt: skip
    """Lists the match of each row in a pair that it is the query of."""
    slot, key = (pair >> 32).to(tl.int32), pair.to(tl.int32)
    place = rows.row * sizes.width + rows.column
    g, m, match = pixel_weights(saved, place, slot, pair >= 0, sizes)
    row, column, matched = pixels_of(match, window, sizes)
    matched = matched & (pair >= 0) & (match >= 0) & _is_term(g, alive)
    unit, _, _ = _scales(norm, Rows(rows.group, key, row, column, matched), sizes, eps, FORM)
    offset = _offset_of(key, row, column, reach, sizes, FORM)
    tl.store(list_ + count, _packed(offset, g * unit), mask=matched)
    return count + matched.to(tl.int32), along + tl.where(matched, g * m, 0.0)


@triton.jit
def _add_choosers(pixel, window, i, pair, list_, count, lists, reach, sizes, BITS: tl.constexpr):
    """Lists who chose each row in the i-th pair that it is the key of, for `_weigh_chooser`."""
    MASK: tl.constexpr = (1 << BITS) - 1
    EACH: tl.constexpr = 64 // BITS
    line = lists.matches + ((pair >> 32) * sizes.windows + window) * reach.words
    for word in range(reach.words):
        chosen = tl.load(line + word, mask=pair >= 0, other=-1)
        for part in tl.static_range(EACH):
            hit = ((chosen >> (BITS * part)) & MASK).to(tl.int32) == pixel
            tl.store(list_ + count, ((i + 0 * pair) << 32) + (word * EACH + part), mask=hit)
            count += hit.to(tl.int32)
    return count


@triton.jit
def _weigh_chooser(
    group, window, pairs, term, present, saved, norm, reach, sizes, eps, FORM: tl.constexpr
):
    """Makes terms of what `_add_choosers` listed, in place; returns g · m of each."""
    who = tl.load(term, mask=present, other=0)
    pair = tl.load(pairs + (who >> 32), mask=present, other=0)
    slot, query = (pair >> 32).to(tl.int32), pair.to(tl.int32)
    row, column, _ = pixels_of(who.to(tl.int32), window, sizes)
    g, m, _ = pixel_weights(saved, row * sizes.width + column, slot, present, sizes)
    rows = Rows(group, query, row, column, present)
    unit, _, _ = _scales(norm, rows, sizes, eps, FORM)
    offset = _offset_of(query, row, column, reach, sizes, FORM)
    tl.store(term, _packed(offset, g * unit), mask=present)
    return tl.where(present, g * m, 0.0)
