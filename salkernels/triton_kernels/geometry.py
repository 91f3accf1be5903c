"""Which samples, pixels and pairs a program works on: functions shared by all kernels.

The kernels see one list of *nodes* per group: its samples in the set form, else its N queries
followed by its M keys. Pairs join nodes; a tile takes a few nodes and the pixels of one window of
each, `LANES` nodes x `PIXELS` pixels = rows. Extents that are no power of two are padded, and
padding is masked, never loaded.

Letters: G groups, N query and M key samples, V nodes of a group (N, or N + M), C channels.
"""

# Arguments of kernels stand in groups (pointers, strides, extents), not one to a line.
# fmt: off
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nodes_of(
    lane, tile, order, groups, nodes, GROUPS_PER_TILE, LANES: tl.constexpr, MERGED: tl.constexpr,
):
    """Group and node of each lane of a tile, and whether there is one.

    MERGED: a tile holds whole groups, so that many small groups share a matrix product. Else a
    group takes several tiles, in an order that puts nodes with common partners side by side.
    """
    if MERGED:
        local = lane // nodes
        group = tile * GROUPS_PER_TILE + local
        node = lane % nodes
        inside = (local < GROUPS_PER_TILE) & (group < groups)
    else:
        tiles = tl.cdiv(nodes, LANES)
        group = tile // tiles + 0 * lane
        place = tile % tiles * LANES + lane
        inside = place < nodes
        node = tl.load(order + group * nodes + place, mask=inside, other=0)
    return group, node, inside


@triton.jit
def pixels_of(pixel, window, across, window_rows, window_columns, height, width):
    """Row and column in the map of a window's pixels, and whether they are in it.

    Pixels are counted in the nominal window, row by row, also where the edge cuts it: so their
    order, which decides ties, and their numbers are those of `argmax`.
    """
    row = window // across * window_rows + pixel // window_columns
    column = window % across * window_columns + pixel % window_columns
    inside = (pixel < window_rows * window_columns) & (row < height) & (column < width)
    return row, column, inside


@triton.jit
def slots_of(
    slots, query_group, query_node, query_inside, key_group, key_node, key_inside, N, M,
    SET: tl.constexpr, HAS_MASK: tl.constexpr,
):
    """Number of the pair (query, key) and its place in (G, N, M); both −1 where there is none."""
    key = key_node if SET else key_node - N
    pair = query_inside & key_inside & (query_group == key_group)
    if not SET:
        pair = pair & (query_node < N) & (key >= 0)
    place = tl.where(pair, (query_group * N + query_node) * M + key, -1)
    slot = place
    if HAS_MASK:
        slot = tl.load(slots + place, mask=pair, other=-1)
    return slot, place


@triton.jit
def slots_between(
    slots, group_a, node_a, inside_a, group_b, node_b, inside_b, N, M,
    SET: tl.constexpr, HAS_MASK: tl.constexpr,
):
    """Numbers of the pairs between the lanes of two tiles, both (lanes of a, lanes of b):
    those with a lane of a as the query, and those with it as the key."""
    slot, _ = slots_of(
        slots, group_a[:, None], node_a[:, None], inside_a[:, None],
        group_b[None, :], node_b[None, :], inside_b[None, :], N, M, SET, HAS_MASK,
    )
    back, _ = slots_of(
        slots, group_b[None, :], node_b[None, :], inside_b[None, :],
        group_a[:, None], node_a[:, None], inside_a[:, None], N, M, SET, HAS_MASK,
    )
    return slot, back


@triton.jit
def row_pointers(
    query, key, group, node, row, column, N,
    query_group, query_sample, query_row, query_column,
    key_group, key_sample, key_row, key_column,
    SET: tl.constexpr,
):
    """Where the channels of each pixel start."""
    group, node = group.to(tl.int64), node.to(tl.int64)
    row, column = row.to(tl.int64), column.to(tl.int64)
    pointer = query + group * query_group + node * query_sample
    pointer += row * query_row + column * query_column
    if not SET:
        other = key + group * key_group + (node - N) * key_sample
        other += row * key_row + column * key_column
        pointer = tl.where(node < N, pointer, other)
    return pointer


@triton.jit
def channel_offsets(channel, node, N, query_channel, key_channel, SAME: tl.constexpr):
    """Offsets of a block of channels: one row for all if query and key have the same stride."""
    channel = channel.to(tl.int64)[None, :]
    if SAME:
        offset = channel * query_channel
    else:
        offset = channel * tl.where(node < N, query_channel, key_channel)[:, None]
    return offset


@triton.jit
def unit_scale(norm, eps):
    """1 / max(‖x‖, eps); finite for NaN, which similarities and weights carry by themselves."""
    return 1 / tl.where(norm > eps, norm, eps)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """total + a @ b in fp32. UPCAST for the interpreter, whose bf16 products are wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32x3":
        # By hand: Triton's own tf32x3 uses one operand in two layouts, and so reads both from
        # shared memory with bank conflicts. Here each part has one use.
        a_high, a_low = tf32_parts(a)
        b_high, b_low = tf32_parts(b)
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        total = tl.dot(a_high, b_high, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def tf32_parts(x):
    """x rounded to the 10 bits of a tf32 mantissa, and the rest; NaN and Inf leave NaN there."""
    high = (x.to(tl.int32, bitcast=True) + 4096 & -8192).to(tl.float32, bitcast=True)
    return high, x - high
