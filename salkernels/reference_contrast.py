r"""The log-sum-exp over windows of negatives, in plain torch: the definition and the fallback.

    lse[q,p] = log Σ over k in negatives(q) Σ over l of e^{sim[q,k,p,l] / τ}     the valid l

with sim, windows and letters of `salkernels.reference`. One number for each query pixel, whatever
the number of its negatives. A query pixel that is not valid, or that no valid key pixel of a
negative shares a window with, has −∞: the sum of nothing.

NaN reaches the query pixels that it is a term of, and in the backward all terms of those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import (
    accumulate_dtype,
    check_not_empty,
    chunks,
    gram,
    pair_slots,
    through_norm,
    tiles,
    to_plane,
    to_windows,
    unit_windows,
    valid_windows,
    write_windows,
)


def window_lse(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W); None: the queries themselves (set form)
    pairs: Tensor | None,  # (P,) int64, as in `reference.match`; None: every pair
    valid: Tensor | None,  # (G, V, H, W) bool, queries then keys; None: every pixel
    window: tuple[int, int],
    temperature: float,
    eps: float,
) -> Tensor:
    """The log-sum-exp (G, N, H, W) of each query pixel."""
    samples = query.shape[1]
    check_not_empty(query)
    slots, _ = pair_slots(query, key, pairs)
    negative = slots >= 0
    lse = output(query).fill_(-torch.inf)
    for tile in tiles(query, key, window):
        unit_query, _ = unit_windows(query, tile, eps)  # (G, T, N, L, C)
        unit_key = unit_query if key is None else unit_windows(key, tile, eps)[0]
        query_valid, key_valid = valid_windows(valid, tile, samples, key)
        tile_lse = lse.new_full(unit_query.shape[:-1], -torch.inf)
        for chunk in chunks(slots, samples, unit_query.shape[1], tile.pixels):
            rows = unit_query[:, :, chunk.queries, chunk.pixels]
            sim = gram(rows, unit_key[:, :, chunk.keys]).div_(temperature)  # (G, T, n, p, K, L)
            absent = ~negative[:, chunk.queries][:, :, chunk.keys]  # (G, n, K)
            sim.masked_fill_(absent[:, None, :, None, :, None], -torch.inf)
            if key_valid is not None:
                sim.masked_fill_(~key_valid[:, :, None, None, chunk.keys], -torch.inf)
            tile_lse[:, :, chunk.queries, chunk.pixels] = sim.flatten(-2).logsumexp(dim=-1)
        if query_valid is not None:
            tile_lse.masked_fill_(~query_valid, -torch.inf)
        lse[..., tile.rows, tile.columns] = to_plane(tile_lse.transpose(1, 2), tile)
    return lse


def window_lse_backward(
    grad_lse: Tensor,  # (G, N, H, W), any strides
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    lse: Tensor,  # (G, N, H, W)
    window: tuple[int, int],
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    r"""Gradients of query and key (None in the set form, where one gradient holds both roles).

    The similarities are computed anew, so that nothing of the size of a Gram product is kept. With
    the weights W = ∂L/∂lse · e^{sim / τ − lse} / τ of the terms, V of a row is the sum of W times
    the partner's unit vector over both its roles, and ∂x = (V − (x̂·V) x̂) / ‖x‖ as for `match`. A
    pixel whose gradient is 0 is no term of any sum.
    """
    samples = query.shape[1]
    check_not_empty(query)
    slots, _ = pair_slots(query, key, pairs)
    negative = slots >= 0
    grad_query = torch.zeros_like(query)
    grad_key = None if key is None else torch.zeros_like(key)
    # e^{sim − ∞} is 0: where there are no terms, and where none has a gradient.
    scale = grad_lse.to(lse.dtype) / temperature
    shift = lse.masked_fill((lse == -torch.inf) | (scale == 0), torch.inf)
    scale = scale.masked_fill(shift == torch.inf, 0)  # where there is no term: it may be NaN

    for tile in tiles(query, key, window):
        unit_query, inv_norm_query = unit_windows(query, tile, eps)
        unit_key, inv_norm_key = unit_query, inv_norm_query
        if key is not None:
            unit_key, inv_norm_key = unit_windows(key, tile, eps)
        _, key_valid = valid_windows(valid, tile, samples, key)
        # A NaN row has NaN in `shift`, and there alone it counts: 0 · NaN would spread further.
        finite_query = unit_query.nan_to_num(0, 0, 0)
        finite_key = finite_query if key is None else unit_key.nan_to_num(0, 0, 0)
        sum_query = torch.zeros_like(unit_query)  # V, (G, T, N, L, C)
        sum_key = sum_query if key is None else torch.zeros_like(unit_key)
        part = (slice(None), slice(None), tile.rows, tile.columns)
        tile_scale, tile_shift = (to_windows(x[part], tile).transpose(1, 2) for x in (scale, shift))
        for chunk in chunks(slots, samples, unit_query.shape[1], tile.pixels):
            place = (slice(None), slice(None), chunk.queries, chunk.pixels)
            rows, keys = finite_query[place], finite_key[:, :, chunk.keys]
            terms = gram(rows, keys).div_(temperature)  # (G, T, n, p, K, L)
            terms.sub_(tile_shift[place][..., None, None]).exp_()
            terms.mul_(tile_scale[place][..., None, None])
            absent = ~negative[:, chunk.queries][:, :, chunk.keys]
            terms.masked_fill_(absent[:, None, :, None, :, None], 0)
            if key_valid is not None:
                terms.masked_fill_(~key_valid[:, :, None, None, chunk.keys], 0)
            matrix = terms.flatten(2, 3).flatten(-2)  # (G, T, n·p, K·L)
            sum_query[place] += (matrix @ keys.flatten(2, 3)).view_as(rows)
            sum_key[:, :, chunk.keys] += (matrix.mT @ rows.flatten(2, 3)).view_as(keys)
        write_windows(grad_query, through_norm(sum_query, unit_query, inv_norm_query), tile)
        if grad_key is not None:
            write_windows(grad_key, through_norm(sum_key, unit_key, inv_norm_key), tile)
    return grad_query, grad_key


def output(query: Tensor) -> Tensor:
    """The output of the forward, uninitialised: (G, N, H, W)."""
    shape = (*query.shape[:2], *query.shape[3:])
    return query.new_empty(shape, dtype=accumulate_dtype(query.dtype))
