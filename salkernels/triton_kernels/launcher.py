"""Launches of kernels: what is compiled is kept with the constants that go with it.

From the second call on a launch costs its arguments, and not Triton's own look-up of what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import triton
from torch import Tensor

from .. import _kept
from .config import Tile
from .geometry import Maps, Plan, Strides
from .layout import Layout, Problem, power_of_two
from .plan import plan_kernel

MOST_ORDERED = 64  # nodes of a group that one program can order
MOST_PROGRAMS = 2**31 - 1
MOST_REGISTERS = 248  # told so, the assembler does not spill a few for one more block
SMALL = Tile(0, 0, 4, 1)  # of kernels that have no tiles


# An argument that is a tensor, or which parts of it are.
Place = tuple[int, tuple[int, ...] | None]

# Who profiles launches may ask to see them; before Triton 3.4 that was elsewhere.
_HOOKS = getattr(getattr(triton, "knobs", None), "runtime", None)


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

    def __call__(self, *arguments: Any, stream: int, programs: int = 0) -> None:
        """`stream`: the current one of the current device, which is that of the tensors."""
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
        addresses, key = _addressed(arguments, self.places)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[(programs,)](*arguments, **self.constants, **self.options)
            if compiled is not None:  # neither interpreted nor recorded
                self.compiled[key] = compiled
        elif _someone_looks():
            compiled[(programs, 1, 1)](*arguments, *self.given)
        else:
            # As the line above, which asks for device and stream; Triton takes addresses where it
            # would ask tensors for them, and the driver what kind of memory that is.
            compiled.run(
                *(programs, 1, 1, stream, compiled.function, compiled.packed_metadata),
                *(None, None, None),  # what hooks are told, and both of them
                *addresses,
                *self.given,
            )


def _someone_looks() -> bool:
    """Whether a profiler wants to be told of launches, or this Triton does not say."""
    if _HOOKS is None:
        return True
    for hook in (_HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a list of them since Triton 3.5
            return True
    return False


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Place]:
    """Where tensors are: among the arguments, or in the tuples that some of those are."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield i, None
        elif isinstance(x, tuple):
            parts = tuple(j for j, part in enumerate(x) if isinstance(part, Tensor))
            if parts:
                yield i, parts


def _addressed(arguments: tuple[Any, ...], places: tuple[Place, ...]) -> tuple[list[Any], int]:
    """The arguments with addresses in place of tensors; and whether each of those is a multiple of
    16 bytes, a bit for each that is not."""
    found, bits = list(arguments), 1
    for i, parts in places:
        x = arguments[i]
        if parts is None:
            found[i] = address = x.data_ptr()
            bits += bits + (address & 15 != 0)
        else:
            within = list(x)
            for j in parts:
                within[j] = address = x[j].data_ptr()
                bits += bits + (address & 15 != 0)
            found[i] = tuple(within)
    return found, bits


def planner(
    layout: Layout, ordered: bool | None = None
) -> Callable[[Tensor | None, int, int], Plan]:
    """What makes slots (G, N, M) and order (G, V), int32, of a list, as `plan_kernel` says.

    Without a list the kernels number pairs for themselves, and nodes are in order as they come. Of
    a list that never changes the plan is kept with it, and made once for all its calls.
    """
    signature = layout.signature
    groups, samples, nodes = *signature.query[:2], signature.nodes
    ordered = layout.ordered if ordered is None else ordered
    ordered = ordered and nodes <= MOST_ORDERED
    form = layout.form()
    launcher = Launcher(
        plan_kernel, SMALL, groups, FORM=form, NODES=power_of_two(nodes), BLOCK=1024
    )
    shape, sizes = (groups, samples, signature.keys), layout.extents()
    name = (shape, ordered, form.SET)

    def plan(listed: Tensor | None, pairs: int, stream: int) -> Plan:
        if listed is None:
            return Plan(None, None)
        notes = _kept.notes_of(listed)
        if notes is not None and name in notes:
            return cast("Plan", notes[name])
        slots = listed.new_empty(shape, dtype=torch.int32)
        found = Plan(slots, slots.new_empty((groups, nodes)) if ordered else None)
        launcher(listed, found, sizes, pairs, stream=stream)
        # What is made in the capture of a graph is of its memory, and made at each replay.
        if notes is not None and not _kept.capturing(listed.device):
            notes[name] = found
        return found

    return plan


def maps_of(query: Tensor, key: Tensor | None) -> Maps:
    key = query if key is None else key
    return Maps(query, key, Strides(*query.stride()), Strides(*key.stride()))


def list_of_pairs(problem: Problem) -> Tensor | None:
    return None if problem.pairs is None else problem.pairs.contiguous()
