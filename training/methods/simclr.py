"""SimCLR (Chen et al., ICML 2020): two views of a slice attract, all else repels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .contrast import ContrastConfig, Contrastive


class SimCLR(Contrastive):
    """NT-Xent (Eq. 1 of Chen et al.) over the 2n views.

    Changed: a slice that a batch holds twice (scans with fewer than n/2 slices) has three
    positives, not one, rather than itself among the negatives; the images are ours (no colour,
    crops as weak as those of all methods here).
    """

    label: ClassVar[str] = "SimCLR"
    Settings: ClassVar[type[Any]] = ContrastConfig
    curves: ClassVar[tuple[str, dict[str, str]]] = ("NT-Xent", {"loss": ""})

    def positives(self, sample: Tensor, position: Tensor) -> Tensor:
        return sample[:, None] == sample[None, :]
