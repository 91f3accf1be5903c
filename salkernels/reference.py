r"""The definition of the operator, in plain torch, and the fallback on every device.

    x̂ = x / max(‖x‖₂, eps)                       along channels
    sim[q,k,p,l] = x̂[q,p] · ŷ[k,l]               p, l pixels of one window
    max_sim[q,k,p] = max over l of sim[q,k,p,l]  over the valid l; ties: the lowest
    loss[q,k] = Σ_p |1 − max_sim[q,k,p]| / (H·W) paper, Eq. (1), window by window (Sec. 2.2)

A query pixel that is not valid, or has no valid key pixel in its window, takes no part: its
max_sim is 1, so that no penalty of 1 − max_sim counts it, and its argmax is `no_match`.

If the squared norm of a vector is not finite (NaN, Inf, or beyond the range of the accumulation
type), its unit vector is NaN, and NaN reaches every match that it is part of.

It works window by window, never pair by pair: the features of one window of all samples form a
small matrix whose Gram product holds every pair at once, so no feature map is gathered once per
pair. Work is cut so that a Gram block has at most `GRAM_BUDGET` elements, whatever the window.

Letters: G groups, N query and M key samples, V = N (set form) or N + M samples of a group, P pairs,
T windows of a tile, L pixels of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GRAM_BUDGET = 1 << 21  # elements of one Gram block: 8 MB in fp32 stays near the cache
BYTE_PIXELS = 255  # of the largest window whose offsets are bytes; 255 itself is `no_match`


class Outputs(NamedTuple):
    """The results of the forward: the loss of each pair, and its matches, kept for the backward."""

    loss: Tensor  # (P,)
    max_sim: Tensor  # (P, H, W)
    argmax: Tensor  # (P, H, W)
    norm: Tensor  # whatever a backend keeps of the norms; empty if it keeps none


class Tile(NamedTuple):
    """A rectangle of the map that splits into equal windows; edges are tiles of their own."""

    rows: slice
    columns: slice
    window: tuple[int, int]

    @property
    def pixels(self) -> int:
        return self.window[0] * self.window[1]


class Chunk(NamedTuple):
    """A block of query rows, and the key samples that it is compared with."""

    queries: slice
    pixels: slice
    keys: Tensor  # (K,) int64


def match(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W); None: the queries themselves (set form)
    pairs: Tensor | None,  # (P,) int64; None: every pair
    valid: Tensor | None,  # (G, V, H, W) bool, queries then keys; None: every pixel
    window: tuple[int, int],
    eps: float,
) -> Outputs:
    """Loss (P,), max_sim and argmax (P, H, W) of each pair.

    `pairs` holds the index of each pair in (G, N, M), row-major and ascending; −1 marks unused
    entries, whose matches take no part. `argmax` is the offset of the match in its
    window, row · (columns of the nominal window) + column.
    """
    samples, height, width = query.shape[1], *query.shape[3:]
    check_not_empty(query)
    slots, num_pairs = pair_slots(query, key, pairs)
    found = outputs(query, key, pairs, window)
    found.max_sim.fill_(1)
    found.argmax.fill_(no_match(found.argmax.dtype))

    for tile in tiles(query, key, window):
        unit_query, _ = unit_windows(query, tile, eps)  # (G, T, N, L, C)
        unit_key = unit_query if key is None else unit_windows(key, tile, eps)[0]
        query_valid, key_valid = valid_windows(valid, tile, samples, key)
        shape = (num_pairs, unit_query.shape[1], tile.pixels)
        tile_max = found.max_sim.new_ones(shape)
        tile_arg = found.argmax.new_full(shape, -1, dtype=torch.int64)
        for chunk in chunks(slots, samples, shape[1], tile.pixels):
            rows = unit_query[:, :, chunk.queries, chunk.pixels]
            sim = gram(rows, unit_key[:, :, chunk.keys])  # (G, T, n, p, K, L)
            if key_valid is not None:
                sim = sim.masked_fill(~key_valid[:, :, None, None, chunk.keys], -torch.inf)
            best, where = sim.max(dim=-1)  # torch takes the first of equals, and NaN as the largest
            if query_valid is not None:
                present = query_valid[:, :, chunk.queries, chunk.pixels, None] & (
                    best != -torch.inf
                )
                best, where = torch.where(present, best, 1), torch.where(present, where, -1)
            chosen = slots[:, chunk.queries][:, :, chunk.keys]  # (G, n, K)
            numbers = chosen[chosen >= 0]
            tile_max[numbers, :, chunk.pixels] = best.permute(0, 2, 4, 1, 3)[chosen >= 0]
            tile_arg[numbers, :, chunk.pixels] = where.permute(0, 2, 4, 1, 3)[chosen >= 0]
        columns = tile.window[1]
        offset = tile_arg.div(columns, rounding_mode="floor") * window[1] + tile_arg % columns
        offset = torch.where(tile_arg < 0, no_match(found.argmax.dtype), offset)
        found.max_sim[:num_pairs, tile.rows, tile.columns] = to_plane(tile_max, tile)
        found.argmax[:num_pairs, tile.rows, tile.columns] = to_plane(offset, tile).to(
            found.argmax.dtype
        )

    # torch sums pairwise; a plain fp32 sum over a large map would lose digits.
    torch.sum((1 - found.max_sim).abs_(), dim=(1, 2), out=found.loss).div_(height * width)
    return found


def match_backward(
    grad_sim: Tensor,  # (P, H, W), any strides
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    max_sim: Tensor,  # (P, H, W)
    argmax: Tensor,  # (P, H, W)
    norm: Tensor,
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    r"""Gradients of query and key (None in the set form, where one gradient holds both roles).

    With g = ∂L/∂max_sim, V of a row is the sum of g times the partner's unit vector over both its
    roles: as a query (its match) and as a key (the queries that chose it). Then
    ∂x = (V − (x̂·V) x̂) / ‖x‖, and 0 where ‖x‖ ≤ eps. A pixel without a match is in no sum, whatever
    its g; where max_sim is NaN, the term is NaN.
    """
    samples = query.shape[1]
    check_not_empty(query)
    slots, num_pairs = pair_slots(query, key, pairs)
    grad_query = torch.zeros_like(query)
    grad_key = None if key is None else torch.zeros_like(key)
    if num_pairs == 0:
        return grad_query, grad_key
    absent = argmax[:num_pairs] == no_match(argmax.dtype)
    pixel_grad = torch.where(max_sim.isnan(), max_sim, grad_sim.to(max_sim.dtype))[:num_pairs]
    pixel_grad = torch.where(absent, 0, pixel_grad)
    argmax = torch.where(absent, 0, argmax[:num_pairs])

    for tile in tiles(query, key, window):
        unit_query, inv_norm_query = unit_windows(query, tile, eps)
        if key is None:
            unit_key, inv_norm_key = unit_query, inv_norm_query
        else:
            unit_key, inv_norm_key = unit_windows(key, tile, eps)
        # A NaN row would spread through 0 · NaN to samples that it is not paired with. Its true
        # partners get their NaN from the weights, which hold NaN wherever max_sim does.
        finite_query = unit_query.nan_to_num(0, 0, 0)
        finite_key = finite_query if key is None else unit_key.nan_to_num(0, 0, 0)
        sum_query = torch.zeros_like(unit_query)  # V, (G, T, N, L, C)
        sum_key = sum_query if key is None else torch.zeros_like(unit_key)
        weight = to_windows(pixel_grad[:, tile.rows, tile.columns], tile)  # (P, T, L)
        offset = to_windows(argmax[:, tile.rows, tile.columns].long(), tile)
        index = offset.div(window[1], rounding_mode="floor") * tile.window[1] + offset % window[1]
        for chunk in chunks(slots, samples, unit_query.shape[1], tile.pixels):
            selection = _selection(weight, index, slots, chunk, tile.pixels)
            rows = finite_query[:, :, chunk.queries, chunk.pixels]
            sum_query[:, :, chunk.queries, chunk.pixels] += torch.einsum(
                "gtnpkl,gtklc->gtnpc", selection, finite_key[:, :, chunk.keys]
            )
            sum_key[:, :, chunk.keys] += torch.einsum("gtnpkl,gtnpc->gtklc", selection, rows)
        write_windows(grad_query, through_norm(sum_query, unit_query, inv_norm_query), tile)
        if grad_key is not None:
            write_windows(grad_key, through_norm(sum_key, unit_key, inv_norm_key), tile)
    return grad_query, grad_key


def match_places(offset: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns in the map of matches (..., H, W) that are given as offsets in windows."""
    row = torch.arange(offset.shape[-2], device=offset.device)[:, None]
    column = torch.arange(offset.shape[-1], device=offset.device)
    rows = row - row % window[0] + offset.div(window[1], rounding_mode="floor")
    return rows, column - column % window[1] + offset % window[1]


