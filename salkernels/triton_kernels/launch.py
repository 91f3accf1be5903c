"""From tensors to launches: how a call is cut into tiles, and the arguments of each kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gradient, match
from .config import Tile, tile_for
from .plan import plan_kernel

LEAST_ROWS = 32  # of a matrix product, whose inner extent comes in halves
MOST_LANES = 32  # nodes of a tile: a tile has lanes x lanes pairs to look up
MOST_PLANNED = 64  # nodes of a group, and groups, that one program of the plan kernel takes
MOST_PROGRAMS = 2**31 - 1
MOST_REGISTERS = 248  # told so, the assembler does not spill a few for one more block


@dataclass(frozen=True)
class Layout:
    """How a call is cut. A node is a sample: N queries, then, unless they are the same, M keys."""

    query: Tensor  # (G, N, C, H, W)
    key: Tensor | None  # (G, M, C, H, W)
    mask: Tensor | None  # (G, N, M)
    window: tuple[int, int]
    rows: int  # of a tile
    pixels: int  # of a window, padded to a power of two
    streamed: bool = False  # whether a window of one sample is larger than a tile may be

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        window: tuple[int, int],
        kernel: str,
    ) -> tuple[Layout, Tile]:
        """The layout for a kernel, or, for windows larger than its tiles, for its streamed twin."""
        pixels = _power_of_two(window[0] * window[1])
        tile = _tile(kernel, query)
        streamed = pixels > tile.rows
        if streamed:
            tile = _tile(f"stream_{kernel}", query)
            rows = min(tile.rows, max(LEAST_ROWS, pixels))
        else:
            everything = _power_of_two(query.shape[0] * _count_nodes(query, key) * pixels)
            rows = max(LEAST_ROWS, min(tile.rows, everything, MOST_LANES * pixels))
        return cls(query, key, mask, window, rows, pixels, streamed), tile

    @property
    def groups(self) -> int:
        return self.query.shape[0]

    @property
    def samples(self) -> int:
        return self.query.shape[1]

    @property
    def keys(self) -> int:
        return (self.query if self.key is None else self.key).shape[1]

    @property
    def nodes(self) -> int:
        return _count_nodes(self.query, self.key)

    @property
    def pairs(self) -> int:
        return self.groups * self.samples * self.keys

    @property
    def lanes(self) -> int:
        """Nodes of a tile."""
        return self.rows // self.pixels

    @property
    def merged(self) -> bool:
        """Whether whole groups fit into a tile."""
        return self.nodes <= self.lanes

    @property
    def groups_per_tile(self) -> int:
        return self.lanes // self.nodes if self.merged else 1

    @property
    def groups_of_tiles(self) -> int:
        """Groups, or if they are merged as many as tiles are needed for all."""
        return _ceil(self.groups, self.groups_per_tile)

    @property
    def tiles(self) -> int:
        """Tiles of a group."""
        return 1 if self.merged else _ceil(self.nodes, self.lanes)

    @property
    def across(self) -> int:
        return _ceil(self.query.shape[4], self.window[1])

    @property
    def map_pixels(self) -> int:
        return self.query.shape[3] * self.query.shape[4]

    @property
    def windows(self) -> int:
        return _ceil(self.query.shape[3], self.window[0]) * self.across

    @property
    def blocks(self) -> int:
        """Tiles of a streamed window of one sample."""
        return _ceil(self.window[0] * self.window[1], self.rows)

    @property
    def same_channel_stride(self) -> bool:
        return self.key is None or self.key.stride(2) == self.query.stride(2)

    def extents(self) -> tuple[int, ...]:
        """Groups ... windows, in the order in which every kernel takes them."""
        _, samples, channels, height, width = self.query.shape
        sizes = (self.groups, samples, self.keys, channels, height, width)
        return (*sizes, *self.window, self.across, self.windows)

    def flags(self) -> dict[str, Any]:
        return {"SET": self.key is None, "HAS_MASK": self.mask is not None}


def forward(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: tuple[int, int],
    eps: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills loss (G, N, M), argmax and max_sim (P, H, W) and norm (nodes, H, W)."""
    loss, argmax, max_sim, norm = outputs
    layout, tile = Layout.of(query, key, mask, window, "match")
    capacity = max_sim.shape[0]
    slots, order = plan(layout)
    maps = (query, query if key is None else key)
    strides = (*query.stride(), *maps[1].stride())
    common = (*layout.extents(), capacity, _representable(eps))
    lines = layout.windows * (layout.blocks if layout.streamed else 1)
    partial = max_sim.new_empty((lines, capacity))
    precision = _precision(query)
    if layout.streamed:
        norm_tile = _tile("norm", query)
        _launch(
            match.norm_kernel,
            layout.groups * layout.nodes * _ceil(layout.map_pixels, norm_tile.rows),
            norm_tile,
            (*maps, norm, *strides, *layout.extents()[:6]),
            SET=key is None,
            SAME=layout.same_channel_stride,
            ROWS=norm_tile.rows,
            BLOCK=norm_tile.block,
        )
        _launch(
            match.stream_match_kernel,
            layout.pairs * layout.windows * layout.blocks,
            tile,
            (*maps, slots, max_sim, argmax, norm, partial, *strides, *common),
            **layout.flags(),
            ROWS=layout.rows,
            BLOCK=tile.block,
            **precision,
        )
    else:
        programs = [layout.groups_of_tiles * layout.tiles * layout.windows]
        if layout.tiles > 1:
            even = layout.tiles - 1 + (layout.tiles - 1) % 2
            programs.append(layout.groups * layout.windows * (even // 2 * (even + 1)))
        for count, diagonal in zip(programs, (True, False), strict=False):
            _launch(
                match.match_kernel,
                count,
                tile,
                (
                    *(*maps, slots, order, max_sim, argmax, norm, partial),
                    *(*strides, *common, layout.groups_per_tile),
                ),
                **layout.flags(),
                MERGED=layout.merged,
                DIAGONAL=diagonal,
                SAME=layout.same_channel_stride,
                LANES=layout.lanes,
                PIXELS=layout.pixels,
                BLOCK=tile.block,
                **precision,
            )
    _launch(
        match.loss_kernel,
        _ceil(layout.pairs, 16),
        Tile(0, 0, 4, 1),
        (partial, slots, loss, layout.pairs, lines, capacity, layout.map_pixels),
        HAS_MASK=mask is not None,
        PAIRS=16,
        LINES=64,
    )


def backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    argmax: Tensor,
    max_sim: Tensor,
    norm: Tensor,
    window: tuple[int, int],
    eps: float,
    grad_query: Tensor,
    grad_key: Tensor | None,
) -> None:
    """Fills the gradients, every element of them."""
    layout, tile = Layout.of(query, key, mask, window, "gradient")
    maps = (query, query if key is None else key)
    grads = (grad_query, grad_query if grad_key is None else grad_key)
    same = layout.same_channel_stride and grads[0].stride(2) == grads[1].stride(2)
    strides = [stride for tensor in (*maps, *grads) for stride in tensor.stride()]
    slots, order = plan(layout)
    common = (*layout.extents(), max_sim.shape[0], _representable(eps))
    grad_loss = grad_loss.to(torch.float32).contiguous()
    if layout.streamed:
        _launch(
            gradient.stream_gradient_kernel,
            layout.groups
            * layout.nodes
            * layout.windows
            * layout.blocks
            * _ceil(query.shape[2], tile.block),
            tile,
            (*maps, *grads, grad_loss, slots, max_sim, argmax, norm, *strides, *common),
            **layout.flags(),
            SAME=same,
            ROWS=layout.rows,
            BLOCK=tile.block,
            **_precision(query, gradient=True),
        )
        return
    _launch(
        gradient.gradient_kernel,
        layout.groups_of_tiles * layout.tiles * layout.windows,
        tile,
        (
            *maps,
            *grads,
            grad_loss,
            slots,
            order,
            max_sim,
            argmax,
            norm,
            *strides,
            *common,
            layout.groups_per_tile,
        ),
        **layout.flags(),
        MERGED=layout.merged,
        SAME=same,
        LANES=layout.lanes,
        PIXELS=layout.pixels,
        BLOCK=tile.block,
        **_precision(query, gradient=True),
    )


def plan(layout: Layout) -> tuple[Tensor, Tensor]:
    """slots (G, N, M) and order (G, V), int32, as `plan_kernel` says.

    Without a mask the kernels number pairs for themselves, and a tile with whole groups needs no
    order: then any tensor will do.
    """
    mask, device = layout.mask, layout.query.device
    groups, samples, keys, nodes = layout.groups, layout.samples, layout.keys, layout.nodes
    ordered = not layout.merged and not layout.streamed
    if mask is None:
        one = torch.arange(nodes if ordered else 1, dtype=torch.int32, device=device)
        return one, one.repeat(groups, 1) if ordered else one
    if nodes > MOST_PLANNED or groups > MOST_PLANNED:
        slots = _slots_of_many(mask)
        return slots, _order_of_many(layout) if ordered else slots
    slots = torch.empty_like(mask, dtype=torch.int32, memory_format=torch.contiguous_format)
    order = slots.new_empty((groups, nodes)) if ordered else slots
    _launch(
        plan_kernel,
        1,
        Tile(0, 0, 4, 1),
        (mask.contiguous().view(torch.uint8), slots, order, groups, samples, keys),
        SET=layout.key is None,
        ORDER=ordered,
        QUERIES=_power_of_two(samples),
        KEYS=_power_of_two(keys),
        NODES=_power_of_two(nodes),
    )
    return slots, order


def _slots_of_many(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1)
    return torch.where(flat, flat.cumsum(0) - 1, -1).to(torch.int32)


def _order_of_many(layout: Layout) -> Tensor:
    """The same order in plain torch, for more nodes than one program can hold."""
    assert layout.mask is not None
    nodes, samples = layout.nodes, layout.samples
    linked = torch.eye(nodes, dtype=torch.bool, device=layout.query.device)
    linked = linked.repeat(layout.groups, 1, 1)
    if layout.key is None:
        linked |= layout.mask | layout.mask.mT
    else:
        linked[:, :samples, samples:] = layout.mask
        linked[:, samples:, :samples] = layout.mask.mT
    label = torch.arange(nodes, device=linked.device).expand(layout.groups, nodes)
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


def _precision(x: Tensor, gradient: bool = False) -> dict[str, Any]:
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
    return {"PRECISION": precision, "UPCAST": interpreted}


def _representable(eps: float) -> float:
    """An eps whose inverse fp32 can hold."""
    return max(eps, torch.finfo(torch.float32).tiny)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _count_nodes(query: Tensor, key: Tensor | None) -> int:
    return query.shape[1] + (0 if key is None else key.shape[1])


def _power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(0, n - 1).bit_length()


def _ceil(n: int, d: int) -> int:
    return -(-n // d)
