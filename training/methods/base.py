"""What every pre-training method offers to the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..augment import AugmentConfig, Geometry
from ..models import Encoder, UNetConfig

COSINE_LIMIT = 0.9  # mean cosine of arbitrary features above which they count as collapsed
RANK_LIMIT = 1.5  # effective rank below which they count as collapsed to one line
# A rise of the encoder's mean cosine that is worth a word long before the limit: over means of
# LOOKS looks, since each is of a single batch. SAL without E on ACDC (desk) went from 0.48 after
# 400 steps to 0.62 after 2,500.
DRIFT, DRIFTED, LOOKS = 0.1, 0.5, 5


class Views(NamedTuple):
    """The 2n augmented samples of a batch of n slices: both views of each, one after the other.

    Sample 2i is the first view of slice i, sample 2i + 1 the second (`first`, `second`). Slices lie
    scan after scan, so that all samples of a scan lie together: the pairs of the alignment loss are
    then blocks on the diagonal, which the kernels take as groups of their own.

    All that tells which samples belong together is on the CPU, whichever device the images are on:
    it can be looked at without waiting for a GPU.
    """

    images: Tensor  # (2n, 1, H, W), on the training device
    volume: Tensor  # (2n,) int64, the scan in the data set; on the CPU, as the next three
    slice_index: Tensor  # (2n,) int64, the slice in its scan
    num_slices: Tensor  # (2n,) int64, V of that scan
    sample: Tensor  # (2n,) int64, the slice among all slices of the data set
    generator: torch.Generator  # of the step, for what the method draws itself
    frame: Tensor | None = None  # (2n, 2, 3), on the device, undoes a view's geometry: `undo`

    @property
    def position(self) -> Tensor:
        """Relative position of each slice in its scan, in [0, 1): (2n,) float64."""
        return self.slice_index.double() / self.num_slices


def first(x: Tensor) -> Tensor:
    """Of samples (2n, ...) the first view of each slice: (n, ...)."""
    return x[0::2]


def second(x: Tensor) -> Tensor:
    """Of samples (2n, ...) the second view of each slice: (n, ...)."""
    return x[1::2]


def side_by_side(x: Tensor) -> Tensor:
    """All first views, then all second ones (2n, ...), in the order of `Views`."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


class Run(Protocol):
    """What a method may ask of the run's configuration."""

    @property
    def crop(self) -> int:
        """Side of the views in pixels."""

    @property
    def model(self) -> UNetConfig:
        """Size of the encoder."""

    @property
    def augment(self) -> AugmentConfig:
        """Strength of the augmentation."""


class Corpus(Protocol):
    """The slices that pre-training sees, for methods that remember or revisit each of them."""

    @property
    def num_samples(self) -> int:
        """Slices of the data set: samples are numbered from 0 to this."""

    @property
    def samples(self) -> Tensor:
        """(K,) int64, ascending: those that pre-training sees, all but those of a fold left out."""

    def canvases(self, samples: Tensor) -> Tensor:
        """These slices without augmentation: (K, 1, size, size) float32, on CPU."""


@dataclass
class Outcome:
    """Result of one step: the loss to minimise, its named terms, and maps kept for monitoring.

    chance: what some of the terms come to where all features are alike, so that none is told from
    another: above it a loss has learnt nothing.
    deepest: the encoder's last map of the samples, detached, where `maps` has another one.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    maps: dict[str, Tensor] = field(default_factory=dict)  # detached
    chance: dict[str, Tensor] = field(default_factory=dict)  # scalars without gradient
    deepest: Tensor | None = None


class Method(nn.Module, ABC):
    """A pre-training method: an encoder, whatever heads it needs, and a loss.

    Built as `Method(model, settings, corpus)`, where `settings` is a `Settings`, or None for a
    method without settings.

    Class attributes:
        label: how tables and figures call it.
        Settings: a dataclass of what can be set, all with defaults. The configuration has it as a
            field of the method's name, and the command line as flags `--name.setting`.
        geometry: how the method wants the views of a step to be transformed: each by itself, or
            the slices of one scan alike (`augment.geometry=auto` follows it).
        watched: a figure of `monitor` whose rows make up the history given to `warnings`.
        positional: whether the loss goes by where in its scan a slice lies.
        trains: False for the start without pre-training.
        curves: title of the plot of the loss, and the labels of its terms in it.
        pictured: what the picture of a batch shows (`pictures`).
    """

    label: ClassVar[str]
    Settings: ClassVar[type[Any] | None] = None
    geometry: ClassVar[Geometry] = "independent"
    watched: ClassVar[str] = "cosine_encoder"
    positional: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    curves: ClassVar[tuple[str, dict[str, str]]] = ("loss", {"loss": ""})
    pictured: ClassVar[str] = "two views each"
    encoder: Encoder

    @abstractmethod
    def forward(self, views: Views) -> Outcome:
        """The loss of one batch."""

    @classmethod
    def check(cls, settings: Any, run: Run) -> None:
        """Raises a ValueError where the method cannot be trained in such a run.

        What settings alone tell belongs into their `__post_init__`.
        """

    @property
    def leaves_parameters_out(self) -> bool:
        """Whether the loss may not depend on some parameters that require a gradient."""
        return False

    def before_step(self, step: int, steps: int, corpus: Corpus) -> None:
        """Called before step `step` (from 0) of `steps`, where a method looks at all slices."""

    def centres(self, sample: Tensor, room: float, generator: torch.Generator) -> Tensor | None:
        """Where the views of these samples are centred: (B, 2), x before y, 1 = half the canvas.

        room: how far from the middle a centre may be. None leaves the shift to the augmentation.
        """
        return None

    def pictures(self, views: Views) -> list[Tensor]:
        """What the network is shown of each of the 2n samples: (1, h, w) each."""
        return [*views.images]

    def monitor(self, views: Views, outcome: Outcome) -> dict[str, float]:
        """Extra figures, computed now and then, that tell whether the method still learns."""
        return likeness(outcome.maps) | chances(outcome) | retrieval(outcome, views)

    def warnings(self, history: list[dict[str, float]]) -> dict[str, str]:
        """What the monitored figures so far give reason to warn about: kind -> sentence."""
        found = drift(history)
        if history and history[-1].get("cosine_encoder", 0.0) > COSINE_LIMIT:
            found["collapsed encoder"] = (
                f"the encoder's pixels have collapsed to one direction (mean cosine "
                f"{history[-1]['cosine_encoder']:.2f} > {COSINE_LIMIT}); lower optim.lr"
            )
        return found


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: a cosine rounded to bf16 changes exp(cosine / τ) by some per cent."""
    return torch.autocast(device.type, enabled=False)


