"""Forward: cosine similarities window by window, their row-max and arg-max, and the MAE to 1.

    match_kernel          windows of which a tile holds all pixels: a feature is loaded once, and
                          once more for every other tile with partners of its sample
    stream_match_kernel   larger windows: key pixels pass by in blocks under a running maximum
    norm_kernel           norms for the latter; the former takes them from the loads it makes anyway
    loss_kernel           sums the partial MAE of all windows in a fixed order, and fills the rows
                          of the outputs that no pair has

`max_sim` and `argmax` lie pixel by pixel with the pairs innermost: pairs of one query are
neighbours, and a program's stores fill whole sectors.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import (
    Rows,
    across,
    count_nodes,
    count_tiles,
    dot,
    down,
    load_channels,
    node_pixels,
    nodes_of,
    pair_nodes,
    pixels_of,
    row_pointers,
    rows_of,
    slots_between,
    slots_of,
    tf32_parts,
    valid_rows,
    with_pairs,
)

INF = tl.constexpr(float("inf"))
# Stands for NaN in comparisons, so that it wins; a cosine is never infinite itself.
NAN_KEY = tl.constexpr(float("inf"))
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _comparable(sim, inside):
    """NaN as the largest value and padding as the smallest: `tl.max` would drop a NaN."""
    return tl.where(inside, tl.where(sim == sim, sim, NAN_KEY), NOTHING)


@triton.jit
def _norm_of(square):
    """NaN where the square is no finite number: no cosine of such a row is a number."""
    return tl.where(square < INF, tl.sqrt(square), float("nan"))


@triton.jit
def _unit_scale(norm, eps):
    """1 / max(‖x‖, eps); NaN stays NaN."""
    return 1 / tl.where(norm <= eps, eps, norm)


@triton.jit
def _store_matches(best, where, found, pixel, slot, sizes, PARTIAL: tl.constexpr):
    """Writes maxima and their places, and returns |1 − m| where a pair is, else 0.

    PARTIAL: some pixels may take no part, as those have that met nothing.
    """
    if PARTIAL:
        where = tl.where(best == NOTHING, -1, where)
        best = tl.where(best == NOTHING, 1.0, best)
    best = tl.where(best == NAN_KEY, float("nan"), best)
    # No number is as large, but told so, the compiler takes fewer registers (sm_90, fp32, two
    # tiles: 168 instead of 190, and so a third block on a multiprocessor).
    present = (slot >= 0) & (slot < sizes.pairs)
    place = pixel.to(tl.int64) * sizes.pairs + slot
    tl.store(found.max_sim + place, best, mask=present)
    tl.store(found.argmax + place, where.to(found.argmax.dtype.element_ty), mask=present)
    return tl.where(present, tl.abs(1 - best), 0.0)


@triton.jit(do_not_specialize=["pairs"])
def match_kernel(
    maps, valid, plan, found, partial, sizes, eps, pairs,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """All pairs within a tile, or between two tiles of a group, in one window.

    The first (DIAGONAL) also stores the norms, and the second reads them: so it runs later.
    """
    sizes = with_pairs(sizes, pairs)
    if DIAGONAL:
        # Neighbouring programs take neighbouring windows: in NCHW they share sectors.
        window = tl.program_id(0) % sizes.windows
        tile_a = tl.program_id(0) // sizes.windows
        tile_b = tile_a
    else:
        window, tile_a, tile_b, exists = _two_tiles(sizes, FORM, CUT)
        if not exists:
            return
    r = tl.arange(0, CUT.LANES * CUT.PIXELS)
    lane = tl.arange(0, CUT.LANES)
    lanes_a = nodes_of(lane, tile_a, plan, sizes, FORM, CUT)
    lanes_b = nodes_of(lane, tile_b, plan, sizes, FORM, CUT)
    slot, back = slots_between(lanes_a, lanes_b, plan, sizes, FORM)
    if FORM.MERGED or not DIAGONAL:
        # No pair, no work: before any load of features. With several tiles the diagonal stays,
        # for its norms.
        if tl.max(tl.max(tl.maximum(slot, back), 1), 0) < 0:
            if FORM.MERGED and plan.slots is not None:
                rows = rows_of(r, tile_a, window, plan, sizes, FORM, CUT)
                tl.store(found.norm + node_pixels(rows, sizes, FORM), INF, mask=rows.inside)
            return

    rows_a = rows_of(r, tile_a, window, plan, sizes, FORM, CUT)
    rows_b = rows_of(r, tile_b, window, plan, sizes, FORM, CUT)
    sim = _cosines(
        r, rows_a, rows_b, maps, valid, found.norm, sizes, eps, FORM, CUT, PRODUCT, DIAGONAL
    )
    line = partial + window.to(tl.int64) * sizes.pairs
    # Rows of tile a as queries, samples of tile b as keys.
    split = tl.reshape(sim, (CUT.LANES * CUT.PIXELS, CUT.LANES, CUT.PIXELS))
    best, where = tl.max(split, 2, return_indices=True)
    number = slots_of(down(rows_a), across(lanes_b), plan, sizes, FORM)
    pixel = (rows_a.row * sizes.width + rows_a.column)[:, None]
    error = _store_matches(best, where, found, pixel, number, sizes, valid is not None)
    error = tl.sum(tl.reshape(error, (CUT.LANES, CUT.PIXELS, CUT.LANES)), 1)
    tl.store(line + slot, error, mask=slot >= 0)
    if not DIAGONAL:
        # The same products, read down the columns: rows of tile b as queries.
        split = tl.reshape(sim, (CUT.LANES, CUT.PIXELS, CUT.LANES * CUT.PIXELS))
        best, where = tl.max(split, 1, return_indices=True)
        number = slots_of(across(rows_b), down(lanes_a), plan, sizes, FORM)
        pixel = (rows_b.row * sizes.width + rows_b.column)[None, :]
        error = _store_matches(best, where, found, pixel, number, sizes, valid is not None)
        error = tl.sum(tl.reshape(error, (CUT.LANES, CUT.LANES, CUT.PIXELS)), 2)
        tl.store(line + back, error, mask=back >= 0)


@triton.jit
def _two_tiles(sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """Window and tiles of a program, and whether there is a second tile.

    Neighbouring programs take the tile pairs of one window: they share its features. Pairs first <
    second are counted along a folded triangle, without a root: row i holds those of tile i and,
    before them, those of its mirror image.
    """
    pid = tl.program_id(0)
    tiles = count_tiles(sizes, FORM, CUT)
    even = tiles - 1 + (tiles - 1) % 2
    tile_pairs = even // 2 * (even + 1)
    fold = pid % tile_pairs // (even + 1)
    step = pid % tile_pairs % (even + 1)
    first = tl.where(step > fold, fold, even - 1 - fold)
    second = tl.where(step > fold, step, even - step)
    window = pid // tile_pairs % sizes.windows
    tile = pid // tile_pairs // sizes.windows * tiles
    return window, tile + first, tile + second, second < tiles


@triton.jit
def _cosines(
    r, rows_a, rows_b, maps, valid, norm, sizes, eps,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Cosines of the rows of two tiles as `_comparable` numbers; DIAGONAL: stores their norms."""
    loaded_a, loaded_b = rows_a.inside, rows_b.inside
    if valid is not None:
        if DIAGONAL:
            loaded_a = valid_rows(valid, rows_a, sizes, FORM)
            loaded_b = loaded_a
        else:
            loaded_a = loaded_a & (_norms(norm, rows_a, sizes, FORM) != INF)
            loaded_b = loaded_b & (_norms(norm, rows_b, sizes, FORM) != INF)
    pointers_a = row_pointers(maps, rows_a, sizes, FORM)
    pointers_b = row_pointers(maps, rows_b, sizes, FORM)
    total = tl.zeros((CUT.LANES * CUT.PIXELS, CUT.LANES * CUT.PIXELS), tl.float32)
    mixed = total
    for start in range(0, sizes.channels, CUT.CHANNELS):
        x = load_channels(pointers_a, start, rows_a.node, loaded_a, maps, sizes, FORM, CUT)
        if DIAGONAL:
            total, mixed = _dot_itself(x, total, mixed, PRODUCT)
        else:
            y = load_channels(pointers_b, start, rows_b.node, loaded_b, maps, sizes, FORM, CUT)
            total = dot(x, tl.trans(y), total, PRODUCT)
    if DIAGONAL and PRODUCT.PRECISION == "tf32x3":
        total += mixed + tl.trans(mixed)
    if DIAGONAL:
        # The diagonal holds the squared norms: nothing but products has to read x.
        norm_a = _norm_of(tl.sum(tl.where(r[:, None] == r[None, :], total, 0.0), 1))
        norm_b = norm_a
        kept = norm_a if valid is None else tl.where(loaded_a, norm_a, INF)
        tl.store(norm + node_pixels(rows_a, sizes, FORM), kept, mask=rows_a.inside)
    else:
        norm_a = _norms(norm, rows_a, sizes, FORM)
        norm_b = _norms(norm, rows_b, sizes, FORM)
    sim = total * _unit_scale(norm_a, eps)[:, None] * _unit_scale(norm_b, eps)[None, :]
    return _comparable(sim, loaded_a[:, None] & loaded_b[None, :])


