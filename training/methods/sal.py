"""SAL (Li, Ouyang and Wan, ISBI 2024): global positional loss and window-based local alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from salkernels import (
    SALLoss,
    gp_loss,
    positional_positives,
    slice_pairs,
    wla_contrast,
    wla_set_loss,
)

from ..augment import Geometry, shown, undo
from ..distributed import gather, share
from ..models import Embedding, EmbeddingKind, Encoder, Projection, UNetConfig
from ..transfer import to_device
from .base import (
    COSINE_LIMIT,
    RANK_LIMIT,
    Corpus,
    Method,
    Outcome,
    Run,
    Views,
    chances,
    drift,
    likeness,
    retrieval,
)
from .contrast import Head, alike, check_head
from .vicreg import variance_covariance

Centre = Literal["none", "batch", "image", "window"]
Pairs = Literal["near", "same", "other"]
Loss = Literal["mae", "contrast"]
# A fall of LA on pairs of different scans to this share of the untrained network's is suspicious.
# With a trainable E on ACDC it falls to 0.01; without E, where nothing collapses, single batches of
# a phantom fall to 0.5.
FALL = 0.25


@dataclass
class SALConfig:
    """Settings of SAL; Greek letters as in the paper.

    Args:
        window_size: ω, side of a window in pixels of the feature map.
        scale: s, the encoder's level whose map LA acts on; 4 is at 1/8 of the input resolution.
        lambda_: λ, weight of LA; 0 leaves the positional loss alone, which is PCL.
        t: threshold of both losses as a fraction of the scan.
        t_la: threshold of LA where it is not that of the positional loss; None: as t. At 0.35 pairs
            of LA lie up to three slices apart in a scan of ten; 0.15 leaves neighbours.
        pairs: what LA compares: "near", slices of one scan less than t_la apart (the paper). Two
            placebos share all but the anatomy with it: "same", the two views of one slice alone;
            "other", slices of *different* scans at near positions, and none of one scan.
        roll: a third placebo: keys are rolled by half a map along both axes before LA, so that a
            window never meets the window that shows the same place. Negatives are rolled with them.
        loss: of LA: "mae", Eq. 1 (the paper), or "contrast": a pixel's match is to beat all pixels
            of the same window of slices that are not near (`salkernels.wla_contrast`), so that
            features which grow alike do not bring it down. Negatives are the batch's slices at a
            distance of t or more (t_la, if larger), of any scan.
        contrast_temperature: τ of `loss=contrast`.
        temperature: τ of the positional loss.
        embedding: E before LA: "linear" (the paper), "normalised" (kernels of unit norm),
            "orthogonal" (fixed), or "none".
        embedding_dim: channels after E; 0 keeps those of the encoder's map.
        variance: weight of VICReg's variance term on E's output, which tells a collapse to one
            direction; 0 leaves it out. See `vicreg.variance_covariance`.
        covariance: weight of its covariance term, which tells a collapse to few directions.
        centre: subtract the mean feature of the batch, of each image or of each window before the
            cosine, which a direction that all pixels share does not survive; "none" is the paper.
        stop_gradient: let no gradient into the key side of a pair, so that a feature moves towards
            its match and the match stays; the paper moves both.
        common_frame: undo the geometry of each view on its map before LA, so that windows show
            the same anatomy also where each view has a strong transform of its own
            (`augment.geometry=independent`). A pixel takes part in a pair where both views show
            it. The paper does not.
        projection: head of the positional loss, "mlp" with one hidden layer, as all contrastive
            methods here have it, or "linear" (the paper, Sec. 2.3).
        projection_dim: length of the global feature vector.
    """

    window_size: int = 2
    scale: int = 4
    lambda_: float = 1.0
    t: float = 0.35
    t_la: float | None = None
    pairs: Pairs = "near"
    roll: bool = False
    loss: Loss = "mae"
    contrast_temperature: float = 0.1
    temperature: float = 0.1
    embedding: EmbeddingKind = "linear"
    embedding_dim: int = 0
    variance: float = 0.0
    covariance: float = 0.0
    centre: Centre = "none"
    stop_gradient: bool = False
    common_frame: bool = False
    projection: Head = "mlp"
    projection_dim: int = 128

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"sal.scale counts from 1, got {self.scale}")
        check_head(self.projection)
        if self.embedding_dim < 0 or self.projection_dim < 1:
            raise ValueError(
                "sal.embedding_dim must be >= 0 and sal.projection_dim >= 1, got "
                f"{self.embedding_dim} and {self.projection_dim}"
            )
        if self.t == 0:
            raise ValueError("sal.t is 0: no two slices are near, so there is nothing to learn")
        if self.common_frame and self.centre == "window":
            raise ValueError(
                "sal.centre=window centres the windows of the view, which sal.common_frame moves; "
                "use sal.centre=image, or only one of the two"
            )
        if self.pairs not in get_args(Pairs):
            raise ValueError(
                f"sal.pairs must be one of {', '.join(get_args(Pairs))}, got {self.pairs!r}"
            )
        if self.loss not in get_args(Loss):
            raise ValueError(
                f"sal.loss must be one of {', '.join(get_args(Loss))}, got {self.loss!r}"
            )
        if not 0 < self.contrast_temperature < math.inf:
            raise ValueError(
                f"sal.contrast_temperature must be a finite number > 0, got "
                f"{self.contrast_temperature}"
            )
        for name in ("variance", "covariance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"sal.{name} is a weight and must be finite and >= 0, got {getattr(self, name)}"
                )
        if self.t_la is not None and not 0 < self.t_la <= 1:
            raise ValueError(f"sal.t_la is a fraction of the scan in (0, 1], got {self.t_la}")
        # The public losses check ω, λ, t and τ: let them do so before anything is loaded.
        SALLoss(self.window_size, lambda_=self.lambda_, t=self.t, temperature=self.temperature)

    @property
    def spreads(self) -> bool:
        """Whether a term of VICReg takes part."""
        return bool(self.variance or self.covariance)

    @property
    def near(self) -> float:
        """Threshold of LA, as a fraction of the scan."""
        return self.t if self.t_la is None else self.t_la


class SAL(Method):
    """Encoder, embedding E for LA at scale s, projection for GP at the deepest scale (Eq. 3)."""

    label: ClassVar[str] = "SAL"
    Settings: ClassVar[type[Any]] = SALConfig
    geometry: ClassVar[Geometry] = "shared"  # or a window no longer shows the same anatomy
    positional: ClassVar[bool] = True
    watched: ClassVar[str] = "la_control"
    curves: ClassVar[tuple[str, dict[str, str]]] = (
        "losses",
        {"loss": "total", "gp": "GP", "contrast": "LA, as a contrast"}
        | {"variance": "variance", "covariance": "covariance"},
    )

    def __init__(self, model: UNetConfig, settings: SALConfig, corpus: Corpus | None) -> None:
        super().__init__()
        if settings.scale > model.depth:
            raise ValueError(
                f"sal.scale is {settings.scale}, but the encoder has {model.depth} levels; "
                f"use a scale of 1 to {model.depth}"
            )
        self.settings = settings
        self.encoder = Encoder(model)
        channels = model.channels[settings.scale - 1]
        self.embedding = Embedding(settings.embedding, channels, settings.embedding_dim or channels)
        self.projection = Projection(
            model.channels[-1], settings.projection_dim, hidden=settings.projection == "mlp"
        )

    @classmethod
    def check(cls, settings: SALConfig, run: Run) -> None:
        side = run.crop // 2 ** (settings.scale - 1)
        if settings.common_frame and run.augment.elastic:
            raise ValueError(
                "sal.common_frame undoes affine transforms only, but augment.elastic is "
                f"{run.augment.elastic}; set one of them to its default"
            )
        if settings.window_size > side:
            raise ValueError(
                f"sal.window_size {settings.window_size} is larger than the {side} x {side} map of "
                f"scale {settings.scale} at crop {run.crop}"
            )
        if settings.roll and settings.window_size > side // 2:
            raise ValueError(
                f"sal.roll moves keys by {side // 2} pixels, half of the map of scale "
                f"{settings.scale} at crop {run.crop}: windows of {settings.window_size} would "
                f"still overlap with their own place; use a smaller sal.window_size"
            )

    def forward(self, views: Views) -> Outcome:
        settings = self.settings
        maps = self.encoder(views.images)
        features = maps[settings.scale - 1]
        # GP contrasts the samples of all processes; a scan, and so a pair of LA, is on one of them.
        positives = positional_positives(gather(views.position), settings.t)  # on the CPU
        positives = to_device(positives, features.device)
        projected = gather(self.projection(maps[-1]))
        gp = gp_loss(projected, positives, settings.temperature)
        outcome = Outcome(gp, {"loss": gp, "gp": gp, "la": gp.new_zeros(())})
        embedded = self.embedding(features)
        if settings.lambda_:
            pairs, negatives = self.pairs(views), self.negatives(views)
            la = self.align(*self.aligned(embedded, views), pairs, negatives) * share(pairs.sum())
            loss = gp + settings.lambda_ * la
            # A contrast is no distance: curves of it beside those of Eq. 1 would be misread.
            name = "la" if negatives is None else "contrast"
            outcome = Outcome(loss, {"loss": loss, "gp": gp, name: la})
        if settings.spreads:
            # Of this batch's own pixels: those of several processes are too many to gather.
            variance, covariance = variance_covariance(embedded)
            outcome.loss = (
                outcome.loss + settings.variance * variance + settings.covariance * covariance
            )
            outcome.terms |= {"loss": outcome.loss, "variance": variance, "covariance": covariance}
        outcome.maps = {"encoder": features.detach(), "embedding": embedded.detach()}
        outcome.deepest = maps[-1].detach()
        outcome.chance = {"gp": gp_loss(alike(projected), positives, settings.temperature)}
        return outcome

    @property
    def leaves_parameters_out(self) -> bool:
        return self.settings.lambda_ == 0 and not self.settings.spreads  # E

    def aligned(self, embedded: Tensor, views: Views) -> tuple[Tensor, Tensor | None]:
        """What LA compares: maps (2n, C, H, W) after E, centred and brought into one frame.

        And which of their pixels (2n, H, W) the views show; None: all.
        """
        features = centred(embedded, self.settings.centre, self.settings.window_size)
        if not self.settings.common_frame:
            return features, None
        assert views.frame is not None  # all views of this package have one
        return undo(features, views.frame), shown(views.frame, *features.shape[2:])

    def align(
        self,
        features: Tensor,
        valid: Tensor | None,
        pairs: Tensor,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """LA of comparable maps (2n, C, H, W) and their valid pixels over pairs (2n, 2n).

        With negatives (2n, 2n) as a contrast.
        """
        settings = self.settings
        if negatives is None:
            return alignment(
                features,
                valid,
                pairs,
                settings.window_size,
                stop_gradient=settings.stop_gradient,
                roll=settings.roll,
            )
        return contrast(
            features,
            valid,
            pairs,
            negatives & ~pairs,
            settings.window_size,
            settings.contrast_temperature,
            stop_gradient=settings.stop_gradient,
            roll=settings.roll,
        )

    def pairs(self, views: Views) -> Tensor:
        """(2n, 2n) bool, the pairs of LA."""
        if self.settings.pairs == "other":
            return self.strangers(views)
        near = self.neighbours(views)
        if self.settings.pairs == "same":
            return near & (views.sample[:, None] == views.sample[None, :])
        return near

    def neighbours(self, views: Views) -> Tensor:
        """(2n, 2n) bool, slices of one scan that are near each other."""
        return slice_pairs(views.volume, views.slice_index, views.num_slices, self.settings.near)

    def strangers(self, views: Views) -> Tensor:
        """(2n, 2n) bool, slices of different scans at near positions."""
        near = positional_positives(views.position, self.settings.near)
        return near & (views.volume[:, None] != views.volume[None, :])

    def negatives(self, views: Views) -> Tensor | None:
        """(2n, 2n) bool, slices at other levels of any scan, which LA contrasts; None: it does not.

        Of several processes each contrasts its own slices, as LA compares its own.
        """
        if self.settings.loss == "mae":
            return None
        far = max(self.settings.t, self.settings.near)
        return ~positional_positives(views.position, far)

    @torch.no_grad()
    def monitor(self, views: Views, outcome: Outcome) -> dict[str, float]:
        """LA on true pairs and, as a control, on pairs of different scans; how alike pixels are.

        A placebo is watched as the paper's loss is, on what it does not train: near slices of one
        scan, keys in their place. So the figures of all arms are of the same thing.
        """
        neighbours, strangers = self.neighbours(views), self.strangers(views)
        window = self.settings.window_size
        embedded = centred(outcome.maps["embedding"], self.settings.centre, window)
        features, valid = self.aligned(outcome.maps["embedding"], views)
        return {
            "la_pairs": wla_set_loss(features, neighbours, window, valid=valid).item(),
            "la_control": wla_set_loss(features, strangers, window, valid=valid).item(),
            **likeness({"embedding": embedded, "encoder": outcome.maps["encoder"]}),
            **chances(outcome),
            **self._chance_of_contrast(features, valid, views),
            **retrieval(outcome, views),
        }

    def _chance_of_contrast(
        self, features: Tensor, valid: Tensor | None, views: Views
    ) -> dict[str, float]:
        """What the contrast comes to where all pixels are alike."""
        negatives = self.negatives(views)
        if negatives is None or self.settings.lambda_ == 0:
            return {}
        flat = torch.ones_like(features[:, :1])
        return {
            "chance_contrast": self.align(flat, valid, self.pairs(views), negatives).item(),
        }

    def warnings(self, history: list[dict[str, float]]) -> dict[str, str]:
        found = drift(history)
        if not history or self.settings.lambda_ == 0:
            return found
        first, last = history[0], history[-1]
        advice = "try a smaller sal.lambda_"
        if self.settings.embedding == "linear":
            advice = "try sal.embedding=orthogonal or none, or a smaller sal.lambda_"
        for what in ("embedding", "encoder"):
            if last[f"cosine_{what}"] > COSINE_LIMIT:
                found[f"collapsed {what}"] = (
                    f"the {what}'s pixels have collapsed to one direction (mean cosine "
                    f"{last[f'cosine_{what}']:.2f} > {COSINE_LIMIT}): a low LA no longer means "
                    f"alignment; {advice}"
                )
            rank = last.get(f"rank_{what}", RANK_LIMIT)
            if rank < RANK_LIMIT and last[f"cosine_{what}"] <= COSINE_LIMIT:
                found[f"flat {what}"] = (
                    f"the {what}'s pixels have collapsed to one line with two signs (effective "
                    f"rank {rank:.2f} < {RANK_LIMIT}, which their mean cosine does not show): a "
                    f"low LA no longer means alignment; {advice}"
                )
        if all(last[key] < FALL * first[key] for key in ("la_control", "la_pairs")):
            found["control falls"] = (
                f"LA on slices of different scans fell from {first['la_control']:.3f} to "
                f"{last['la_control']:.3f} along with LA on true pairs ({first['la_pairs']:.3f} "
                f"to {last['la_pairs']:.3f}): features grow alike everywhere; {advice}"
            )
        return found


def alignment(
    features: Tensor,
    valid: Tensor | None,
    pairs: Tensor,
    window_size: int,
    *,
    stop_gradient: bool = False,
    roll: bool = False,
) -> Tensor:
    """LA over pairs (S, S) of features (S, C, H, W) at valid pixels (S, H, W); 0 without any.

    The pairs are best on the CPU, as those of a batch are.

    stop_gradient: keys get no gradient. roll: keys are rolled by half a map.
    """
    if not roll:
        return wla_set_loss(features, pairs, window_size, detach_keys=stop_gradient, valid=valid)
    both = None if valid is None else (valid, rolled(valid))
    return wla_set_loss(
        features,
        pairs,
        window_size,
        keys=rolled(features),
        detach_keys=stop_gradient,
        valid=both,
    )


def contrast(
    features: Tensor,
    valid: Tensor | None,
    pairs: Tensor,
    negatives: Tensor,
    window_size: int,
    temperature: float,
    *,
    stop_gradient: bool = False,
    roll: bool = False,
) -> Tensor:
    """`alignment` as a contrast with negatives (S, S), which are keys as the pairs' are."""
    if not (stop_gradient or roll):
        return wla_contrast(features, pairs, negatives, window_size, temperature, valid=valid)
    keys = features.detach() if stop_gradient else features
    both = None if valid is None else (valid, rolled(valid) if roll else valid)
    return wla_contrast(
        features,
        pairs,
        negatives,
        window_size,
        temperature,
        keys=rolled(keys) if roll else keys,
        valid=both,
    )


def rolled(maps: Tensor) -> Tensor:
    """Maps (..., H, W) moved by half of each side, round the edges."""
    height, width = maps.shape[-2:]
    return maps.roll((height // 2, width // 2), dims=(-2, -1))


def centred(features: Tensor, centre: Centre, window_size: int) -> Tensor:
    """Features (S, C, H, W) less their mean over the batch, each image or each window.

    Means are in fp32: one rounded to bf16 would leave all pixels a direction in common.
    """
    if centre == "none":
        return features
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    if centre == "batch":
        means = wide.mean(dim=(0, 2, 3), keepdim=True)
    elif centre == "image":
        means = wide.mean(dim=(2, 3), keepdim=True)
    else:
        height, width = features.shape[2:]
        # ceil_mode: windows at the edges are as small as those of the loss.
        pooled = F.avg_pool2d(wide, window_size, ceil_mode=True)
        spread = pooled.repeat_interleave(window_size, 2).repeat_interleave(window_size, 3)
        means = spread[:, :, :height, :width]
    return (wide - means).to(features.dtype)