def likeness(maps: Mapping[str, Tensor]) -> dict[str, float]:
    """How alike arbitrary pixels of each of these maps are: mean cosine and effective rank.

    The cosine alone does not see a collapse to one line with two signs, of which the mean is 0.
    """
    cosines = {f"cosine_{name}": mean_cosine(own).item() for name, own in maps.items()}
    return cosines | {f"rank_{name}": effective_rank(own).item() for name, own in maps.items()}


def chances(outcome: Outcome) -> dict[str, float]:
    """The chance level of each term that has one."""
    return {f"chance_{name}": level.item() for name, level in outcome.chance.items()}


def retrieval(outcome: Outcome, views: Views) -> dict[str, float]:
    """What the nearest slice of each sample in the batch is, by the encoder's pooled last map.

    `nearest_same_scan` is the share whose nearest slice, other views of the own one aside, is of
    the same scan, and `nearest_distance` the mean distance of their positions; `chance_...` are the
    same of any other slice. A method that tells patients apart has a high share, one that tells
    levels apart a small distance. Empty where there is nothing to compare.
    """
    maps = outcome.maps.get("encoder") if outcome.deepest is None else outcome.deepest
    if maps is None:
        return {}
    pooled = F.normalize(maps.float().mean(dim=(2, 3)), dim=1).cpu()  # where the columns are
    volume, position, sample = views.volume, views.position, views.sample
    if len(pooled) < len(sample):  # some methods encode the first view of each slice only
        volume, position, sample = first(volume), first(position), first(sample)
    other = sample[:, None] != sample
    if not bool(other.any(dim=1).all()):
        return {}
    nearest = (pooled @ pooled.T).masked_fill(~other, -torch.inf).argmax(dim=1)
    same = (volume[:, None] == volume).double()
    apart = (position[:, None] - position).abs().double()
    found = {}
    for name, table in (("nearest_same_scan", same), ("nearest_distance", apart)):
        found[name] = table.gather(1, nearest[:, None]).mean().item()
        found[f"chance_{name}"] = ((table * other).sum(dim=1) / other.sum(dim=1)).mean().item()
    return found


def drift(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """A warning where the encoder's pixels grow alike, though they have not collapsed."""
    cosines = [row["cosine_encoder"] for row in history if "cosine_encoder" in row]
    means = [sum(cosines[i : i + LOOKS]) / LOOKS for i in range(len(cosines) - LOOKS + 1)]
    if not means or means[-1] < max(DRIFTED, min(means) + DRIFT):
        return {}
    return {
        "drifting encoder": f"the encoder's pixels grow alike: their mean cosine rose from "
        f"{min(means):.2f} to {means[-1]:.2f} (collapsed: {COSINE_LIMIT}); a longer run will "
        f"carry it further"
    }


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine over all pairs of different pixels of (S, C, H, W), without forming the pairs."""
    unit = F.normalize(features.float(), dim=1)
    total = unit.sum(dim=(0, 2, 3))
    count = unit.shape[0] * unit.shape[2] * unit.shape[3]
    return (total.square().sum() - unit.square().sum()) / (count * (count - 1))


def effective_rank(features: Tensor) -> Tensor:
    r"""Over how many directions the pixels of (S, C, H, W) are spread, from 1 to C.

    .. math:: e^{-\sum_k p_k \log p_k}

    where p are the eigenvalues of the mean of x xᵀ over the pixels, x being of unit norm (Roy and
    Vetterli, EUSIPCO 2007). No mean is taken off: one direction, and one line with both signs, give
    1.
    """
    unit = F.normalize(features.double(), dim=1).movedim(1, -1).flatten(0, -2)
    shares = torch.linalg.eigvalsh(unit.T @ unit).clamp_min(0)
    shares = shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)
    return torch.special.entr(shares).sum().exp()
