"""From tensors to launches: how a call is cut into tiles, and the arguments of each kernel."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradient, match
from . import sum as sum_
from . import terms as terms_
from .config import Tile, tile_for
from .geometry import Cut, Extents, Form, Maps, Matches, Plan, Product, Strides
from .gradient import Terms
from .plan import Partners, partners_kernel, plan_kernel
from .terms import Lists, Reach

MOST_TILES = 2  # of a group, whose weights fit into the registers
LIST_ROWS = 128  # of a program that makes lists: one for each of its threads
CACHE_BYTES = 160 << 10  # of a first-level cache, that a window's rows may take
PROGRAMS = 1056  # that keep a GPU busy: 8 for each multiprocessor of an H100
LEAST_ROWS = 32  # of a matrix product, whose inner extent comes in halves
MOST_LANES = 32  # nodes of a tile: a tile has lanes x lanes pairs to look up
MOST_PLANNED = 64  # nodes of a group, and groups, that one program of the plan kernel takes
MOST_PROGRAMS = 2**31 - 1
MOST_REGISTERS = 248  # told so, the assembler does not spill a few for one more block
SMALL = Tile(0, 0, 4, 1)  # of kernels that have no tiles


class Problem(NamedTuple):
    """A call. A node is a sample: N queries, then, unless they are the same, M keys."""

    query: Tensor  # (G, N, C, H, W)
    key: Tensor | None  # (G, M, C, H, W)
    pairs: Tensor | None  # (P,) int64
    valid: Tensor | None  # (G, V, H, W) bool
    window: tuple[int, int]
    eps: float

    @property
    def keys(self) -> int:
        return (self.query if self.key is None else self.key).shape[1]

    @property
    def nodes(self) -> int:
        return self.query.shape[1] + (0 if self.key is None else self.key.shape[1])

    @property
    def num_pairs(self) -> int:
        """P, room that is left over included."""
        return self.places if self.pairs is None else self.pairs.shape[0]

    @property
    def places(self) -> int:
        """Where a pair can be: G · N · M."""
        return self.query.shape[0] * self.query.shape[1] * self.keys

    @property
    def map_pixels(self) -> int:
        return self.query.shape[3] * self.query.shape[4]

    @property
    def smallest_norm(self) -> float:
        """An eps whose inverse fp32 can hold."""
        return max(self.eps, torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Layout:
    """How the windows and nodes of a call are cut into tiles."""

    problem: Problem
    rows: int  # of a tile
    pixels: int  # of a window, padded to a power of two
    streamed: bool = False  # whether a window of one sample is larger than a tile may be

    @classmethod
    def of(cls, problem: Problem, kernel: str) -> tuple[Layout, Tile]:
        """The layout for a kernel, or, for windows larger than its tiles, for its streamed twin."""
        query, window = problem.query, problem.window
        pixels = _power_of_two(window[0] * window[1])
        tile = _tile(kernel, query)
        streamed = pixels > tile.rows
        if streamed:
            tile = _tile(f"stream_{kernel}", query)
            rows = min(tile.rows, max(LEAST_ROWS, pixels))
        else:
            everything = _power_of_two(query.shape[0] * problem.nodes * pixels)
            rows = max(LEAST_ROWS, min(tile.rows, everything, MOST_LANES * pixels))
        return cls(problem, rows, pixels, streamed), tile

    @property
    def lanes(self) -> int:
        """Nodes of a tile."""
        return 1 if self.streamed else self.rows // self.pixels

    @property
    def merged(self) -> bool:
        """Whether whole groups fit into a tile."""
        return not self.streamed and self.problem.nodes <= self.lanes

    @property
    def ordered(self) -> bool:
        """Whether it matters which nodes share a tile."""
        return not self.merged and not self.streamed

    @property
    def groups_per_tile(self) -> int:
        return self.lanes // self.problem.nodes if self.merged else 1

    @property
    def groups_of_tiles(self) -> int:
        """Groups, or if they are merged as many as tiles are needed for all."""
        return _ceil(self.problem.query.shape[0], self.groups_per_tile)

    @property
    def tiles(self) -> int:
        """Tiles of a group."""
        return 1 if self.merged else _ceil(self.problem.nodes, self.lanes)

    @property
    def across(self) -> int:
        return _ceil(self.problem.query.shape[4], self.problem.window[1])

    @property
    def windows(self) -> int:
        return _ceil(self.problem.query.shape[3], self.problem.window[0]) * self.across

    @property
    def blocks(self) -> int:
        """Tiles of a window of one sample, if it is streamed."""
        window = self.problem.window
        return _ceil(window[0] * window[1], self.rows) if self.streamed else 1

    def extents(self) -> Extents:
        groups, samples, channels, height, width = self.problem.query.shape
        return Extents(
            *(groups, samples, self.problem.keys, channels, height, width),
            *(*self.problem.window, self.across, self.windows),
            *(self.problem.num_pairs, self.groups_per_tile),
        )

    def cut(self, tile: Tile) -> Cut:
        return Cut(self.lanes, self.rows if self.streamed else self.pixels, tile.block)

    def form(self, *maps: Maps) -> Form:
        same = all(x.query_strides.channel == x.key_strides.channel for x in maps)
        return Form(self.problem.key is None, self.merged, same)


def forward(problem: Problem, loss: Tensor, max_sim: Tensor, argmax: Tensor, norm: Tensor) -> None:
    """Fills loss (P,), max_sim and argmax (P, H, W) and norm (nodes, H, W), all of them."""
    layout, tile = Layout.of(problem, "match")
    maps = _maps(problem.query, problem.key)
    valid, listed = _bytes(problem.valid), _listed(problem)
    found = Matches(max_sim, argmax, norm)
    sizes, form = layout.extents(), layout.form(maps)
    lines = layout.windows * layout.blocks
    partial = max_sim.new_empty((lines, problem.num_pairs))
    common = (partial, sizes, problem.smallest_norm)
    compiled = {"CUT": layout.cut(tile), "PRODUCT": _product(problem.query)}
    if layout.streamed:
        norm_tile = _tile("norm", problem.query)
        _launch(
            match.norm_kernel,
            problem.query.shape[0] * problem.nodes * _ceil(problem.map_pixels, norm_tile.rows),
            norm_tile,
            (maps, valid, norm, sizes, form, Cut(1, norm_tile.rows, norm_tile.block)),
        )
        programs = problem.num_pairs * layout.windows * layout.blocks
        given = (maps, valid, listed, found, *common, form)
        _launch(match.stream_match_kernel, programs, tile, given, **compiled)
    else:
        arguments = (maps, valid, plan(layout), found, *common, form)
        programs = layout.groups_of_tiles * layout.tiles * layout.windows
        _launch(match.match_kernel, programs, tile, arguments, **compiled, DIAGONAL=True)
        if layout.tiles > 1:
            even = layout.tiles - 1 + (layout.tiles - 1) % 2
            programs = problem.query.shape[0] * layout.windows * (even // 2 * (even + 1))
            _launch(match.match_kernel, programs, tile, arguments, **compiled, DIAGONAL=False)
    _launch(
        match.loss_kernel,
        _ceil(problem.num_pairs, 16),
        SMALL,
        (partial, listed, loss, found, lines, sizes),
        PAIRS=16,
        LINES=64,
    )


def backward(
    problem: Problem,
    grad_sim: Tensor,  # (P, H, W), as all three: pixel by pixel
    max_sim: Tensor,
    argmax: Tensor,
    norm: Tensor,  # (nodes, H, W), likewise
    grad_query: Tensor,
    grad_key: Tensor | None,
) -> None:
    """Fills the gradients, every element of them."""
    layout, tile = Layout.of(problem, "gradient")
    terms = Terms(max_sim, argmax, grad_sim)
    if layout.streamed or layout.tiles > MOST_TILES:
        _backward_by_lists(problem, layout, terms, norm, grad_query, grad_key)
        return
    maps, grads = _maps(problem.query, problem.key), _maps(grad_query, grad_key)
    programs = layout.groups_of_tiles * layout.tiles * layout.windows
    planned = plan(layout)
    for across in (False, True)[: layout.tiles]:
        _launch(
            gradient.gradient_kernel,
            programs,
            tile,
            (maps, grads, terms, norm, planned, layout.extents(), problem.smallest_norm),
            FORM=layout.form(maps, grads),
            CUT=layout.cut(tile),
            PRODUCT=_product(problem.query, gradient=True),
            TILES=layout.tiles,
            ACROSS=across,
        )


def _backward_by_lists(
    problem: Problem,
    layout: Layout,
    saved: Terms,
    norm: Tensor,
    grad_query: Tensor,
    grad_key: Tensor | None,
) -> None:
    """The same for windows of more rows than two tiles hold."""
    query, key = _addressable(problem.query), problem.key
    key = None if key is None else _addressable(key)
    problem = problem._replace(query=query, key=key)
    maps, grads = _maps(query, key), _maps(grad_query, grad_key)
    sizes, form = layout.extents(), layout.form(maps, grads)
    bits = 16 if sizes.window_rows * sizes.window_columns < 1 << 16 else 32
    reach = _reach(problem, bits)
    lines = sizes.groups * sizes.windows
    terms = 2 * sizes.pairs * problem.map_pixels + 1
    found = Lists(
        saved.argmax.new_empty((sizes.pairs, sizes.windows, reach.words), dtype=torch.int64),
        saved.argmax.new_zeros((lines, reach.room), dtype=torch.int32),
        saved.argmax.new_empty((lines, reach.room), dtype=torch.int64),
        saved.argmax.new_empty((terms,), dtype=torch.int64),
        norm.new_empty((lines, reach.room)),
        norm.new_empty((lines, reach.room)),
        saved.argmax.new_empty((lines, reach.room), dtype=torch.int32),
        saved.argmax.new_zeros((1,), dtype=torch.int64),
    )
    pixels = reach.words * (64 // bits)
    block = min(32, _power_of_two(pixels))
    pairs = 1024 // block
    _launch(
        terms_.count_kernel,
        _ceil(sizes.pairs, pairs) * _ceil(pixels, block) * sizes.windows,
        SMALL,
        (saved, norm, _listed(problem), found, reach, sizes, problem.smallest_norm),
        FORM=form,
        PIXELS=block,
        PAIRS=pairs,
        BITS=bits,
    )
    _launch(
        terms_.list_kernel,
        lines * (reach.room // LIST_ROWS),
        SMALL,
        (saved, norm, _partners(problem, layout), found, reach, sizes, problem.smallest_norm),
        FORM=form,
        ROWS=LIST_ROWS,
        BITS=bits,
    )
    tile = _tile("sum", query)
    parts = _parts(problem, tile)
    slices = _ceil(sizes.channels, tile.block * parts)
    shares = min(_ceil(PROGRAMS, lines * slices), reach.room // tile.rows)
    _launch(
        sum_.sum_kernel,
        lines * slices * shares,
        tile,
        (maps, grads, found, reach, sizes, shares),
        FORM=form,
        ROWS=tile.rows,
        CHANNELS=tile.block,
        PARTS=parts,
        UNIT=_unit(query),
        KEY_UNIT=_unit(query if key is None else key),
        EVEN=sizes.channels % (tile.block * parts) == 0,
    )


def _partners(problem: Problem, layout: Layout) -> Partners:
    """Which pairs each node is in."""
    groups, nodes = problem.query.shape[0], problem.nodes
    slots = plan(layout, False).slots
    room = _most_partners(problem)
    device = problem.query.device
    lists = torch.empty((2, groups, nodes, room), dtype=torch.int64, device=device)
    degrees = torch.empty((groups, nodes, 2), dtype=torch.int32, device=device)
    found = Partners(degrees, lists[0], lists[1])
    _launch(
        partners_kernel,
        groups * nodes,
        Tile(0, 0, 1, 1),
        (slots, found, room, layout.extents(), layout.form()),
        NODES=128,
    )
    return found


def _parts(problem: Problem, tile: Tile) -> int:
    """How many runs of channels a program takes: as many as leave a window's rows in the cache,
    and no fewer than two where they do not fit at all."""
    line = tile.block * problem.query.element_size()
    rows = problem.nodes * problem.window[0] * problem.window[1]
    fitting = CACHE_BYTES // (rows * line) or 2
    parts = min(fitting, _ceil(problem.query.shape[2], tile.block))
    return 4 if parts >= 4 else 2 if parts >= 2 else 1


def _reach(problem: Problem, bits: int) -> Reach:
    """How lists name rows: by offsets in units."""
    query, key = problem.query, problem.query if problem.key is None else problem.key
    steps = [x.stride(i) // _unit(x) for x in (query, key) for i in (1, 3, 4)]
    pixels = problem.window[0] * problem.window[1]
    room = _ceil(problem.nodes * pixels, LIST_ROWS) * LIST_ROWS
    return Reach(*steps, room, _ceil(pixels * bits, 64), _most_partners(problem))


def _most_partners(problem: Problem) -> int:
    return max(problem.query.shape[1], problem.keys)


def _unit(x: Tensor) -> int:
    """Elements, a divisor of the strides: the largest power of two, so that a row's offset is a
    shift away and the compiler sees its alignment; the largest at all where the offset of the last
    row of a group would take more than 31 bits."""
    divisor = math.gcd(*(x.stride(i) for i in (1, 3, 4))) or 1
    shift = divisor & -divisor
    return shift if _furthest(x) < shift << 31 else divisor


def _addressable(x: Tensor) -> Tensor:
    """x, or a copy with neighbouring channels if lists could not name the rows of its groups."""
    if _furthest(x) < _unit(x) << 31:
        return x
    return x.movedim(2, -1).contiguous().movedim(-1, 2)


def _furthest(x: Tensor) -> int:
    """Elements from the first row of a group to its last."""
    return sum((x.shape[i] - 1) * x.stride(i) for i in (1, 3, 4))


def plan(layout: Layout, ordered: bool | None = None) -> Plan:
    """slots (G, N, M) and order (G, V), int32, as `plan_kernel` says, where they are needed.

    Without a list the kernels number pairs for themselves, and nodes are in order as they come.
    """
    problem = layout.problem
    ordered = layout.ordered if ordered is None else ordered
    listed = _listed(problem)
    if listed is None:
        return Plan(None, None)
    groups, samples = problem.query.shape[:2]
    if problem.nodes > MOST_PLANNED or groups > MOST_PLANNED:
        slots = _slots_of_many(problem, listed)
        return Plan(slots, _order_of_many(problem, slots) if ordered else None)
    slots = listed.new_empty((groups, samples, problem.keys), dtype=torch.int32)
    order = slots.new_empty((groups, problem.nodes)) if ordered else None
    found = Plan(slots, order)
    _launch(
        plan_kernel,
        1,
        SMALL,
        (listed, found, layout.extents(), layout.form()),
        NODES=_power_of_two(problem.nodes),
        BLOCK=1024,
    )
    return found


def _slots_of_many(problem: Problem, listed: Tensor) -> Tensor:
    """The same slots in plain torch, for more nodes than one program can hold."""
    places = problem.places
    # What is no place of a pair goes to one beyond the last.
    place = torch.where((listed >= 0) & (listed < places), listed, places)
    slots = listed.new_full((places + 1,), -1, dtype=torch.int32)
    slots[place] = torch.arange(len(listed), dtype=torch.int32, device=listed.device)
    return slots[:places].view(problem.query.shape[0], problem.query.shape[1], problem.keys)


def _order_of_many(problem: Problem, slots: Tensor) -> Tensor:
    """The same order in plain torch."""
    nodes, samples = problem.nodes, problem.query.shape[1]
    linked = torch.eye(nodes, dtype=torch.bool, device=slots.device).repeat(slots.shape[0], 1, 1)
    paired = slots >= 0
    if problem.key is None:
        linked |= paired | paired.mT
    else:
        linked[:, :samples, samples:] = paired
        linked[:, samples:, :samples] = paired.mT
    label = torch.arange(nodes, device=slots.device).expand(slots.shape[0], nodes)
    for _ in range(3):
        label = torch.where(linked, label[:, None, :], nodes).amin(dim=2)
    return label.argsort(dim=1, stable=True).to(torch.int32)


def _launch(
    kernel: Any, programs: int, tile: Tile, arguments: tuple[Any, ...], **constants: Any
) -> None:
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"this input needs {programs} programs, more than the {MOST_PROGRAMS} of a grid; "
            "split the pairs over several calls"
        )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if torch.version.hip is None:
        options["maxnreg"] = MOST_REGISTERS
    # Triton launches on the current device, which need not be that of the tensors.
    with _device_of(arguments):
        kernel[(programs,)](*arguments, **constants, **options)


def capability(x: Tensor) -> int:
    """Compute capability of the device, 10 · major + minor; 0 for the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _tile(kernel: str, x: Tensor) -> Tile:
    return tile_for(kernel, x.dtype, capability(x))


def _product(x: Tensor, gradient: bool = False) -> Product:
    """How products of fp32 are taken; those of 16 bits are exact in any case."""
    interpreted = capability(x) == 0
    if torch.version.hip is not None or interpreted:
        precision = "ieee"
    elif x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = "tf32"
    elif x.dtype == torch.float32 or (gradient and x.dtype == torch.float16):
        precision = "tf32x3"
    else:
        precision = "ieee"
    return Product(precision, interpreted)


def _maps(query: Tensor, key: Tensor | None) -> Maps:
    key = query if key is None else key
    return Maps(query, key, Strides(*query.stride()), Strides(*key.stride()))


def _bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous().view(torch.uint8)


def _listed(problem: Problem) -> Tensor | None:
    return None if problem.pairs is None else problem.pairs.contiguous()


def _device_of(x: Any) -> AbstractContextManager[Any]:
    while isinstance(x, tuple):
        x = next(part for part in x if part is not None)
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(0, n - 1).bit_length()


def _ceil(n: int, d: int) -> int:
    return -(-n // d)
