"""Which samples, pixels and pairs a program works on: functions shared by all kernels.

The kernels see one list of *nodes* per group: its samples in the set form, else its N queries
followed by its M keys. Pairs join nodes; a tile takes a few nodes and the pixels of one window of
each, `LANES` nodes x `PIXELS` pixels = rows. Extents that are no power of two are padded, and
padding is masked, never loaded.

Arguments come in tuples with names, below: Triton passes them on as if each part were an argument
of its own, also those that are compiled in (`FORM`, `CUT`, `PRODUCT`). A part of the latter that
stands alone in a shape gets a name first: Triton 3.6 takes no bare number there.

Letters: G groups, N query and M key samples, V nodes of a group (N, or N + M), C channels, P pairs.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Strides(NamedTuple):
    """Elements from one to the next."""

    group: int
    sample: int
    channel: int
    row: int
    column: int


class Maps(NamedTuple):
    """Features or gradients (G, samples, C, H, W); in the set form both are the same."""

    query: Any
    key: Any
    query_strides: Strides
    key_strides: Strides


class Plan(NamedTuple):
    """Outputs of `plan_kernel`."""

    slots: Any  # (G, N, M) int32, the number of each pair or −1; None: all, row by row
    order: Any  # (G, V) int32, the node at each place; None: as they come


class Matches(NamedTuple):
    """Outputs of the forward, pixel by pixel, with the pairs (or the nodes) innermost."""

    max_sim: Any  # (H, W, P)
    argmax: Any  # (H, W, P)
    norm: Any  # (H, W, G·V): Inf of a pixel that is never loaded, NaN of one that no cosine has


class Extents(NamedTuple):
    """Extents of the call."""

    groups: int
    N: int
    M: int
    channels: int
    height: int
    width: int
    window_rows: int
    window_columns: int
    across: int  # windows of a row of windows
    windows: int
    pairs: int  # P, room that is left over included; 0 before `with_pairs`
    groups_per_tile: int  # where tiles hold whole groups


class Form(NamedTuple):
    """The kind of call; compiled in."""

    SET: bool  # queries are the keys
    MERGED: bool  # a tile holds whole groups
    SAME: bool  # queries and keys have the same stride between channels


class Cut(NamedTuple):
    """Extents of a tile, powers of two; compiled in."""

    LANES: int  # nodes
    PIXELS: int  # of a window, or, if it is streamed, of a part of it
    CHANNELS: int  # of a block
    EVEN: bool  # whether blocks hold all channels and no more


class Product(NamedTuple):
    """The arithmetic of `dot`; compiled in."""

    PRECISION: str
    UPCAST: bool


class Lanes(NamedTuple):
    """Nodes of a tile."""

    group: Any
    node: Any
    inside: Any  # whether there is one


class Rows(NamedTuple):
    """Rows of a tile: a pixel of a node each."""

    group: Any
    node: Any
    row: Any
    column: Any
    inside: Any  # whether there is one


@triton.jit
def with_pairs(sizes, pairs):
    """The number of pairs comes as an argument of its own: nothing is compiled for its sake, so
    that batches with more or fewer pairs run the same code."""
    return Extents(
        sizes.groups, sizes.N, sizes.M, sizes.channels, sizes.height, sizes.width,
        sizes.window_rows, sizes.window_columns, sizes.across, sizes.windows,
        pairs, sizes.groups_per_tile,
    )  # fmt: skip


@triton.jit
def count_nodes(sizes, FORM: tl.constexpr):
    return sizes.N if FORM.SET else sizes.N + sizes.M


@triton.jit
def count_tiles(sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """Tiles of a group, or of the groups that one tile holds."""
    return 1 if FORM.MERGED else tl.cdiv(count_nodes(sizes, FORM), CUT.LANES)


@triton.jit
def nodes_of(lane, tile, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """The node of each lane of a tile.

    MERGED: a tile holds whole groups, so that many small groups share a matrix product. Else a
    group takes several tiles, in an order that puts nodes with common partners side by side.
    """
    nodes = count_nodes(sizes, FORM)
    if FORM.MERGED:
        local = lane // nodes
        group = tile * sizes.groups_per_tile + local
        node = lane % nodes
        inside = (local < sizes.groups_per_tile) & (group < sizes.groups)
    else:
        tiles = tl.cdiv(nodes, CUT.LANES)
        group = tile // tiles + 0 * lane
        place = tile % tiles * CUT.LANES + lane
        inside = place < nodes
        if plan.order is None:
            node = place
        else:
            node = tl.load(plan.order + group * nodes + place, mask=inside, other=0)
    return Lanes(group, node, inside)


@triton.jit
def pixels_of(pixel, window, sizes):
    """Row and column in the map of a window's pixels, and whether they are in it.

    Pixels are counted in the nominal window, row by row, also where the edge cuts it: so their
    order, which decides ties, and their numbers are those of `argmax`.
    """
    row = window // sizes.across * sizes.window_rows + pixel // sizes.window_columns
    column = window % sizes.across * sizes.window_columns + pixel % sizes.window_columns
    inside = pixel < sizes.window_rows * sizes.window_columns
    return row, column, inside & (row < sizes.height) & (column < sizes.width)


@triton.jit
def rows_of(r, tile, window, plan, sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """The rows r of a tile."""
    row, column, in_window = pixels_of(r % CUT.PIXELS, window, sizes)
    lanes = nodes_of(r // CUT.PIXELS, tile, plan, sizes, FORM, CUT)
    return Rows(lanes.group, lanes.node, row, column, lanes.inside & in_window)


@triton.jit
def down(lanes):
    """Lanes (or rows of a tile) as a column."""
    return Lanes(lanes.group[:, None], lanes.node[:, None], lanes.inside[:, None])


@triton.jit
def across(lanes):
    """Lanes (or rows of a tile) as a row."""
    return Lanes(lanes.group[None, :], lanes.node[None, :], lanes.inside[None, :])


@triton.jit
def slots_of(query, key, plan, sizes, FORM: tl.constexpr):
    """The number of the pair (query, key); −1 where there is none."""
    sample = key.node if FORM.SET else key.node - sizes.N
    pair = query.inside & key.inside & (query.group == key.group)
    if not FORM.SET:
        pair = pair & (query.node < sizes.N) & (sample >= 0)
    slot = tl.where(pair, (query.group * sizes.N + query.node) * sizes.M + sample, -1)
    if plan.slots is not None:
        slot = tl.load(plan.slots + slot, mask=pair, other=-1)
    return slot


@triton.jit
def pair_nodes(slot, listed, sizes, FORM: tl.constexpr):
    """Group, query and key (as a node) of pairs by their numbers, and whether there is a pair."""
    exists = slot < sizes.pairs
    place = slot
    if listed is not None:
        # A place without a pair is unused room.
        place = tl.load(listed + slot, mask=exists, other=-1)
        exists = exists & (place >= 0) & (place < sizes.groups * sizes.N * sizes.M)
        place = tl.where(exists, place, 0).to(tl.int32)
    group = place // (sizes.N * sizes.M)
    query = place // sizes.M % sizes.N
    key = place % sizes.M + (0 if FORM.SET else sizes.N)
    return group, query, key, exists


@triton.jit
def slots_between(a, b, plan, sizes, FORM: tl.constexpr):
    """Numbers of the pairs between the lanes of two tiles, both (lanes of a, lanes of b):
    those with a lane of a as the query, and those with it as the key."""
    slot = slots_of(down(a), across(b), plan, sizes, FORM)
    back = slots_of(across(b), down(a), plan, sizes, FORM)
    return slot, back


@triton.jit
def row_pointers(maps, rows, sizes, FORM: tl.constexpr):
    """The address of the first channel of each pixel."""
    group, node = rows.group.to(tl.int64), rows.node.to(tl.int64)
    row, column = rows.row.to(tl.int64), rows.column.to(tl.int64)
    step = maps.query_strides
    pointer = maps.query + group * step.group + node * step.sample
    pointer += row * step.row + column * step.column
    if not FORM.SET:
        step = maps.key_strides
        other = maps.key + group * step.group + (node - sizes.N) * step.sample
        other += row * step.row + column * step.column
        pointer = tl.where(node < sizes.N, pointer, other)
    return pointer


@triton.jit
def channel_offsets(channel, node, maps, sizes, FORM: tl.constexpr):
    """Offsets of a block of channels: one row for all if query and key have the same stride."""
    channel = channel.to(tl.int64)[None, :]
    if FORM.SAME:
        offset = channel * maps.query_strides.channel
    else:
        query_step, key_step = maps.query_strides.channel, maps.key_strides.channel
        offset = channel * tl.where(node < sizes.N, query_step, key_step)[:, None]
    return offset


@triton.jit
def load_channels(
    pointers, start, node, loaded, maps, sizes, FORM: tl.constexpr, CUT: tl.constexpr
):
    """A block of channels of some rows; rows outside the mask are 0 and not loaded."""
    channel = start + tl.arange(0, CUT.CHANNELS)
    offset = channel_offsets(channel, node, maps, sizes, FORM)
    mask = loaded[:, None]
    if not CUT.EVEN:
        mask = mask & (channel < sizes.channels)[None, :]
    return tl.load(pointers[:, None] + offset, mask=mask, other=0.0)


@triton.jit
def node_pixels(rows, sizes, FORM: tl.constexpr):
    """The index of the norm of each row."""
    nodes = count_nodes(sizes, FORM)
    pixel = (rows.row * sizes.width + rows.column).to(tl.int64)
    return pixel * (sizes.groups * nodes) + rows.group * nodes + rows.node


@triton.jit
def valid_rows(valid, rows, sizes, FORM: tl.constexpr):
    """Which of some rows exist and are valid; a byte that is not 0 is a True."""
    node = (rows.group * count_nodes(sizes, FORM) + rows.node).to(tl.int64)
    place = (node * sizes.height + rows.row) * sizes.width + rows.column
    return rows.inside & (tl.load(valid + place, mask=rows.inside, other=0) != 0)


@triton.jit
def dot(a, b, total, PRODUCT: tl.constexpr):
    """total + a @ b in fp32. UPCAST for the interpreter, whose bf16 products are wrong."""
    if PRODUCT.UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRODUCT.PRECISION == "tf32x3":
        # By hand: Triton's own tf32x3 uses one operand in two layouts, and so reads both from
        # shared memory with bank conflicts. Here each part has one use.
        a_high, a_low = tf32_parts(a)
        b_high, b_low = tf32_parts(b)
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        total = tl.dot(a_high, b_high, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision=PRODUCT.PRECISION)
    return total


@triton.jit
def tf32_parts(x):
    """x cut off to the 10 bits of a tf32 mantissa, and the rest, of which a product takes 10 more.

    Cut off and not rounded: that is two instructions instead of three for each element of each
    operand, and what is lost, 2^-21 of x, is lost by all cosines and norms alike. The rest of an
    Inf is NaN, and so is that of a NaN, whichever bits it had.
    """
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high
