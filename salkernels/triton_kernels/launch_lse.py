"""From tensors to launches: the log-sum-exp over windows of negatives, and its gradient.

How a call is cut follows from its signature, and is worked out once for each.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .geometry import Cut, Form
from .launch import KEPT, Asked, on_device, product, stream_of
from .launcher import Launcher, list_of_pairs, maps_of, planner
from .layout import LEAST_ROWS, Layout, Problem, Signature, ceil, power_of_two
from .lse import window_lse_kernel
from .lse_gradient import Roles, Sums, window_lse_gradient_kernel
from .match import norm_kernel

__all__ = ["Problem", "backward", "forward"]

FORWARD = ("lse", "norm")
BACKWARD = ("lse_gradient", "norm")
# Of the backward: rows of a block of partners. With more of them, or more channels in a block, the
# operands of the product with weights do not fit into the registers.
COLUMNS = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
CHANNELS = 32  # of a block; a program takes four, and cosines are computed again for every four
SIDE = Form(SET=True, MERGED=False, SAME=True)  # as `lse.side_of` says
BOTH, QUERIES, KEYS = Roles(True, True), Roles(True, False), Roles(False, True)


class Norms:
    """The launch of the norms (H, W, nodes): Inf of pixels that are not valid."""

    def __init__(self, signature: Signature) -> None:
        tile = signature.tiles[1]
        self.shape = (*signature.query[3:], signature.query[0] * signature.nodes)
        programs = self.shape[2] * ceil(signature.map_pixels, tile.rows)
        cut = Cut(1, tile.rows, tile.block, signature.query[2] % tile.block == 0)
        self.launch = Launcher(norm_kernel, tile, programs, FORM=signature.form(), CUT=cut)
        self.sizes = signature.extents()

    def __call__(self, problem: Problem, stream: int) -> Tensor:
        norm = problem.query.new_empty(self.shape, dtype=torch.float32)
        valid = None if problem.valid is None else problem.valid.contiguous().view(torch.uint8)
        self.launch(maps_of(problem.query, problem.key), valid, norm, self.sizes, stream=stream)
        return norm


class Forward:
    """The launches of a signature's forward."""

    def __init__(self, signature: Signature) -> None:
        tile = signature.tiles[0]
        self.sizes, self.norms = signature.extents(), Norms(signature)
        self.plan = planner(Layout.of(signature), ordered=False)
        rows = _rows(signature, signature.query[1], tile.rows)
        lines = signature.query[0] * signature.windows
        self.launch = Launcher(
            window_lse_kernel,
            tile,
            lines * ceil(signature.query[1] * signature.window_pixels, rows),
            FORM=signature.form(),
            SIDE=SIDE,
            CUT=_cut(signature, tile.block),
            PRODUCT=signature.product,
            ROWS=rows,
            COLUMNS=_rows(signature, signature.keys, tile.rows),
        )

    def __call__(self, problem: Problem, temperature: float, lse: Tensor, stream: int) -> None:
        maps, listed = maps_of(problem.query, problem.key), list_of_pairs(problem)
        norm, plan = self.norms(problem, stream), self.plan(listed, problem.num_pairs, stream)
        scale = math.log2(math.e) / temperature
        given = (maps, norm, plan, lse, self.sizes, problem.smallest_norm, scale)
        self.launch(*given, stream=stream)


class Backward:
    """The launches of a signature's backward: one for each role, in the set form one for both."""

    def __init__(self, signature: Signature, cosines: Any) -> None:
        self.sizes, self.norms = signature.extents(), Norms(signature)
        self.plan = planner(Layout.of(signature), ordered=False)
        every = (BOTH,) if signature.key is None else (QUERIES, KEYS)
        self.launches = [self._launch(signature, cosines, roles) for roles in every]

    @staticmethod
    def _launch(signature: Signature, cosines: Any, roles: Roles) -> Launcher:
        tile = signature.tiles[0]
        own, others = signature.query[1], signature.keys
        if not roles.QUERY:
            own, others = others, own
        rows = _rows(signature, own, tile.rows)
        columns = tile.rows if signature.product.UPCAST else COLUMNS[signature.dtype]
        channels = signature.query[2]
        parts = 1 if channels <= CHANNELS else 2 if channels <= 2 * CHANNELS else 4
        lines = signature.query[0] * signature.windows * ceil(channels, parts * CHANNELS)
        return Launcher(
            window_lse_gradient_kernel,
            tile,
            lines * ceil(own * signature.window_pixels, rows),
            FORM=signature.form(),
            SIDE=SIDE,
            CUT=_cut(signature, tile.block),
            PART=Cut(1, 1, CHANNELS, channels % (parts * CHANNELS) == 0),
            PARTS=parts,
            PRODUCT=cosines,
            WEIGHTED=signature.product,
            ROLES=roles,
            ROWS=rows,
            COLUMNS=_rows(signature, others, columns),
        )

    def __call__(
        self,
        problem: Problem,
        temperature: float,
        sums: Sums,
        grad_query: Tensor,
        grad_key: Tensor | None,
        stream: int,
    ) -> None:
        maps, grads = maps_of(problem.query, problem.key), maps_of(grad_query, grad_key)
        listed, eps = list_of_pairs(problem), problem.smallest_norm
        norm, plan = self.norms(problem, stream), self.plan(listed, problem.num_pairs, stream)
        slope = 1 / temperature
        scale = math.log2(math.e) * slope
        for launch in self.launches:
            launch(maps, grads, norm, plan, sums, self.sizes, eps, scale, slope, stream=stream)


def _rows(signature: Signature, nodes: int, most: int) -> int:
    """Rows of a block: no more than `nodes` have in a window."""
    return min(most, max(LEAST_ROWS, power_of_two(nodes * signature.window_pixels)))


def _cut(signature: Signature, channels: int) -> Cut:
    """Rows are not cut into lanes here."""
    return Cut(1, 1, channels, signature.query[2] % channels == 0)


@lru_cache(KEPT)
def _forward(asked: Asked) -> Forward:
    return Forward(asked.signature(gradient=False))


@lru_cache(KEPT)
def _backward(asked: Asked) -> Backward:
    cosines = product(asked.dtype, asked.capability, asked.tf32, gradient=False)
    return Backward(asked.signature(gradient=True), cosines)


def forward(problem: Problem, temperature: float, lse: Tensor) -> None:
    """Fills every element of lse (G, N, H, W), contiguous."""
    with on_device(problem.query):
        call = _forward(Asked.by(problem, FORWARD))
        call(problem, temperature, lse, stream_of(problem.query))


def backward(
    problem: Problem,
    temperature: float,
    lse: Tensor,  # (G, N, H, W), contiguous
    grad_lse: Tensor,  # likewise
    grad_query: Tensor,
    grad_key: Tensor | None,
) -> None:
    """Fills every element of the gradients."""
    with on_device(problem.query):
        call = _backward(Asked.by(problem, BACKWARD, grad_query, grad_key))
        stream = stream_of(problem.query)
        call(problem, temperature, Sums(lse, grad_lse), grad_query, grad_key, stream)
