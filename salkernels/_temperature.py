"""A temperature that is a tensor, for an operator that takes it as a number.

`window_lse` divides cosines by τ, and has no derivative in it. Unit vectors with one channel more
move τ into the features, where torch differentiates:

    x' = (a x̂, √(1 − a²‖x̂‖²)),  y' = (y, 0),  a = τ₀/τ,  so that ‖x'‖ = 1, cos(x', y') = a cos(x, y)

and the operator at the fixed τ₀ sums e^{cos(x', y')/τ₀} = e^{cos(x, y)/τ}. It projects gradients to
what is orthogonal to x', which loses nothing: ∂x'/∂a is. Nothing rounds worse than before, since
floating point does not care for the factor a. Keys keep their length, and are left to the operator.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import values_visible
from .library import without_autocast
from .reference import accumulate_dtype

LEAST_TEMPERATURE = 2.0**-10  # τ₀: temperatures that are learnt are bounded far above it


def with_temperature(
    features: Tensor,  # (S, C, H, W)
    keys: Tensor | None,  # (M, C, H, W)
    valid: Tensor | tuple[Tensor, Tensor] | None,  # (S, H, W); with keys also (M, H, W)
    temperature: Tensor,  # ()
    eps: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries (S, C + 1, H, W), keys (M, C + 1, H, W) and what is valid of both."""
    if values_visible(temperature) and not temperature.item() > LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature as a tensor must be > {LEAST_TEMPERATURE:.4g}, got {temperature.item():g}"
        )
    among = cast("tuple[Tensor, Tensor] | None", valid)
    if keys is None:
        keys = features
        own = cast("Tensor | None", valid)
        among = None if own is None else (own, own)
    dtype = accumulate_dtype(features.dtype)
    with without_autocast(features.device.type):
        factor = LEAST_TEMPERATURE / temperature.to(features.device)
        unit = _unit(features, eps)
        length = unit.square().sum(dim=1, keepdim=True)
        rest = (1 - factor.square() * length).sqrt()
        # Longer than eps, whatever that is, or the operator would divide by it.
        queries = torch.cat((factor * unit, rest), dim=1) * (2 * max(1.0, eps))
        others = F.pad(keys.to(dtype), (0, 0, 0, 0, 0, 1))
    return queries, others, among


def _unit(maps: Tensor, eps: float) -> Tensor:
    """x̂ as `salkernels.reference` has it: no gradient at or below eps, NaN where it overflows."""
    wide = maps.to(accumulate_dtype(maps.dtype))
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    norm = torch.where(norm.isinf(), torch.nan, norm)
    return torch.where(norm <= eps, (wide / eps).detach(), wide / norm.clamp_min(eps))