def match_tangent(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    argmax: Tensor,  # (P, H, W)
    window: tuple[int, int],
    eps: float,
    tangent_query: Tensor | None,  # (G, N, C, H, W)
    tangent_key: Tensor | None,  # (G, M, C, H, W)
) -> Tensor:
    """How max_sim (P, H, W) changes where the features move along tangents; the matches stay.

    The transpose of `match_backward`. It goes pair by pair, since this derivative is rarely needed.
    """
    keys = query if key is None else key
    places = torch.arange(count_pairs(query, key, pairs)) if pairs is None else pairs.cpu()
    along = query.new_zeros(argmax.shape, dtype=accumulate_dtype(query.dtype))
    present = argmax != no_match(argmax.dtype)
    offset = torch.where(present, argmax, 0).long()
    rows, columns = match_places(offset, window)
    for p, place in enumerate(places.tolist()):
        if place < 0:
            continue
        group, rest = divmod(place, query.shape[1] * keys.shape[1])
        q, k = divmod(rest, keys.shape[1])
        x, dx = _unit_and_tangent(query, tangent_query, (group, q), eps)
        tangent = tangent_query if key is None else tangent_key
        y, dy = _unit_and_tangent(keys, tangent, (group, k), eps)
        at = (slice(None), rows[p], columns[p])
        change = (dx * y[at] + x * dy[at]).sum(dim=0)
        along[p] = torch.where(present[p], change, 0)
    return along


