"""The shared table of inputs, and a slow oracle that says what each must give.

The oracle is written from the definitions in the paper, pixel by pixel, in Python floats: it
shares no code and no idea with the package.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One input: S samples for the set form, the same number of pairs for the pairwise form."""

    name: str
    samples: int = 3
    channels: int = 5
    height: int = 6
    width: int = 7
    window: tuple[int, int] = (2, 2)
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    mask: str = "others"
    eps: float = EPS
    draw: int = 0  # another draw, where the first has a match that hangs on rounding

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.samples, self.channels, self.height, self.width

    def features(self, device: torch.device | str = "cpu", stream: int = 0) -> Tensor:
        """(S, C, H, W) in the layout, a leaf that requires a gradient."""
        generator = torch.Generator().manual_seed(
            zlib.crc32(self.name.encode()) + 10 * self.draw + stream
        )
        values = torch.randn(self.shape, generator=generator, dtype=F64)
        values = values.to(self.dtype).to(device)
        # The partners of an expanded map are ordinary ones, or all pairs would be equal.
        layout = "contiguous" if self.layout == "expanded" and stream else self.layout
        return lay_out(values, layout).requires_grad_()

    def pairs(self, device: torch.device | str = "cpu") -> Tensor:
        """(S, S) bool."""
        return MASKS[self.mask](self.samples).to(device)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in other strides: no copy of them is contiguous."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":  # width and height swapped in memory
        return x.mT.contiguous().mT
    if layout == "strided":  # every second element of each axis of a larger tensor full of NaN
        big = x.new_full([2 * n + 1 for n in x.shape], torch.nan)
        view = big[1::2, 1::2, 1::2, 1::2]
        return view.copy_(x)
    if layout == "cropped":  # a window into a larger map, as after padding
        samples, channels, height, width = x.shape
        big = x.new_full((samples + 1, channels, height + 3, width + 2), torch.nan)
        return big[1:, :, 2:-1, 1:-1].copy_(x)
    if layout == "batch_inside":  # the samples are the fastest axis
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if layout == "expanded":  # all samples are one, with stride 0
        return x[:1].expand(x.shape)
    raise ValueError(layout)


def _others(samples: int) -> Tensor:
    return ~torch.eye(samples, dtype=torch.bool)


def _band(samples: int) -> Tensor:
    """Not symmetric: each sample queries the next two."""
    all_pairs = torch.ones(samples, samples, dtype=torch.bool)
    return all_pairs.triu(1) & all_pairs.tril(2)


def _holes(samples: int) -> Tensor:
    """Row 0 and column 1 are empty, the rest is full with its diagonal."""
    mask = torch.ones(samples, samples, dtype=torch.bool)
    mask[0] = False
    mask[:, 1] = False
    return mask


def _one(samples: int) -> Tensor:
    mask = torch.zeros(samples, samples, dtype=torch.bool)
    mask[-1, 0] = True
    return mask


MASKS = {
    "others": _others,
    "all": lambda samples: torch.ones(samples, samples, dtype=torch.bool),
    "diagonal": lambda samples: torch.eye(samples, dtype=torch.bool),
    "band": _band,
    "holes": _holes,
    "one": _one,
    "none": lambda samples: torch.zeros(samples, samples, dtype=torch.bool),
}

CASES = [
    Case("work shape, small", samples=6, channels=16, height=8, width=8, draw=2),
    # windows against the map
    Case("window of one pixel", height=5, window=(1, 1)),
    Case("window of one row", window=(1, 3)),
    Case("window of one column", window=(3, 1)),
    Case("one pixel", height=1, width=1, window=(1, 1)),
    Case("one row", height=1, width=11, window=(1, 4)),
    Case("one column", height=11, width=1, window=(4, 1)),
    Case("map one below two windows", height=7, width=7, window=(4, 4)),
    Case("map of two windows", height=8, width=8, window=(4, 4)),
    Case("map one above two windows", height=9, width=9, window=(4, 4)),
    Case("window one below the map", height=7, width=6, window=(6, 5)),
    Case("window is the map", height=7, width=6, window=(7, 6)),
    Case("ragged in rows only", height=7, width=6, window=(3, 2)),
    Case("ragged in columns only", height=6, width=7, window=(2, 3)),
    Case("primes", height=13, width=11, window=(5, 7)),
    Case("full map of primes", samples=2, height=13, width=11, window=(13, 11)),
    Case("255 pixels in a window", samples=2, height=18, width=15, window=(17, 15)),
    Case("256 pixels in a window", samples=2, height=17, width=16, window=(16, 16)),
    # channels and samples
    Case("3 channels", channels=3),
    Case("33 channels", channels=33),
    Case("129 channels", samples=2, channels=129),
    Case("one sample with itself", samples=1, mask="all"),
    Case("two samples", samples=2),
    Case("17 samples", samples=17, height=3, width=4, mask="band"),
    # masks of the set form
    Case("diagonal too", samples=4, mask="all"),
    Case("diagonal only", mask="diagonal"),
    Case("a band", samples=6, mask="band"),
    Case("an empty row and column", samples=5, mask="holes"),
    Case("one pair", samples=5, mask="one"),
    Case("no pair", mask="none"),
    # a norm below eps: about a third of the vectors
    Case("short vectors", channels=3, eps=1.2),
    # dtypes and layouts
    *(Case(f"{dtype}".removeprefix("torch."), dtype=dtype) for dtype in (F64, BF16, F16)),
    Case("float64, ragged full map", height=7, window=(6, 7), dtype=F64, mask="holes"),
    *(
        Case(f"{layout}, {dtype}".replace("torch.", ""), window=(3, 2), layout=layout, dtype=dtype)
        for layout in (
            "channels_last",
            "transposed",
            "strided",
            "cropped",
            "batch_inside",
            "expanded",
        )
        for dtype in (F32, BF16)
    ),
]


