"""Which of the two backends for GPUs is faster, pass by pass, as it was measured.

On an NVIDIA H100 with cold caches; S = 32, C = 384, 44 x 44 pixels, 272 pairs,
channels-last, unless said otherwise. µs, forward + backward, of benchmarks/results/h100.md:

| features | window | `cuda` | `triton` | first choice |
| --- | --- | --- | --- | --- |
| fp32 | 2 x 2 | 160 + 277 | 116 + 203 | `triton` |
| fp32, C = 128, 24 x 24 | 3, 4, 6 | 147, 160, 254 in all | 156, 145, 268 | `cuda`: a tie |
| 16 bits | 2 x 2 | 64 + 96 | 53 + 132 | `cuda` |
| 16 bits, two scans of 32, 1,024 pairs | 2 x 2 | 114 + 200 | 143 + 401 | `cuda` |
| 16 bits | 3 x 3 | 182 + 194 | 127 + 248 | `triton+cuda` |
| 16 bits | 4 x 4 | 141 + 204 | 89 + 239 | `triton+cuda` |
| 16 bits | 6 x 6 | 408 + 263 | 393 + 302 | `cuda` |
| 16 bits | 11 x 11 | 702 + 591 | 431 + 303 | `triton` |
| 16 bits | 22 x 22 | 840 + 375 | 1399 + 464 | `cuda` |

Ties, and gains of less than a tenth of both passes together, go to `cuda`: it has nothing to
compile at the first call, and costs the host less. The set form alone was measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rule(NamedTuple):
    """Names of backends for features of so many bytes and windows of so many pixels."""

    itemsize: int
    min_pixels: int
    max_pixels: int
    names: str


RULES = (
    Rule(4, 1, 4, "triton"),
    Rule(2, 9, 16, "triton+cuda"),
    Rule(2, 81, 128, "triton"),
)


def fastest(dtype: torch.dtype, window: tuple[int, int]) -> str:
    """The first choice for the set form on a GPU; two names are forward and backward."""
    pixels = window[0] * window[1]
    for rule in RULES:
        if dtype.itemsize == rule.itemsize and rule.min_pixels <= pixels <= rule.max_pixels:
            return rule.names
    return "cuda"
