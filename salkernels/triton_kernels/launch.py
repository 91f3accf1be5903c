"""From tensors to launches: the arguments of each kernel.

How a call is cut follows from its `Signature`, and is worked out once for each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import raw_stream, tf32_allowed
from . import gradient, match
from .config import Tile, tiles_for
from .geometry import Cut, Matches, Product, Strides
from .gradient import Terms
from .launcher import Launcher, list_of_pairs, maps_of, planner
from .layout import Layout, Problem, Signature, ceil
from .lists import BackwardByLists, addressable

__all__ = ["Problem", "backward", "capability", "forward"]

MOST_TILES = 2  # of a group, whose weights fit into the registers
KEPT = 256  # signatures
# Of the sums over windows: a program waits for memory once for so many lines.
SUMMING = Tile(0, 0, 8, 1)
FORWARD = ("match", "stream_match", "norm")
BACKWARD = ("gradient", "sum", "gradient_across")


class Forward:
    """The launches of a signature's forward."""

    def __init__(self, signature: Signature) -> None:
        layout = Layout.of(signature)
        self.layout, self.sizes, form = layout, layout.extents(), layout.form()
        self.lines = signature.windows * layout.blocks
        compiled: dict[str, Any] = {"FORM": form, "CUT": layout.cut(), "PRODUCT": signature.product}
        self.loss = Launcher(match.loss_kernel, SUMMING, PAIRS=16, LINES=256)
        if layout.streamed:
            self.streamed = Launcher(match.stream_match_kernel, layout.tile, **compiled)
            tile = signature.tiles[2]
            filled = signature.query[2] % tile.block == 0
            self.norms = Launcher(
                match.norm_kernel,
                tile,
                signature.query[0] * signature.nodes * ceil(signature.map_pixels, tile.rows),
                FORM=form,
                CUT=Cut(1, tile.rows, tile.block, filled),
            )
            return
        programs = layout.groups_of_tiles * layout.tiles * signature.windows
        kernels = [Launcher(match.match_kernel, layout.tile, programs, **compiled, DIAGONAL=True)]
        if layout.tiles > 1:
            even = layout.tiles - 1 + (layout.tiles - 1) % 2
            programs = signature.query[0] * signature.windows * (even // 2 * (even + 1))
            kernels.append(
                Launcher(match.match_kernel, layout.tile, programs, **compiled, DIAGONAL=False)
            )
        self.matches = kernels
        self.plan = planner(layout)

    def __call__(self, problem: Problem, loss: Tensor, found: Matches, stream: int) -> None:
        maps, listed = maps_of(problem.query, problem.key), list_of_pairs(problem)
        valid = None if problem.valid is None else problem.valid.contiguous().view(torch.uint8)
        pairs, eps, sizes = problem.num_pairs, problem.smallest_norm, self.sizes
        partial = loss.new_empty((self.lines, pairs))
        given: tuple[Any, ...]
        if self.layout.streamed:
            self.norms(maps, valid, found.norm, sizes, stream=stream)
            programs = pairs * self.lines
            given = (maps, valid, listed, found, partial, sizes, eps, pairs)
            self.streamed(*given, stream=stream, programs=programs)
        else:
            plan = self.plan(listed, pairs, stream)
            given = (maps, valid, plan, found, partial, sizes, eps, pairs)
            for kernel in self.matches:
                kernel(*given, stream=stream)
        given = (partial, listed, loss, found, self.lines, sizes, pairs)
        self.loss(*given, stream=stream, programs=ceil(pairs, 16))


class Backward:
    """The launches of a signature's backward, of which two tiles at most hold a window."""

    def __init__(self, signature: Signature) -> None:
        layout = Layout.of(signature)
        self.sizes = layout.extents()
        tiles = (layout.tile, signature.tiles[2])
        self.kernels = [
            Launcher(
                gradient.gradient_kernel,
                tiles[across],
                layout.groups_of_tiles * layout.tiles * signature.windows,
                FORM=layout.form(),
                CUT=layout.cut(tiles[across].block),
                PRODUCT=signature.product,
                TILES=layout.tiles,
                ACROSS=across,
            )
            for across in (False, True)[: layout.tiles]
        ]
        self.plan = planner(layout)

    def __call__(
        self,
        problem: Problem,
        saved: Terms,
        norm: Tensor,
        grad_query: Tensor,
        grad_key: Any,
        stream: int,
    ) -> None:
        maps, grads = maps_of(problem.query, problem.key), maps_of(grad_query, grad_key)
        pairs = problem.num_pairs
        plan = self.plan(list_of_pairs(problem), pairs, stream)
        given = (maps, grads, saved, norm, plan, self.sizes, problem.smallest_norm, pairs)
        for kernel in self.kernels:
            kernel(*given, stream=stream)


class Asked(NamedTuple):
    """All that a call's signature follows from, as it is found: cheap to make and to look up."""

    query: torch.Size
    key: torch.Size | None
    window: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[tuple[int, ...], ...]  # of queries and keys, and, backward, of their gradients
    listed: bool
    valid: bool
    capability: int
    tf32: bool
    tiles: tuple[Tile, ...]

    @classmethod
    def by(cls, problem: Problem, kernels: tuple[str, ...], *grads: Tensor | None) -> Asked:
        query, key = problem.query, problem.key
        device, dtype = query.device, query.dtype
        strides = [query.stride(), query.stride() if key is None else key.stride()]
        for i, grad in enumerate(grads):
            strides.append(strides[i + 1] if grad is None else grad.stride())
        found = capability(query)
        return cls(
            query.shape,
            None if key is None else key.shape,
            problem.window,
            dtype,
            device,
            tuple(strides),
            problem.pairs is not None,
            problem.valid is not None,
            found,
            dtype == torch.float32 and tf32_allowed(),
            tiles_for(kernels, dtype, found),
        )

    def signature(self, gradient: bool) -> Signature:
        return Signature(
            self.query,
            self.key,
            self.window,
            self.dtype,
            tuple(Strides(*strides) for strides in self.strides),
            self.listed,
            self.valid,
            product(self.dtype, self.capability, self.tf32, gradient),
            self.tiles,  # type: ignore[arg-type]
        )


@lru_cache(KEPT)
def _forward(asked: Asked) -> Forward:
    return Forward(asked.signature(gradient=False))


@lru_cache(KEPT)
def _backward(asked: Asked) -> Any:
    signature = asked.signature(gradient=True)
    layout = Layout.of(signature)
    if layout.streamed or layout.tiles > MOST_TILES:
        return BackwardByLists(signature)
    return Backward(signature)


def forward(problem: Problem, loss: Tensor, max_sim: Tensor, argmax: Tensor, norm: Tensor) -> None:
    """Fills every element of loss (P,), max_sim and argmax (P, H, W) and norm (nodes, H, W)."""
    with _on_device(problem.query):
        call = _forward(Asked.by(problem, FORWARD))
        call(problem, loss, Matches(max_sim, argmax, norm), _stream(problem.query))


def backward(
    problem: Problem,
    grad_sim: Tensor,  # (P, H, W), as all three: pixel by pixel
    max_sim: Tensor,
    argmax: Tensor,
    norm: Tensor,  # (nodes, H, W), likewise
    grad_query: Tensor,
    grad_key: Tensor | None,
) -> None:
    """Fills every element of the gradients."""
    query, key = problem.query, problem.key
    if not (_is_near(query) and (key is None or _is_near(key))):
        key = None if key is None else addressable(key)
        problem = problem._replace(query=addressable(query), key=key)
    with _on_device(problem.query):
        call = _backward(Asked.by(problem, BACKWARD, grad_query, grad_key))
        saved, stream = Terms(max_sim, argmax, grad_sim), _stream(problem.query)
        call(problem, saved, norm, grad_query, grad_key, stream)


def _is_near(x: Tensor) -> bool:
    """Whether 31 bits reach all of it: then it is `addressable` in any case."""
    return x.untyped_storage().nbytes() < 1 << 31


def capability(x: Tensor) -> int:
    """Compute capability of the device, 10 · major + minor; 0 for the interpreter."""
    return _capability(x.device) if x.is_cuda else 0


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def product(dtype: torch.dtype, capability: int, tf32: bool, gradient: bool) -> Product:
    """The arithmetic of fp32 products; those of 16 bits are always exact."""
    interpreted = capability == 0
    if torch.version.hip is not None or interpreted:
        precision = "ieee"
    elif tf32:
        precision = "tf32"
    elif dtype == torch.float32 or (gradient and dtype == torch.float16):
        precision = "tf32x3"
    else:
        precision = "ieee"
    return Product(precision, interpreted)


def _stream(x: Tensor) -> int:
    return raw_stream(x.device) if x.is_cuda else 0


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
