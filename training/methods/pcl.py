"""PCL (Zeng et al., MICCAI 2021): slices at near positions of their scans attract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from salkernels import positional_positives

from .contrast import ContrastConfig, Contrastive


@dataclass
class PCLConfig(ContrastConfig):
    """Settings of PCL.

    Args:
        t: largest distance of positions, as fractions of the scan, between positives.
    """

    t: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t <= 1:  # at 0 there is no positive, and nothing to learn
            raise ValueError(f"pcl.t is a fraction of the scan in (0, 1], got {self.t}")


class PCL(Contrastive):
    """The positional contrastive loss, Eq. 2 of the SAL paper.

    This is SAL with λ = 0, except that each view is transformed independently, as in PCL.
    """

    label: ClassVar[str] = "PCL"
    Settings: ClassVar[type[Any]] = PCLConfig
    positional: ClassVar[bool] = True
    curves: ClassVar[tuple[str, dict[str, str]]] = ("positional loss (GP)", {"loss": ""})
    settings: PCLConfig

    def positives(self, sample: Tensor, position: Tensor) -> Tensor:
        return positional_positives(position, self.settings.t)
