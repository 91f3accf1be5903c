"""Launches of kernels: what is compiled is kept with the constants that go with it.

From the second call on a launch costs its arguments, and not Triton's own look-up of what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .config import Tile
from .geometry import Maps, Plan, Strides
from .layout import Layout, Problem, power_of_two
from .plan import plan_kernel

MOST_ORDERED = 64  # nodes of a group that one program can order
MOST_PROGRAMS = 2**31 - 1
MOST_REGISTERS = 248  # told so, the assembler does not spill a few for one more block
SMALL = Tile(0, 0, 4, 1)  # of kernels that have no tiles


Place = tuple[int, int | None]  # an argument, or one of its parts


class Launcher:
    """A kernel with what is compiled into it."""

    def __init__(self, kernel: Any, tile: Tile, programs: int = 0, **constants: Any) -> None:
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if torch.version.hip is None:
            self.options["maxnreg"] = MOST_REGISTERS
        self.given = tuple(constants.values())
        self.places: tuple[Place, ...] | None = None
        self.compiled: dict[int, Any] = {}

    def __call__(self, *arguments: Any, programs: int = 0) -> None:
        programs = programs or self.programs
        if programs > MOST_PROGRAMS:
            raise ValueError(
                f"this input needs {programs} programs, more than the {MOST_PROGRAMS} of a grid; "
                "split the pairs over several calls"
            )
        # Everything that Triton specialises on and that may differ between calls of one signature;
        # which of the arguments are tensors may not.
        if self.places is None:
            self.places = tuple(_tensors(arguments))
        key = _aligned(arguments, self.places)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[(programs,)](*arguments, **self.constants, **self.options)
            if compiled is not None:  # neither interpreted nor recorded
                self.compiled[key] = compiled
        else:
            compiled[(programs, 1, 1)](*arguments, *self.given)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Place]:
    """Where tensors are: among the arguments, or in the tuples that some of those are."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield i, None
        elif isinstance(x, tuple):
            yield from ((i, j) for j, part in enumerate(x) if isinstance(part, Tensor))


def _aligned(arguments: tuple[Any, ...], places: tuple[Place, ...]) -> int:
    """Whether each tensor starts at a multiple of 16 bytes: a bit for each that does not."""
    bits = 0
    for n, (i, j) in enumerate(places):
        x = arguments[i] if j is None else arguments[i][j]
        if x.data_ptr() & 15:
            bits |= 1 << n
    return bits


def planner(layout: Layout, ordered: bool | None = None) -> Callable[[Tensor | None, int], Plan]:
    """What makes slots (G, N, M) and order (G, V), int32, of a list, as `plan_kernel` says.

    Without a list the kernels number pairs for themselves, and nodes are in order as they come.
    """
    signature = layout.signature
    groups, samples, nodes = *signature.query[:2], signature.nodes
    ordered = layout.ordered if ordered is None else ordered
    ordered = ordered and nodes <= MOST_ORDERED
    launcher = Launcher(
        plan_kernel, SMALL, groups, FORM=layout.form(), NODES=power_of_two(nodes), BLOCK=1024
    )
    shape, sizes = (groups, samples, signature.keys), layout.extents()

    def plan(listed: Tensor | None, pairs: int) -> Plan:
        if listed is None:
            return Plan(None, None)
        slots = listed.new_empty(shape, dtype=torch.int32)
        found = Plan(slots, slots.new_empty((groups, nodes)) if ordered else None)
        launcher(listed, found, sizes, pairs)
        return found

    return plan


def maps_of(query: Tensor, key: Tensor | None) -> Maps:
    key = query if key is None else key
    return Maps(query, key, Strides(*query.stride()), Strides(*key.stride()))


def list_of_pairs(problem: Problem) -> Tensor | None:
    return None if problem.pairs is None else problem.pairs.contiguous()