def _unit_and_tangent(
    maps: Tensor, tangent: Tensor | None, sample: tuple[int, int], eps: float
) -> tuple[Tensor, Tensor]:
    """Unit vectors (C, H, W) of one sample, and how they change along a tangent."""
    x = maps[sample].to(accumulate_dtype(maps.dtype))
    norm = x.square().sum(dim=0).sqrt()
    norm = torch.where(norm.isinf(), torch.nan, norm)
    unit = x / norm.clamp_min(eps)
    if tangent is None:
        return unit, torch.zeros_like(unit)
    move = tangent[sample].to(x.dtype)
    turn = move - (unit * move).sum(dim=0) * unit
    return unit, turn * torch.where(norm <= eps, 0, 1 / norm)


def outputs(
    query: Tensor, key: Tensor | None, pairs: Tensor | None, window: tuple[int, int]
) -> Outputs:
    """The outputs of the forward, uninitialised: plain contiguous tensors, no norms."""
    dtype = accumulate_dtype(query.dtype)
    plane = (count_pairs(query, key, pairs), *query.shape[3:])
    return Outputs(
        query.new_empty(plane[:1], dtype=dtype),
        query.new_empty(plane, dtype=dtype),
        query.new_empty(plane, dtype=index_dtype(window)),
        query.new_empty((0,), dtype=dtype),
    )


