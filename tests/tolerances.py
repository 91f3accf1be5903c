"""The one table of tolerances: how far a result may be from the right one, and why.

The oracle and the definition in fp64 see the same values as the backend (a bf16 input is widened,
not redrawn), and the gradient tests scale the upstream gradient so that gradients are of order one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    value: float  # absolute, of a loss: it is of order one, and a mean over pixels
    similarity: float  # absolute, of one similarity
    element: float  # of a gradient element, as a share of its own size
    floor: float  # of a gradient element, as a share of the largest one
    relative_l2: float  # of the gradient as a vector
    cosine: float  # 1 - cosine between the gradients
    bias: float  # signed mean error, as a share of the mean size
    margin: float  # a match is decided by rounding where the best two are closer than this
    reason: str


TOLERANCES = {
    torch.float64: Tolerance(
        value=1e-13,
        similarity=1e-13,
        element=1e-9,
        floor=1e-12,
        relative_l2=1e-11,
        cosine=1e-14,
        bias=1e-11,
        margin=1e-12,
        reason="fp64 throughout: a few hundred roundings of 1e-16, times 1 / the smallest norm",
    ),
    torch.float32: Tolerance(
        value=1e-6,
        similarity=2e-6,
        element=1e-3,
        floor=3e-6,
        relative_l2=3e-6,
        cosine=1e-10,
        bias=3e-6,
        margin=1e-5,
        reason="fp32 sums over C <= 129 channels: about 1e-7 each, and tf32x3 is close to that; "
        "an element far below the largest is a difference of two large ones, hence the floor",
    ),
    torch.bfloat16: Tolerance(
        value=1e-6,
        similarity=2e-6,
        element=2**-8,
        floor=1e-4,
        relative_l2=2**-8,
        cosine=2**-17,
        bias=2**-9,
        margin=1e-5,
        reason="the math is fp32 and so is the loss; only the gradient is rounded, to 8 bits",
    ),
    torch.float16: Tolerance(
        value=1e-6,
        similarity=2e-6,
        element=2**-10,
        floor=2e-5,
        relative_l2=2**-11,
        cosine=2**-22,
        bias=2**-12,
        margin=1e-5,
        reason="the math is fp32 and so is the loss; only the gradient is rounded, to 11 bits",
    ),
}

# Share of windows in which rounding may choose the match, and the gradient is not compared. The
# cases are drawn at random: more than this means that a test compares less than it seems to.
UNCLEAR_WINDOWS = 0.02

# Of kernels against the definition: ties that rounding decides occur once in about 1,000 matches.
ROUNDED_TIES = 1e-3

# Training in two processes against one, which sums in another order. Differences of 3e-5 were seen
# after four steps, in biases of norms; weights move by 1e-2, and a gradient that is missing or
# counted twice shows in the second loss.
TRAINING_LOSS = 1e-5  # relative
TRAINING_WEIGHT = 1e-4  # absolute