class Expected(NamedTuple):
    """One pair by the oracle."""

    loss: Tensor  # scalar, float64, with its gradient: the mean over the pixels that take part
    max_sim: Tensor  # (H, W), with its gradient; 1 where a pixel takes no part
    argmax: Tensor  # (H, W), offset in the window; −1 there
    margin: Tensor  # (H, W), lead of the best over the second best; infinite there


def oracle(
    x: Tensor,
    y: Tensor,
    window: tuple[int, int],
    eps: float = EPS,
    valid: tuple[Tensor, Tensor] | None = None,
) -> Expected:
    """Eq. (1), window by window: x and y are (C, H, W) in float64, `valid` (H, W) each."""
    _, height, width = x.shape
    everywhere = torch.ones(height, width, dtype=torch.bool)
    valid_x, valid_y = (everywhere, everywhere) if valid is None else valid
    queries, keys = _unit_vectors(x, eps), _unit_vectors(y, eps)
    query_floats = {place: vector.tolist() for place, vector in queries.items()}
    key_floats = {place: vector.tolist() for place, vector in keys.items()}
    maxima, margin = [x.new_ones(())] * (height * width), torch.full_like(x[0].detach(), torch.inf)
    argmax = torch.full((height, width), -1)
    for i in range(height):
        for j in range(width):
            if not valid_x[i, j]:
                continue
            top, left = i - i % window[0], j - j % window[1]
            best, second, match = -math.inf, -math.inf, (top, left)
            for a in range(top, min(top + window[0], height)):
                for b in range(left, min(left + window[1], width)):
                    if not valid_y[a, b]:
                        continue
                    pairs = zip(query_floats[i, j], key_floats[a, b], strict=True)
                    sim = math.fsum(u * v for u, v in pairs)
                    if sim > best:  # among equals the first stays
                        best, second, match = sim, best, (a, b)
                    else:
                        second = max(second, sim)
            if best == -math.inf:
                continue
            maxima[i * width + j] = (queries[i, j] * keys[match]).sum()
            margin[i, j] = best - second
            argmax[i, j] = (match[0] - top) * window[1] + match[1] - left
    max_sim = torch.stack(maxima).view(height, width)
    loss = (1 - max_sim).abs().sum() / max(1, int((argmax >= 0).sum()))
    return Expected(loss, max_sim, argmax, margin)


def _unit_vectors(x: Tensor, eps: float) -> dict[tuple[int, int], Tensor]:
    """x / max(norm, eps) of each pixel; a vector at or below eps carries no gradient."""
    units = {}
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            vector = x[:, i, j]
            norm = vector.square().sum().sqrt()
            units[i, j] = (vector / eps).detach() if norm.item() <= eps else vector / norm
    return units


def gp_oracle(embeddings: list[list[float]], positives: list[list[bool]], tau: float) -> float:
    """Eq. (2), averaged over the samples that have a positive; a double loop over floats."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = math.fsum(u * v for u, v in zip(a, b, strict=True))
        return dot / max(math.hypot(*a), EPS) / max(math.hypot(*b), EPS)

    samples = range(len(embeddings))
    losses = []
    for i in samples:
        sim = [math.exp(cosine(embeddings[i], embeddings[q]) / tau) for q in samples]
        others = math.fsum(sim[q] for q in samples if q != i)
        partners = [j for j in samples if j != i and positives[i][j]]
        if partners:
            losses.append(-sum(math.log(sim[j] / others) for j in partners) / len(partners))
    return math.fsum(losses) / max(1, len(losses))
