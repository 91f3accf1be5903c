"""Lists made before the kernels run: indices of pairs, an order of nodes, and their partners."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import Lanes, Plan, count_nodes, slots_of, with_pairs


@triton.jit(do_not_specialize=["pairs"])
def plan_kernel(
    listed, plan, sizes, pairs,
    FORM: tl.constexpr, NODES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The slots of the pairs of one group, and the order of its nodes, if there is room for one.

    Each program walks the whole list and takes what is its group's. Any order is correct.
    """
    group = tl.program_id(0)
    places = sizes.N * sizes.M
    slots = plan.slots + group.to(tl.int64) * places
    step = tl.arange(0, BLOCK)
    for start in range(0, places, BLOCK):
        tl.store(slots + start + step, -1, mask=start + step < places)
    tl.debug_barrier()
    for start in range(0, pairs, BLOCK):
        number = start + step
        place = tl.load(listed + number, mask=number < pairs, other=-1) - group * places
        # A place without a pair is unused room.
        tl.store(slots + place, number, mask=(place >= 0) & (place < places))
    if plan.order is not None:
        tl.debug_barrier()  # slots that other threads of the program have written
        _order_nodes(group, plan, sizes, FORM, NODES)


@triton.jit
def _order_nodes(group, plan, sizes, FORM: tl.constexpr, NODES: tl.constexpr):
    """Sorts nodes by the lowest node within three steps along pairs.

    Slices of one scan come together, wherever its views stand in the batch.
    """
    N, M = sizes.N, sizes.M
    nodes = count_nodes(sizes, FORM)
    table = plan.slots + group * N * M
    v = tl.arange(0, NODES)
    i, j = v[:, None], v[None, :]
    exists = (i < nodes) & (j < nodes)
    if FORM.SET:
        forth = tl.load(table + i * M + j, mask=exists, other=-1)
        back = tl.load(table + j * M + i, mask=exists, other=-1)
    else:
        forth = tl.load(table + i * M + j - N, mask=exists & (i < N) & (j >= N), other=-1)
        back = tl.load(table + j * M + i - N, mask=exists & (j < N) & (i >= N), other=-1)
    linked = exists & ((forth >= 0) | (back >= 0) | (i == j))
    # Three steps. The relation is symmetric: minima down the columns are those of the rows.
    by_row = tl.min(tl.where(linked, j, NODES), 1)[:, None]
    by_column = tl.min(tl.where(linked, by_row, NODES), 0)[None, :]
    label_i = tl.min(tl.where(linked, by_column, NODES), 1)[:, None]
    by_column = tl.min(tl.where(linked, i, NODES), 0)[None, :]
    by_row = tl.min(tl.where(linked, by_column, NODES), 1)[:, None]
    label_j = tl.min(tl.where(linked, by_row, NODES), 0)[None, :]
    earlier = exists & ((label_j < label_i) | ((label_j == label_i) & (j < i)))
    rank = tl.sum(earlier.to(tl.int32), 1)
    tl.store(plan.order + group * nodes + rank, v, mask=v < nodes)


class Partners(NamedTuple):
    """The pairs of each node, in the order of its partners: number and partner in one word."""

    degrees: Any  # (G, V, 2) int32: pairs that it is the query, the key of
    as_query: Any  # (G, V, D) int64: number << 32 | partner
    as_key: Any  # likewise


@triton.jit(do_not_specialize=["pairs"])
def partners_kernel(slots, partners, room, sizes, pairs, FORM: tl.constexpr, NODES: tl.constexpr):
    """The pairs of one node."""
    sizes = with_pairs(sizes, pairs)
    nodes = count_nodes(sizes, FORM)
    plan = Plan(slots, None)
    index = tl.program_id(0)
    group, node = index // nodes, index % nodes
    line = index.to(tl.int64) * room
    forth, back = 0, 0
    for start in range(0, nodes, NODES):
        other = start + tl.arange(0, NODES)
        itself = Lanes(group, node + 0 * other, other < nodes)
        others = Lanes(group, other, other < nodes)
        forth = _append(
            partners.as_query + line, forth, slots_of(itself, others, plan, sizes, FORM), other
        )
        back = _append(
            partners.as_key + line, back, slots_of(others, itself, plan, sizes, FORM), other
        )
    tl.store(partners.degrees + 2 * index, forth)
    tl.store(partners.degrees + 2 * index + 1, back)


@triton.jit
def _append(list_, count, slot, other):
    """Appends the existing pairs; returns the new length of the list."""
    exists = (slot >= 0).to(tl.int32)
    place = count + tl.cumsum(exists, 0) - exists
    word = (slot.to(tl.int64) << 32) + other
    tl.store(list_ + place, word, mask=slot >= 0)
    return count + tl.sum(exists, 0)
