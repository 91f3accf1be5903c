"""Scans as the network saw them in training, and labels on the scans' own grid.

This file is part of a MONAI bundle and needs MONAI and torch alone. It was written by
salkernels.training.to_bundle.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn.functional import interpolate

GRID = "salkernels_grid"  # entry of an item: the way back


class ToSlicesd(MapTransform):
    """Clips, resamples and scales slices (1, X, Y, Z), and cuts or pads them to (1, size, size, Z).

    spacing: in-plane pixel size of the slices in mm. size: side of the canvas in pixels. clip:
    percentiles of the volume between which values are kept. window: low and high intensity instead.
    """

    def __init__(
        self,
        keys: Sequence[str],
        spacing: float,
        size: int,
        clip: tuple[float, float] = (0.5, 99.5),
        window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(keys)
        self.spacing, self.size, self.clip, self.window = spacing, size, clip, window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        for key in self.key_iterator(found):
            image = found[key]
            pixel = image.pixdim[:2].tolist()
            volume = image.as_tensor()[0].permute(2, 0, 1).double()  # (Z, X, Y)
            low, high = self.window or _percentiles(volume, self.clip)
            plane = [
                max(1, math.floor(n * mm / self.spacing + 0.5))
                for n, mm in zip(volume.shape[1:], pixel, strict=True)
            ]
            slices = _resized(volume.clamp(low, high).float()[:, None], plane)[:, 0].double()
            mean, deviation = slices.mean(), slices.std(unbiased=False)
            if self.window is not None:
                mean = torch.tensor((low + high) / 2)
                deviation = torch.tensor((high - low) / math.sqrt(12))
            slices = (slices - mean) / deviation
            canvas = slices.new_full((len(slices), self.size, self.size), float(slices.min()))
            (rows, columns), (top, left) = _windows(plane, self.size)
            canvas[:, top, left] = slices[:, rows, columns]
            found[GRID] = {"plane": plane, "native": list(volume.shape[1:])}
            found[key] = MetaTensor(canvas.float().permute(1, 2, 0)[None], meta=image.meta)
        return found


class ToLabelsd(MapTransform):
    """Logits (K, size, size, Z) of the slices as labels (1, X, Y, Z) of the scan.

    reference: the entry whose file and affine the labels belong to.
    """

    def __init__(self, keys: Sequence[str], reference: str = "image") -> None:
        super().__init__(keys)
        self.reference = reference

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        found = dict(data)
        grid = found[GRID]
        for key in self.key_iterator(found):
            scores = torch.as_tensor(found[key]).float().permute(3, 0, 1, 2).softmax(dim=1)
            (rows, columns), (top, left) = _windows(grid["plane"], scores.shape[-1])
            labels = []
            for one in scores.cpu():  # slice by slice: at native size they are large
                whole = one.new_zeros((len(one), *grid["plane"]))
                whole[0] = 1  # background outside the canvas
                whole[:, rows, columns] = one[:, top, left]
                labels.append(_resized(whole[None], grid["native"])[0].argmax(dim=0))
            stacked = torch.stack(labels, dim=-1)[None].to(torch.uint8)
            found[key] = MetaTensor(stacked, meta=found[self.reference].meta)
        return found


def _percentiles(volume: Tensor, clip: tuple[float, float]) -> tuple[float, float]:
    """By sorting: torch.quantile takes 16 million values at most."""
    ordered = volume.flatten().sort().values

    def at(percent: float) -> float:
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return float(torch.lerp(ordered[low], ordered[high], place - low))

    return at(clip[0]), at(clip[1])


def _resized(images: Tensor, plane: Sequence[int]) -> Tensor:
    if list(images.shape[2:]) == list(plane):
        return images
    return interpolate(images, list(plane), mode="bilinear", align_corners=False, antialias=True)


def _windows(plane: Sequence[int], size: int) -> Any:
    """What both share: rows and columns in the plane, and in the canvas."""
    inner, outer = [], []
    for extent in plane:
        start = (extent - size) // 2
        first, last = max(0, start), min(extent, start + size)
        inner.append(slice(first, last))
        outer.append(slice(first - start, last - start))
    return inner, outer


class Segment:
    """One item of the data set to its labels."""

    def __init__(
        self, network: Any, inferer: Any, device: torch.device, postprocessing: Any
    ) -> None:
        self.network, self.inferer, self.device = network, inferer, device
        self.postprocessing = postprocessing

    def __call__(self, item: dict[Hashable, Any]) -> None:
        self.network.eval()
        with torch.inference_mode():
            scores = self.inferer(item["image"][None].as_tensor().to(self.device), self.network)
        self.postprocessing({**item, "pred": scores[0]})
