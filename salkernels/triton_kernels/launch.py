"""From tensors to launches: how a call is cut into tiles, and the arguments of each kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradient, match
from .config import Tile, tile_for
from .geometry import Cut, Extents, Form, Maps, Matches, Plan, Product, Strides
from .gradient import Terms
from .plan import plan_kernel

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
    maps, grads = _maps(problem.query, problem.key), _maps(grad_query, grad_key)
    terms = Terms(max_sim, argmax, grad_sim)
    programs = layout.groups_of_tiles * layout.tiles * layout.windows
    kernel = gradient.gradient_kernel
    if layout.streamed:
        kernel = gradient.stream_gradient_kernel
        programs *= layout.blocks * _ceil(problem.query.shape[2], tile.block)
    _launch(
        kernel,
        programs,
        tile,
        (maps, grads, terms, norm, plan(layout), layout.extents(), problem.smallest_norm),
        FORM=layout.form(maps, grads),
        CUT=layout.cut(tile),
        PRODUCT=_product(problem.query, gradient=True),
    )


def plan(layout: Layout) -> Plan:
    """slots (G, N, M) and order (G, V), int32, as `plan_kernel` says, where they are needed.

    Without a list the kernels number pairs for themselves, and nodes are in order as they come.
    """
    problem = layout.problem
    listed = _listed(problem)
    if listed is None:
        return Plan(None, None)
    groups, samples = problem.query.shape[:2]
    if problem.nodes > MOST_PLANNED or groups > MOST_PLANNED:
        slots = _slots_of_many(problem, listed)
        return Plan(slots, _order_of_many(problem, slots) if layout.ordered else None)
    slots = listed.new_empty((groups, samples, problem.keys), dtype=torch.int32)
    order = slots.new_empty((groups, problem.nodes)) if layout.ordered else None
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
    with _device_of(arguments[0]):
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


def _device_of(x: Tensor | Maps) -> AbstractContextManager[Any]:
    tensor = x.query if isinstance(x, Maps) else x
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(0, n - 1).bit_length()


def _ceil(n: int, d: int) -> int:
    return -(-n // d)
