"""A linear probe: how well frozen maps of an encoder tell the classes apart, without fine-tuning.

Ridge regression from the features of every pixel to its class, in closed form, on the labelled
subjects of a fold; 3D Dice on its held-out subjects, as after fine-tuning. It takes seconds where
fine-tuning takes minutes, and nothing in it is random. It is for screening: it tells what a linear
map can read from the encoder, and not how well the encoder starts a U-Net.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ProbeConfig
from .data.cache import VolumeCache
from .data.review import notices
from .device import Device
from .evaluate import BATCH, Scores, evaluate, write_scores
from .finetune import Start, about_labelled
from .identity import for_results
from .inputs import open_dataset, tell
from .locks import sole_use
from .models import Encoder
from .runlog import RunLog

ENDPOINT = "frozen probe"


def probe(config: ProbeConfig) -> Scores:
    """Fits and scores a probe in `config.out`."""
    device = Device.of(config).exact()
    cache = open_dataset(config)
    start = Start.of(config, cache)
    fold, labelled, encoder = start.fold, start.labelled, start.model.encoder
    with sole_use(config.out):
        log = RunLog(config, "probe", device.describe(), start.believed)
        tell(config.out, notices(cache))
        device.to(encoder)
        fitted = fit_probe(
            encoder, cache, labelled, device, ridge=config.ridge, balance=config.balance
        )
        scores = evaluate(fitted, cache, fold.test, device, progress=False)
        about = {
            **about_labelled(config, cache, fold, labelled),
            "endpoint": ENDPOINT,
            "ridge": config.ridge,
            "balance": config.balance,
            "pretraining": start.pretraining and for_results(start.pretraining),
            "identity": log.identity.plain(),
        }
        write_scores(config.out, scores, for_results(about))
        log.close()
    return scores


class LinearProbe(nn.Module):
    """A frozen encoder, and a linear map from the maps of all its levels to class scores.

    Interpolation is linear too, so the scores of each level are enlarged, not its features.
    """

    def __init__(self, encoder: Encoder, weight: Tensor, bias: Tensor) -> None:
        """weight: (C, K), the channels of all levels one after another. bias: (K,)."""
        super().__init__()
        self.encoder, self.bias = encoder, bias
        self.weights = weight.split(encoder.config.channels)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, K, H, W), estimates of which class a pixel is of."""
        maps = self.encoder(images)
        scores = self.bias[:, None, None]
        for level, weight in zip(maps, self.weights, strict=True):
            own = torch.einsum("bchw,ck->bkhw", level, weight)
            scores = scores + enlarged(own, images.shape[-2:])
        return scores


def fit_probe(
    encoder: Encoder,
    cache: VolumeCache,
    subjects: Sequence[str],
    device: Device,
    *,
    ridge: float,
    balance: float,
) -> LinearProbe:
    """The probe of the labelled scans of these subjects; the encoder is left in eval mode."""
    scans = [i for s in subjects for i in cache.of_subject(s) if cache.volumes[i].labelled]
    encoder.eval()
    moments = Moments(sum(encoder.config.channels), cache.info.num_classes, device.device)
    with torch.inference_mode(), device.autocast():
        for scan in scans:
            images = torch.tensor(cache.image(scan))[:, None]
            labels = torch.tensor(cache.label(scan))
            for part, truth in zip(images.split(BATCH), labels.split(BATCH), strict=True):
                part = part.to(device.device, memory_format=torch.channels_last)
                maps = encoder(part)
                for one in range(len(part)):  # all at once would take gigabytes at full scale
                    levels = [enlarged(level[one : one + 1], part.shape[-2:]) for level in maps]
                    features = torch.cat([level[0].flatten(1) for level in levels]).T
                    moments.add(features, truth[one].flatten().to(device.device))
        weight, bias = moments.solve(ridge, balance)
    return LinearProbe(encoder, weight.float(), bias.float()).eval()


class Moments:
    """Sums over the pixels of each class, in double precision: ridge regression in closed form.

    With features x standardised to z, one-hot classes y and a weight w for each pixel, it minimises

        Σ w |y − Wᵀ z − b|² / Σ w + ridge · |W|²

    A pixel of class c weighs N_c^(−balance), N_c being the number of those. All alike (balance 0),
    most pixels being background, nothing but background would be found; at 1, where all classes
    weigh the same, far too much is found beside them.
    """

    def __init__(self, channels: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.counts, self.sums = zeros(classes), zeros(classes, channels)
        self.squares = zeros(classes, channels, channels)
        self.origin: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Features (N, C) of pixels and their labels (N,); pixels without one are left out."""
        if self.origin is None:
            # Squares are summed about a point among the features: less is lost when the mean's
            # square is taken off.
            self.origin = features.double().mean(dim=0)
        for label in range(len(self.counts)):
            x = features[labels == label].double() - self.origin
            self.counts[label] += len(x)
            self.sums[label] += x.sum(dim=0)
            self.squares[label] += x.T @ x

    def solve(self, ridge: float, balance: float) -> tuple[Tensor, Tensor]:
        """Weights (C, K) and bias (K,) for features as they were given."""
        assert self.origin is not None  # there is a labelled scan
        weight = torch.where(self.counts > 0, self.counts.clamp_min(1) ** -balance, 0)
        weight = weight / (weight * self.counts).sum()
        share, sums = weight * self.counts, weight[:, None] * self.sums
        mean = sums.sum(dim=0)
        covariance = torch.einsum("k,kcd->cd", weight, self.squares) - mean.outer(mean)
        variance = covariance.diagonal()
        # A channel that is constant tells nothing, and its deviation is rounding alone.
        constant = variance <= 1e-12 * (self.origin + mean).square().clamp_min(1e-12)
        scale = torch.where(constant, 0, variance.clamp_min(1e-300).rsqrt())
        standard = covariance * scale.outer(scale)
        target = (sums.T - mean.outer(share)) * scale[:, None]
        damped = standard + ridge * torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        found = torch.linalg.solve(damped, target) * scale[:, None]
        return found, share - (self.origin + mean) @ found


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) on the grid of the slices."""
    if list(maps.shape[-2:]) == list(size):
        return maps
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=False)