def count_pairs(query: Tensor, key: Tensor | None, pairs: Tensor | None) -> int:
    """P, room that is left over included."""
    if pairs is not None:
        return pairs.shape[0]
    return query.shape[0] * query.shape[1] * (query if key is None else key).shape[1]


def check_not_empty(query: Tensor) -> None:
    """Requires at least one channel and one pixel: a mean over none is undefined."""
    if 0 in query.shape[2:]:
        raise ValueError(
            f"features need at least one channel and one pixel, "
            f"got (G, N, C, H, W) = {tuple(query.shape)}"
        )


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def index_dtype(window: tuple[int, int]) -> torch.dtype:
    """Smallest dtype that holds an offset in the window, and `no_match`."""
    return torch.uint8 if window[0] * window[1] <= BYTE_PIXELS else torch.int32


def no_match(dtype: torch.dtype) -> int:
    """The argmax of a pixel that takes no part: −1, which is 255 as a byte."""
    return 255 if dtype == torch.uint8 else -1


def pair_slots(query: Tensor, key: Tensor | None, pairs: Tensor | None) -> tuple[Tensor, int]:
    """(G, N, M) int64: the number of each pair, −1 where there is none; and how many there are."""
    shape = (query.shape[0], query.shape[1], (query if key is None else key).shape[1])
    count = shape[0] * shape[1] * shape[2]
    numbers = torch.arange(count if pairs is None else pairs.shape[0], device=query.device)
    if pairs is None:
        return numbers.view(shape), count
    present = pairs >= 0
    slots = numbers.new_full((count,), -1)
    slots[pairs[present]] = numbers[present]
    return slots.view(shape), int(present.sum())


