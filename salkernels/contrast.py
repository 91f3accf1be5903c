"""The alignment loss with repulsion: a match is to beat the same window of slices not near."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends
from ._pair_list import PairList, to_device
from ._temperature import LEAST_TEMPERATURE, with_temperature
from .checks import (
    Rows,
    Valid,
    WindowSize,
    check_features,
    check_mask,
    check_number,
    check_reduction,
    check_same_kind,
    check_same_shape,
    check_valid,
    check_valid_pair,
    check_window,
    values_visible,
)
from .library_contrast import window_lse
from .matching import EPS, grouped, match_set, reverse_mode_only
from .reference import Outputs, no_match


def wla_contrast(
    features: Tensor,
    positives: Rows,
    negatives: Rows,
    window_size: WindowSize,
    temperature: float | Tensor = 0.1,
    *,
    keys: Tensor | None = None,
    valid: Valid = None,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    r"""Window-based local alignment with repulsion: InfoNCE of the best match in each window.

    .. math:: L_{ij} = \frac{1}{HW} \sum_p -\log \frac{e^{m_{ijp}/\tau}}
        {e^{m_{ijp}/\tau} + \sum_{k \in N_i} \sum_{l \in \omega(p)} e^{\cos(x_{ip}, x_{kl})/\tau}},
        \qquad m_{ijp} = \max_{l \in \omega(p)} \cos(x_{ip}, x_{jl})

    averaged over the pairs (i, j) of `positives`. Where `wla_set_loss` asks of a pixel to have a
    match, this asks that the match beats all pixels of the same window of the samples N of
    `negatives`. Features that are alike everywhere, or tell the place in the picture and nothing
    else, do not bring it down. It is not in the paper.

    The sum over the negatives is one number for each query pixel, which all positives of a sample
    share, and neither it nor its gradient keeps anything for each negative.

    Args:
        features: (S, C, H, W) feature maps of the samples, not yet normalised.
        positives: (S, S) bool, row i the query and column j the key; see `slice_pairs`. Best on the
            CPU, as for `wla_set_loss`.
        negatives: (S, S) bool, row i holds N_i: samples that do not show what sample i shows, such
            as those at other levels of any scan. The diagonal is ignored. A sample without
            negatives has no loss, and counts in the mean.
        window_size: ω, as in `wla_loss`.
        temperature: τ > 0, which divides cosines before the exponential: a number, or a tensor of
            one, which may be learnt (1/1024 < τ; features are then copied, with their norms).
        keys: (S, C, H, W) maps in which matches and negatives are looked for, if they are not
            `features` themselves: `features.detach()`, say, or maps of a momentum encoder.
        valid: (S, H, W) bool, which pixels of each sample take part, as in `wla_set_loss`. With
            `keys` it may be a pair: of the features, and of the keys.
        reduction: "mean" over the pairs, "sum" of their losses, or "none".
        eps: as in `wla_loss`.
        backend: as in `wla_loss`. Where it has no kernel for the negatives (`explain` tells), it
            computes the matches, and `triton`, on GPUs, or `reference` the rest.

    Returns:
        A scalar (0 with zero gradient if there is no pair), or for "none" the (S, S) losses, 0
        where there is no pair; fp32, or fp64 for fp64.

    Raises:
        ValueError: as `wla_set_loss`; a pair is both positive and negative.
        TypeError: as `wla_set_loss`; `positives` or `negatives` is not bool.
        RuntimeError: the named backend cannot run this input; a second derivative is asked for.
    """
    features = check_features("features", features)
    positives = check_mask("positives", positives, len(features))
    negatives = _check_negatives(negatives, positives)
    window = check_window(window_size, features.shape[2], features.shape[3])
    temperature = check_number("temperature", temperature, above=0.0)
    check_reduction(reduction)
    if keys is None:
        valid = check_valid("valid", valid, features)
    else:
        keys = check_features("keys", keys)
        check_same_shape("features", features, "keys", keys)
        check_same_kind("features", features, "keys", keys)
        valid = check_valid_pair(valid, features)  # (S, 2, H, W)
        valid = None if valid is None else valid.transpose(0, 1)

    chosen = PairList.of(positives, features.device)
    found = match_set(features, chosen, valid, window, eps, backend, keys)
    against = PairList.of(negatives, features.device)
    name = backends.select(backend, features, keys, window)
    if isinstance(temperature, Tensor):
        scaled = with_temperature(features, keys, valid, temperature, eps)
        inputs, fixed = grouped(*scaled, against), LEAST_TEMPERATURE
    else:
        inputs, fixed = grouped(features, keys, valid, against), temperature
    lse = reverse_mode_only(window_lse, *inputs, window, fixed, eps, name)
    loss, taking_part = _contrast(found, lse.flatten(0, 1), chosen, temperature, valid is not None)
    if reduction == "none":
        return chosen.spread(loss, len(features))
    if reduction == "sum":
        return loss.sum()
    if taking_part is None:
        return loss.sum() / max(1, len(loss))
    return loss.sum() / taking_part.sum().clamp_min(1)


def _contrast(
    found: Outputs,
    lse: Tensor,  # (S, H, W)
    pairs: PairList,
    temperature: float | Tensor,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (P,) as means over the pixels that take part, and which pairs have any; None: all."""
    places = to_device(pairs.places, lse.device)
    # Not negative where room is left over: such a row takes no part.
    query = places.clamp_min(0) // len(lse) if len(lse) else places
    lead = found.max_sim / temperature - lse[query]  # (P, H, W), +∞ without negatives
    if pairs.exact and not masked:
        return -F.logsigmoid(lead).mean(dim=(1, 2)), None
    present = (found.argmax != no_match(found.argmax.dtype)) & (places >= 0)[:, None, None]
    count = present.sum(dim=(1, 2))
    # As if the match were perfect: a loss of 0 whose derivative is 0, be the log-sum-exp NaN.
    total = -F.logsigmoid(lead.masked_fill(~present, torch.inf)).sum(dim=(1, 2))
    return total / count.clamp_min(1).to(total.dtype), count > 0


def _check_negatives(negatives: object, positives: Tensor) -> Tensor:
    """(S, S) bool without the diagonal."""
    negatives = check_mask("negatives", negatives, len(positives))
    itself = torch.eye(len(positives), dtype=torch.bool, device=negatives.device)
    negatives = negatives & ~itself
    if values_visible(negatives) and values_visible(positives):
        both = int((negatives & positives).sum())
        if both:
            raise ValueError(
                f"a pair must not be both positive and negative, got {both} that are; "
                f"use negatives & ~positives"
            )
    return negatives
