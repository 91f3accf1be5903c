"""From a table of pairs to the list that the operator takes, and from its results back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import values_visible


class PairList(NamedTuple):
    """Where the pairs stand in the table (S, S), row-major and ascending."""

    places: Tensor  # (P,) int64, on the features' device; −1 at its end: room that is left over
    exact: bool  # whether nothing is left over

    @classmethod
    def of(cls, table: Tensor, device: torch.device) -> PairList:
        """The pairs of a table (S, S) of bool.

        Room for as many as there are, if counting them costs nothing; else for all.
        """
        flat = table.reshape(-1)
        if exact := values_visible(table):
            places = flat.nonzero().squeeze(1)
        else:
            places = torch.nonzero_static(flat, size=flat.numel()).squeeze(1)
        return cls(to_device(places, device), exact)

    def pick(self, table: Tensor) -> Tensor:
        """(P,) the pairs' entries of a table (S, S) on the same device, 0 where room is left."""
        flat = table.reshape(-1)
        if self.exact:
            return flat[self.places]
        return torch.where(self.places < 0, 0, flat[self.places.clamp_min(0)])

    def spread(self, values: Tensor, samples: int) -> Tensor:
        """(S, S) with the values (P,) at their pairs, 0 elsewhere."""
        table = samples * samples
        if self.exact:
            flat = values.new_zeros(table).scatter(0, self.places, values)
        else:
            places = torch.where(self.places < 0, table, self.places)
            flat = values.new_zeros(table + 1).scatter(0, places, values)[:-1]
        return flat.view(samples, samples)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Asynchronous to a GPU only: from one, values could be read before they arrive."""
    return x if x.device == device else x.to(device, non_blocking=x.is_cpu)