def tiles(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> Iterator[Tile]:
    """Cuts the plane into tiles of equal windows whose Gram block keeps to the budget."""
    groups, samples, _, height, width = query.shape
    keys = samples if key is None else key.shape[1]
    if groups * samples * keys == 0:
        return
    for row, rows, window_rows in _strips(height, window[0]):
        for column, columns, window_columns in _strips(width, window[1]):
            gram = groups * samples * keys * (window_rows * window_columns) ** 2
            most = max(1, GRAM_BUDGET // gram)  # windows in a tile
            across = min(columns // window_columns, most)
            down = max(1, most // across)
            for top in range(row, row + rows, down * window_rows):
                bottom = min(top + down * window_rows, row + rows)
                for left in range(column, column + columns, across * window_columns):
                    right = min(left + across * window_columns, column + columns)
                    yield Tile(
                        slice(top, bottom), slice(left, right), (window_rows, window_columns)
                    )


def chunks(slots: Tensor, samples: int, count: int, pixels: int) -> Iterator[Chunk]:
    """Cuts the query rows of a tile; a chunk of one sample meets only the keys paired with it."""
    groups, _, keys = slots.shape
    per_row = groups * count * keys * pixels  # Gram elements per query pixel
    everyone = torch.arange(keys, device=slots.device)
    step = max(1, GRAM_BUDGET // (per_row * pixels))
    for first in range(0, samples, step):
        queries = slice(first, min(first + step, samples))
        partners = everyone
        if step == 1:
            partners = (slots[:, first] >= 0).any(dim=0).nonzero().squeeze(1)
            if len(partners) == 0:
                continue
        most = pixels if step > 1 else GRAM_BUDGET // (groups * count * len(partners) * pixels)
        most = max(1, most)
        for start in range(0, pixels, most):
            yield Chunk(queries, slice(start, min(start + most, pixels)), partners)


def unit_windows(x: Tensor, tile: Tile, eps: float) -> tuple[Tensor, Tensor]:
    """Unit vectors (G, T, S, L, C) of a tile, and 1 / norm (G, T, S, L, 1), 0 where norm ≤ eps."""
    groups, samples, channels, _, _ = x.shape
    part = x[..., tile.rows, tile.columns].to(accumulate_dtype(x.dtype))
    windows = to_windows(part, tile)  # (G, S, C, T, L)
    windows = windows.permute(0, 3, 1, 4, 2).contiguous()
    norm = windows.square().sum(dim=-1, keepdim=True).sqrt()
    # Beyond the range of the squares, x / ‖x‖ would silently be 0.
    norm = torch.where(norm.isinf(), torch.nan, norm)
    unit = windows / norm.clamp_min(eps)
    # "not above" is written as "at most": a NaN norm must give NaN, not 0.
    return unit, torch.where(norm <= eps, 0, 1 / norm)


def _strips(extent: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, window) of the part that whole windows tile, and of a smaller edge window."""
    whole = extent // window * window
    yield 0, whole, window
    if whole < extent:
        yield whole, extent - whole, extent - whole


def to_windows(plane: Tensor, tile: Tile) -> Tensor:
    """(..., rows, columns) -> (..., T, L)."""
    rows, columns = tile.window
    split = plane.unflatten(-1, (-1, columns)).unflatten(
        -3, (-1, rows)
    )  # (..., down, r, across, c)
    return split.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def to_plane(windows: Tensor, tile: Tile) -> Tensor:
    """(..., T, L) -> (..., rows, columns)."""
    rows, columns = tile.window
    across = (tile.columns.stop - tile.columns.start) // columns
    split = windows.unflatten(-1, (rows, columns)).unflatten(-3, (-1, across))
    return split.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def valid_windows(
    valid: Tensor | None, tile: Tile, samples: int, key: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Valid pixels (G, T, S, L) of a tile, of the queries and of the keys."""
    if valid is None:
        return None, None
    windows = to_windows(valid[..., tile.rows, tile.columns], tile).transpose(1, 2)
    return windows[:, :, :samples], windows if key is None else windows[:, :, samples:]


def write_windows(out: Tensor, windows: Tensor, tile: Tile) -> None:
    """Writes (G, T, S, L, C) to the tile's place in (G, S, C, H, W)."""
    plane = to_plane(windows.permute(0, 2, 4, 1, 3), tile)
    out[..., tile.rows, tile.columns] = plane.to(out.dtype)


def gram(rows: Tensor, keys: Tensor) -> Tensor:
    """(G, T, n, p, C) x (G, T, K, L, C) -> (G, T, n, p, K, L)."""
    product = torch.matmul(rows.flatten(2, 3), keys.flatten(2, 3).transpose(-1, -2))
    return product.unflatten(3, keys.shape[2:4]).unflatten(2, rows.shape[2:4])


def _selection(weight: Tensor, match: Tensor, slots: Tensor, chunk: Chunk, pixels: int) -> Tensor:
    """(G, T, n, p, K, L): the pixel gradient at each query row's match, 0 elsewhere."""
    chosen = slots[:, chunk.queries][:, :, chunk.keys]  # (G, n, K)
    pairs = chosen.clamp_min(0)
    order = (0, 3, 1, 4, 2)  # (G, n, K, T, p) -> (G, T, n, p, K)
    value = torch.where((chosen >= 0)[..., None, None], weight[:, :, chunk.pixels][pairs], 0)
    index = match[:, :, chunk.pixels][pairs]
    selection = value.new_zeros((*value.permute(order).shape, pixels))
    return selection.scatter_(-1, index.permute(order)[..., None], value.permute(order)[..., None])


def through_norm(total: Tensor, unit: Tensor, inv_norm: Tensor) -> Tensor:
    """Gradient of x from that of x / ‖x‖: the part along x̂ drops out.

    A pixel that no pair uses has V = 0 and gets no gradient, even if its features are NaN.
    """
    grad = (total - (unit * total).sum(dim=-1, keepdim=True) * unit) * inv_norm
    return torch.where((total == 0).all(dim=-1, keepdim=True), 0, grad)
