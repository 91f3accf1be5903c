"""Before the forward and the backward: numbers of pairs, and an order of nodes, in one launch."""

# Arguments of kernels stand in groups (pointers, strides, extents), not one to a line.
# fmt: off
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_kernel(
    mask, slots, order, groups, N, M,
    SET: tl.constexpr, ORDER: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, NODES: tl.constexpr,
):
    """slots (G, N, M): row-major numbers of the pairs, −1 where masked out; order (G, V).

    One program for all groups, so that numbers go on from one to the next. The order sorts nodes by
    the lowest node within three steps along pairs: slices of one scan come together, wherever its
    views stand in the batch. Any order is correct.
    """
    nodes = N if SET else N + M
    q = tl.arange(0, QUERIES)
    k = tl.arange(0, KEYS)
    inside = (q < N)[:, None] & (k < M)[None, :]
    first = 0
    for group in range(groups):
        table = mask + group * N * M
        pair = tl.load(table + q[:, None] * M + k[None, :], mask=inside, other=0).to(tl.int32)
        count = tl.sum(pair, 1)
        number = first + (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(pair, 1) - pair
        tl.store(
            slots + group * N * M + q[:, None] * M + k[None, :],
            tl.where(pair != 0, number, -1), mask=inside,
        )
        first += tl.sum(count, 0)
        if ORDER:
            v = tl.arange(0, NODES)
            i, j = v[:, None], v[None, :]
            exists = (i < nodes) & (j < nodes)
            if SET:
                forward = tl.load(table + i * M + j, mask=exists, other=0)
                back = tl.load(table + j * M + i, mask=exists, other=0)
            else:
                forward = tl.load(
                    table + i * M + j - N, mask=exists & (i < N) & (j >= N), other=0
                )
                back = tl.load(table + j * M + i - N, mask=exists & (j < N) & (i >= N), other=0)
            linked = exists & ((forward != 0) | (back != 0) | (i == j))
            # Three steps. The relation is symmetric: minima down the columns are those of the rows.
            by_row = tl.min(tl.where(linked, j, NODES), 1)[:, None]
            by_column = tl.min(tl.where(linked, by_row, NODES), 0)[None, :]
            label_i = tl.min(tl.where(linked, by_column, NODES), 1)[:, None]
            by_column = tl.min(tl.where(linked, i, NODES), 0)[None, :]
            by_row = tl.min(tl.where(linked, by_column, NODES), 1)[:, None]
            label_j = tl.min(tl.where(linked, by_row, NODES), 0)[None, :]
            earlier = exists & ((label_j < label_i) | ((label_j == label_i) & (j < i)))
            rank = tl.sum(earlier.to(tl.int32), 1)
            tl.store(order + group * nodes + rank, v, mask=v < nodes)