@triton.jit
def _dot_itself(x, total, mixed, PRODUCT: tl.constexpr):
    """total + x @ xᵀ; of tf32x3 the products of high with low parts apart, in `mixed`.

    Those of low with high parts are the same, transposed: two products do for three.
    """
    if PRODUCT.PRECISION == "tf32x3":
        high, low = tf32_parts(x)
        mixed = tl.dot(high, tl.trans(low), mixed, input_precision="tf32")
        total = tl.dot(high, tl.trans(high), total, input_precision="tf32")
    else:
        total = dot(x, tl.trans(x), total, PRODUCT)
    return total, mixed


@triton.jit
def _norms(norm, rows, sizes, FORM: tl.constexpr):
    return tl.load(norm + node_pixels(rows, sizes, FORM), mask=rows.inside, other=1.0)


@triton.jit
def norm_kernel(maps, valid, norm, sizes, FORM: tl.constexpr, CUT: tl.constexpr):
    """Norms of a run of pixels of one node."""
    PIXELS: tl.constexpr = CUT.PIXELS
    nodes = count_nodes(sizes, FORM)
    pixels = sizes.height * sizes.width
    blocks = tl.cdiv(pixels, CUT.PIXELS)
    index = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * CUT.PIXELS + tl.arange(0, CUT.PIXELS)
    group = index // nodes + 0 * pixel
    node = index % nodes + 0 * pixel
    rows = Rows(group, node, pixel // sizes.width, pixel % sizes.width, pixel < pixels)
    loaded = rows.inside if valid is None else valid_rows(valid, rows, sizes, FORM)
    pointers = row_pointers(maps, rows, sizes, FORM)
    square = tl.zeros((PIXELS,), tl.float32)
    for start in range(0, sizes.channels, CUT.CHANNELS):
        x = load_channels(pointers, start, node, loaded, maps, sizes, FORM, CUT).to(tl.float32)
        square += tl.sum(x * x, 1)
    value = _norm_of(square)
    if valid is not None:
        value = tl.where(loaded, value, INF)
    place = pixel.to(tl.int64) * (sizes.groups * nodes) + index
    tl.store(norm + place, value, mask=rows.inside)


@triton.jit(do_not_specialize=["pairs"])
def stream_match_kernel(
    maps, valid, listed, found, partial, sizes, eps, pairs,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """One pair, one window, a block of query pixels: all key pixels pass by in blocks."""
    PIXELS: tl.constexpr = CUT.PIXELS
    sizes = with_pairs(sizes, pairs)
    window_pixels = sizes.window_rows * sizes.window_columns
    blocks = tl.cdiv(window_pixels, CUT.PIXELS)
    block = tl.program_id(0) % blocks
    window = tl.program_id(0) // blocks % sizes.windows
    slot = tl.program_id(0) // blocks // sizes.windows
    group, query, key, exists = pair_nodes(slot, listed, sizes, FORM)
    if not exists:
        return

    p = tl.arange(0, CUT.PIXELS)
    row, column, inside = pixels_of(block * CUT.PIXELS + p, window, sizes)
    rows = Rows(group + 0 * p, query + 0 * p, row, column, inside)
    norm = _norms(found.norm, rows, sizes, FORM)
    loaded = inside if valid is None else inside & (norm != INF)
    scale = _unit_scale(norm, eps)
    best = tl.full((PIXELS,), NOTHING, tl.float32)
    where = tl.zeros((PIXELS,), tl.int32)
    for start in range(0, window_pixels, CUT.PIXELS):
        row, column, inside_c = pixels_of(start + p, window, sizes)
        columns = Rows(group + 0 * p, key + 0 * p, row, column, inside_c)
        norm = _norms(found.norm, columns, sizes, FORM)
        loaded_c = inside_c if valid is None else inside_c & (norm != INF)
        total = _streamed_products(rows, loaded, columns, loaded_c, maps, sizes, FORM, CUT, PRODUCT)
        sim = total * scale[:, None] * _unit_scale(norm, eps)[None, :]
        sim = _comparable(sim, loaded[:, None] & loaded_c[None, :])
        here, place = tl.max(sim, 1, return_indices=True)
        # Strictly greater: the first of equals stays, and so does the first NaN.
        better = here > best
        where = tl.where(better, start + place, where)
        best = tl.where(better, here, best)
    pixel = rows.row * sizes.width + rows.column
    number = tl.where(inside, slot, -1)
    error = _store_matches(best, where, found, pixel, number, sizes, valid is not None)
    line = (window * blocks + block).to(tl.int64)
    tl.store(partial + line * sizes.pairs + slot, tl.sum(error, 0))


@triton.jit
def _streamed_products(
    rows, loaded, columns, loaded_c, maps, sizes,
    FORM: tl.constexpr, CUT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Products of a block of query pixels with a block of key pixels."""
    PIXELS: tl.constexpr = CUT.PIXELS
    pointers = row_pointers(maps, rows, sizes, FORM)
    pointers_c = row_pointers(maps, columns, sizes, FORM)
    total = tl.zeros((PIXELS, PIXELS), tl.float32)
    for start in range(0, sizes.channels, CUT.CHANNELS):
        x = load_channels(pointers, start, rows.node, loaded, maps, sizes, FORM, CUT)
        y = load_channels(pointers_c, start, columns.node, loaded_c, maps, sizes, FORM, CUT)
        total = dot(x, tl.trans(y), total, PRODUCT)
    return total


@triton.jit(do_not_specialize=["pairs"])
def loss_kernel(
    partial, listed, loss, found, lines, sizes, pairs, PAIRS: tl.constexpr, LINES: tl.constexpr
):
    """Loss of each pair: the mean over pixels. For room that is left over it is 0, and its matches
    are those of pixels that take no part."""
    sizes = with_pairs(sizes, pairs)
    pixels = sizes.height * sizes.width
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < sizes.pairs
    present = inside
    if listed is not None:
        place = tl.load(listed + pair, mask=inside, other=0)
        present = inside & (place >= 0) & (place < sizes.groups * sizes.N * sizes.M)
        if tl.max((inside & ~present).to(tl.int32), 0) > 0:
            _fill_rest(pair, inside & ~present, found, pixels, sizes, LINES)
    # Neighbouring threads take neighbouring pairs only where the compiler does not see that they
    # are neighbours: else each takes some, one by one because of the mask, from more sectors.
    column = tl.where(present, pair, 0)
    # In fp64: an fp32 sum over a large map would lose digits.
    total = tl.zeros((LINES, PAIRS), tl.float64)
    for start in range(0, lines, LINES):
        line = start + tl.arange(0, LINES)
        total += tl.load(
            partial + line.to(tl.int64)[:, None] * sizes.pairs + column[None, :],
            mask=(line < lines)[:, None] & present[None, :], other=0.0,
        ).to(tl.float64)  # fmt: skip
    tl.store(loss + pair, (tl.sum(total, 0) / pixels).to(tl.float32), mask=inside)


@triton.jit
def _fill_rest(pair, empty, found, pixels, sizes, LINES: tl.constexpr):
    """Writes the matches of rows that no pair has."""
    column = tl.where(empty, pair, 0)
    for start in range(0, pixels, LINES):
        pixel = start + tl.arange(0, LINES)
        place = pixel.to(tl.int64)[:, None] * sizes.pairs + column[None, :]
        mask = (pixel < pixels)[:, None] & empty[None, :]
        tl.store(found.max_sim + place, 1.0, mask=mask)
        tl.store(found.argmax + place, -1, mask=mask)  # 255 as a byte
