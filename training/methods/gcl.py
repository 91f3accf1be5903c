"""GCL, the global loss of Chaitanya et al. (NeurIPS 2020): slices of one partition attract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transfer import to_device
from .base import full_precision
from .contrast import ContrastConfig, Contrastive


@dataclass
class GCLConfig(ContrastConfig):
    """Settings of GCL.

    Args:
        partitions: S, parts into which each scan is cut along its axis.
    """

    partitions: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partitions < 2:
            raise ValueError(f"gcl.partitions must be at least 2, got {self.partitions}")


class GCL(Contrastive):
    """Strategy G^D: positives are all views of the same partition, of either scan.

    For each positive pair (Eq. 1 of Chaitanya et al.) the denominator has that pair and the samples
    of other partitions, so a pair does not affect other samples of its partition.
    Changed: scans are not aligned by hand beforehand, and a batch is two scans, not many.
    """

    label: ClassVar[str] = "GCL"
    Settings: ClassVar[type[Any]] = GCLConfig
    positional: ClassVar[bool] = True
    curves: ClassVar[tuple[str, dict[str, str]]] = ("contrast of partitions (GCL)", {"loss": ""})
    settings: GCLConfig

    def positives(self, sample: Tensor, position: Tensor) -> Tensor:
        count = self.settings.partitions
        partition = (position * count).long().clamp_max(count - 1)
        return partition[:, None] == partition[None, :]

    def contrast(self, embeddings: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        same = to_device(self.positives(sample, position), embeddings.device)
        return partition_loss(embeddings, same, self.settings.temperature)


def partition_loss(embeddings: Tensor, same: Tensor, temperature: float) -> Tensor:
    r"""Mean over positive pairs (i, j), j ≠ i, of −log e^{s_ij/τ} / (e^{s_ij/τ} + Σ_k e^{s_ik/τ}).

    embeddings: (S, D). same: (S, S) bool, which samples share a partition; k runs over the others.
    A batch without a positive pair gives 0 with zero gradient.
    """
    with full_precision(embeddings.device):
        unit = F.normalize(embeddings.float(), dim=1)
        scores = unit @ unit.T / temperature
    negatives = scores.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    # −log of the fraction is softplus(negatives − score): exact also where there are no negatives.
    losses = F.softplus(negatives - scores)
    pairs = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return losses.masked_fill(~pairs, 0).sum() / pairs.sum().clamp_min(1)
