"""From a table of pairs to the list that the operator takes, and from its results back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _kept
from .checks import values_visible


class PairList(NamedTuple):
    """The pairs of a table (S, S), or (S, keys) of two sets, in its order: row by row.

    Samples of different scans form no pair. Where they lie scan after scan, the table is a diagonal
    of equal blocks, each of which is a group of the operator: kernels then hold S / groups samples
    together instead of S.
    """

    places: Tensor  # (P,) int64, into the table and on its device; −1 at its end: room left over
    exact: bool  # whether nothing is left over
    groups: int
    grouped: Tensor  # (P,) int64, into (groups, S / groups, S / groups), on the features' device
    order: Tensor | None = (
        None  # (K,) int64, the place of each of the caller's pairs in the list; None: 0 to P
    )

    @classmethod
    def of(cls, table: Tensor, device: torch.device) -> PairList:
        """The pairs of a table (S, keys) of bool, for features on a device.

        With room for exactly as many as there are if counting them is free, else for all of them.
        """
        if values_visible(table):
            return _kept.recall("table", table, device, cls._of, cls._bytes)
        flat = table.reshape(-1)
        places = torch.nonzero_static(flat, size=flat.numel()).squeeze(1)
        return cls(places, False, 1, to_device(places, device))

    @classmethod
    def _of(cls, table: Tensor, device: torch.device) -> PairList:
        places = table.reshape(-1).nonzero().squeeze(1)
        return cls.exactly(places, table.shape[0], device, table.shape[1])

    @classmethod
    def exactly(
        cls, places: Tensor, samples: int, device: torch.device, keys: int | None = None
    ) -> PairList:
        """Pairs of `samples` samples by their places in the table, ascending; no room is spare.

        keys: columns of the table, if it is not square.
        """
        # On a CPU the kernel finds the scans itself; on a GPU the places cannot be read here.
        groups = 1
        if places.is_cpu and device.type != "cpu" and keys in (None, samples):
            groups = count_blocks(places, samples)
        return cls(places, True, groups, copied(regroup(places, samples, groups), device))

    @classmethod
    def listed(cls, pairs: Tensor, samples: int, keys: int, device: torch.device) -> PairList:
        """Pairs (K, 2) of indices, in any order; one that is listed twice is computed once."""

        def made(pairs: Tensor, device: torch.device) -> PairList:
            return cls._listed(pairs, samples, keys, device)

        return _kept.recall(("listed", samples, keys), pairs, device, made, cls._bytes)

    @classmethod
    def _listed(cls, pairs: Tensor, samples: int, keys: int, device: torch.device) -> PairList:
        # A look-up and not the index itself: on a GPU torch stops at one that is out of range.
        query, key = (
            torch.arange(count, device=pairs.device)[column]
            for count, column in zip((samples, keys), pairs.unbind(1), strict=True)
        )
        places = query * keys + key
        if values_visible(pairs):
            order = None
            if not bool((places[1:] > places[:-1]).all()):
                places, order = torch.unique(places, return_inverse=True)
                order = copied(order, device)
            return cls.exactly(places, samples, device, keys)._replace(order=order)
        # As many places as pairs, so that none has to be counted: repetitions leave room.
        ascending, before = places.sort()
        number = torch.cat((places.new_zeros(1), (ascending.diff() != 0).long())).cumsum(0)
        number = number[: len(places)]
        places = torch.full_like(ascending, -1).scatter(0, number, ascending)
        order = torch.empty_like(number).scatter(0, before, number)
        return cls(places, False, 1, to_device(places, device), to_device(order, device))

    def _bytes(self) -> int:
        return sum(x.nbytes for x in (self.places, self.grouped, self.order) if x is not None)

    def ordered(self, values: Tensor) -> Tensor:
        """Values (P, ...) of the list as those (K, ...) of the caller's pairs."""
        return values if self.order is None else values[self.order]

    def pick(self, table: Tensor) -> Tensor:
        """(P,) the pairs' entries of the table (S, S) or one like it, 0 where room is left."""
        flat = table.reshape(-1)
        if self.exact:
            return flat[self.places]
        return torch.where(self.places < 0, 0, flat[self.places.clamp_min(0)])

    def spread(self, values: Tensor, samples: int, keys: int | None = None) -> Tensor:
        """(S, keys) with the values (P,) at their pairs, 0 elsewhere; None: as many as samples."""
        keys = samples if keys is None else keys
        table = samples * keys
        places = to_device(self.places, values.device)
        if self.exact:
            flat = values.new_zeros(table).scatter(0, places, values)
        else:
            places = torch.where(places < 0, table, places)
            flat = values.new_zeros(table + 1).scatter(0, places, values)[:-1]
        return flat.view(samples, keys)


def count_blocks(places: Tensor, samples: int) -> int:
    """Into how many equal blocks on its diagonal a table with these places (P,) falls; 1: none."""
    if places.numel() == 0:
        return 1
    row, column = places // samples, places % samples
    # No pair reaches further than its block.
    shortest = int((row - column).abs().max()) + 1
    for size in range(shortest, samples // 2 + 1):
        if samples % size == 0 and bool((row // size == column // size).all()):
            return samples // size
    return 1


def regroup(places: Tensor, samples: int, groups: int) -> Tensor:
    """Places (P,) in a table (S, S) of blocks as places in the blocks (groups, n, n) alone."""
    if groups == 1:
        return places
    size = samples // groups
    row, column = places // samples, places % samples
    # (i, j) of block g lies at g·n² + (i − g·n)·n + (j − g·n) = i·n + j − g·n.
    return row * size + column - row // size * size


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device; of small tensors of the CPU on a GPU, the copy made last time.

    While a CUDA graph is captured, pinned memory is copied at each replay, as torch does.
    """
    if x.device == device:
        return x
    if _kept.capturing(device) and x.is_pinned():
        return copied(x, device)
    return _kept.recall("copy", x, device, copied, lambda copy: copy.nbytes)


def copied(x: Tensor, device: torch.device) -> Tensor:
    """Asynchronous only towards a GPU: coming from one, values could be read before they arrive."""
    return x if x.device == device else x.to(device, non_blocking=x.is_cpu)
