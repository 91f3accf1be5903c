"""The public functions: validate, select a backend, call the operator, reduce.

Letters: B pairs, S samples, P pairs of a set, C channels, H and W the feature map, D embedding
dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _short, backends
from ._pair_list import PairList, to_device
from .backends import BackendStatus
from .checks import (
    Column,
    Rows,
    Valid,
    WindowSize,
    check_embeddings,
    check_features,
    check_mask,
    check_number,
    check_reduction,
    check_threshold,
    check_valid_pair,
    check_window,
)
from .library import without_autocast
from .matching import (
    EPS,
    SetInput,
    check_pairwise,
    check_set,
    chosen_backend,
    match_pairwise,
    match_set,
)
from .pairs import near_positions, slice_pairs
from .reference import Outputs, no_match


def wla_loss(
    x: Tensor,
    y: Tensor,
    window_size: WindowSize,
    *,
    valid: Valid = None,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    r"""Window-based local alignment loss between maps of two slices (paper, Sec. 2.2 and Eq. 1).

    .. math:: L(x, y) = \frac{1}{HW} \sum_p \Bigl| 1 - \max_{l \in \omega(p)} \cos(x_p, y_l) \Bigr|

    Each pixel p of `x` is matched with the most similar pixel of `y` in the same window; windows
    tile the plane and are smaller at the edge where they do not divide it. The gradient goes to the
    matched pixels only. If several are equally similar, the first one, row by row, is the match.
    This goes by the computed values: in constant regions, rounding may make products of identical
    vectors differ.

    Args:
        x: (B, C, H, W) feature maps, not yet normalised; any strides; fp16, bf16, fp32 or fp64.
        y: (B, C, H, W) maps of the partner slices.
        window_size: ω, in pixels of the feature map: an integer or (rows, columns).
        valid: (B, H, W) bool for both maps, or a pair of masks, one for each map, where None means
            every pixel. A pixel that is not valid is neither query nor key and gets no gradient,
            whatever its value. The mean of a pair is then over the valid pixels of `x` that have a
            valid pixel of `y` in their window; a pair without any has loss 0 and no weight.
        reduction: "mean" over the pairs, "sum" of their losses, or "none".
        eps: lower bound of a vector's norm; a vector at or below it gets no gradient.
        backend: name from `salkernels.backends()`, or None to take the first that can run.

    Returns:
        The mean or the sum, a scalar (0 for an empty batch), or (B,) for "none"; fp32, or fp64 for
        fp64.

    Raises:
        ValueError: shapes or devices differ, the window is smaller than 1 or larger than the map.
        TypeError: a dtype is not floating point, the dtypes differ, or `valid` is not bool.
        RuntimeError: the named backend cannot run this input.
    """
    key = None
    if valid is None and reduction == "mean":
        key = _short.key_of_pairs(x, y, window_size, eps, backend)
        if key is not None and (known := _short.find(key)) is not None:
            return known(x, y)
    x, y = check_pairwise(x, y)
    window = check_window(window_size, x.shape[2], x.shape[3])
    valid = check_valid_pair(valid, x)
    check_reduction(reduction)
    if key is not None and len(x) > 0:
        name, eps = chosen_backend(x, y, window, eps, backend)
        return _short.Known(name, x, None, window, eps).keep(key)(x, y)
    found = match_pairwise(x, y, valid, window, eps, backend)
    if valid is None:
        return _reduced(found.loss, None, reduction)
    return _reduced(*_mean_over_pixels(found), reduction)


def la_loss(
    x: Tensor,
    y: Tensor,
    *,
    valid: Valid = None,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    """Local alignment loss without windows: every pixel may match any other (paper, Eq. 1).

    The same as `wla_loss` with one window over the whole map, with the same arguments and errors.
    """
    x = check_features("x", x)
    window = (x.shape[2], x.shape[3])
    return wla_loss(x, y, window, valid=valid, reduction=reduction, eps=eps, backend=backend)


def wla_set_loss(
    features: Tensor,
    pairs: Rows,
    window_size: WindowSize,
    *,
    keys: Tensor | None = None,
    detach_keys: bool = False,
    valid: Valid = None,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    r"""Local alignment loss over many pairs from one set of samples (second term of Eq. 3).

    .. math:: L = \sum_{ij} w_{ij} L(x_i, x_j) \Big/ \sum_{ij} w_{ij}

    Each feature is read once, however many pairs it takes part in: nothing is gathered per pair.

    Args:
        features: (S, C, H, W) feature maps of the samples, not yet normalised.
        pairs: (S, S), row i the query and column j the key: bool, or weights >= 0; see
            `slice_pairs`. Or integers (K, 2), a query and a key in each row, in any order; a pair
            that is listed twice counts twice. Best kept on the CPU, even if the features are on a
            GPU: the pairs are then counted without waiting for the GPU, take no more memory than
            they need, and are split into groups if the samples of each scan are adjacent, which is
            many times faster. Weights on a GPU are not checked, since that would synchronise.
            Captured in a CUDA graph, pairs on the CPU need a call with equal ones before, and stay
            what they were at each replay.
            Weights that require a gradient get one, also where they are 0: all S² losses are then
            computed, and a NaN in any of them reaches the result.
        window_size: ω, as in `wla_loss`.
        keys: (M, C, H, W) maps of other samples in which the matches are looked for, such as those
            of a teacher or a memory bank; `pairs` are then (S, M), or pairs of indices into
            `features` and `keys`. None: the samples themselves.
        detach_keys: whether the gradient goes to the queries only: a feature moves towards its
            match, and the match stays.
        valid: (S, H, W) bool, as in `wla_loss`: which pixels of each sample take part. With `keys`
            or `detach_keys` it may be a pair of masks, of the queries and of the keys, where None
            means every pixel.
        reduction: "mean" weighted by `pairs`, "sum" (Σ wL), or "none".
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        A scalar (0 with zero gradient if there is no pair), or for "none" the (S, S) or (S, M)
        losses, 0 where there is no pair; for "none" and indices (K,), in their order.

    Raises:
        ValueError, TypeError, RuntimeError: as `wla_loss`, and for `pairs` of a wrong shape or
            dtype, with a negative weight, or with an index out of range; for pairs on the CPU
            that are new in the capture of a CUDA graph.
    """
    key = None
    if valid is None and keys is None and not detach_keys and reduction == "mean":
        key = _short.key_of_set(features, pairs, window_size, eps, backend)
        if key is not None and (known := _short.find(key)) is not None:
            return known(features)
    given = check_set(features, pairs, keys, detach_keys, valid)
    features = given.features
    window = check_window(window_size, features.shape[2], features.shape[3])
    check_reduction(reduction)
    chosen = _chosen(given)
    if key is not None and chosen.grouped.numel() > 0:
        name, eps = chosen_backend(features, None, window, eps, backend)
        return _short.Known(name, features, chosen, window, eps).keep(key)(features)
    found = match_set(features, chosen, given.valid, window, eps, backend, given.keys)
    loss, taking_part = (found.loss, None) if given.valid is None else _mean_over_pixels(found)
    table = given.pairs
    if table.dtype == torch.int64:
        if taking_part is not None:
            taking_part = chosen.ordered(taking_part)
        return _reduced(chosen.ordered(loss), taking_part, reduction)
    if reduction == "none":
        return chosen.spread(loss, *table.shape)
    if table.dtype == torch.bool:
        if reduction == "sum":
            return loss.sum()  # 0 where room is left over
        if chosen.exact and taking_part is None:
            return _reduced(loss, None, "mean")
    return _weighted(chosen.pick(table), loss, taking_part, reduction)


def gp_loss(embeddings: Tensor, positives: Rows, temperature: float | Tensor = 0.1) -> Tensor:
    r"""Global positional contrastive loss (paper, Eq. 2; the first term of Eq. 3).

    .. math:: L_i = -\frac{1}{|P_i|} \sum_{j \in P_i}
        \log \frac{e^{\cos(f_i, f_j)/\tau}}{\sum_{q \ne i} e^{\cos(f_i, f_q)/\tau}}

    averaged over the samples i that have a positive.

    Args:
        embeddings: (S, D) global features f, not yet normalised.
        positives: (S, S) bool, row i holds P_i; the diagonal is ignored. See
            `positional_positives`.
        temperature: τ > 0, a number, or a tensor of one, which may be learnt.

    Returns:
        A scalar, fp32 (fp64 for fp64); 0 with zero gradient if no sample has a positive.

    Raises:
        ValueError: wrong shapes, or `temperature` not positive.
        TypeError: `embeddings` not floating point, or `positives` not bool.
    """
    embeddings = check_embeddings(embeddings)
    positives = check_mask("positives", positives, len(embeddings), "embeddings")
    temperature = check_number("temperature", temperature, above=0.0)
    # At least fp32, whatever the input and the autocast state: exp(cos/τ) overflows in half.
    with without_autocast(embeddings.device.type):
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        # As for features, a vector at or below EPS gets no gradient, where F.normalize gives 1/EPS.
        unit = torch.where(norm <= EPS, 0, wide / norm.clamp_min(EPS))
        logits = unit @ unit.T / temperature
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        positives = to_device(positives, unit.device) & ~itself
        # The lowest finite number, not -inf: with one sample a row of -inf would be NaN.
        log_prob = logits.masked_fill(itself, torch.finfo(logits.dtype).min).log_softmax(dim=1)
        count = positives.sum(dim=1)
        per_sample = -torch.where(positives, log_prob, 0).sum(dim=1) / count.clamp_min(1)
        return per_sample.sum() / (count > 0).sum().clamp_min(1)


class SALTerms(NamedTuple):
    """The SAL loss and its two terms."""

    loss: Tensor
    gp: Tensor
    la: Tensor


def sal_loss(
    features: Tensor,
    embeddings: Tensor,
    volume: Column,
    index: Column,
    num_slices: Column,
    window_size: WindowSize,
    *,
    detach_keys: bool = False,
    valid: Valid = None,
    lambda_: float | Tensor = 1.0,
    t: float = 0.35,
    temperature: float | Tensor = 0.1,
    eps: float = EPS,
    backend: str | None = None,
) -> SALTerms:
    r"""The whole objective of SAL (paper, Eq. 3): GP over all samples + λ · LA over slice pairs.

    Args:
        features: (S, C, H, W) maps after the embedding layer E, for LA.
        embeddings: (S, D) projected global features, for GP.
        volume: (S,) integers, the scan of each sample; a tensor or a list.
        index: (S,) integers, the slice's index in its scan.
        num_slices: (S,) integers, the number of slices of that scan; one number if all have it.
        window_size: ω of the LA term.
        detach_keys: whether LA moves the queries only, as in `wla_set_loss`.
        valid: (S, H, W) bool, pixels of the maps that take part in LA; as in `wla_set_loss`.
        lambda_: λ >= 0; with 0 LA is left out, which gives the loss of PCL. `features` still gets a
            gradient of zeros, so that λ may start at 0 under DistributedDataParallel. A tensor of
            one number is never left out: it may be learnt, or follow a schedule without `.item()`.
        t: threshold of both terms, a fraction of the scan.
        temperature: τ of the GP term, as in `gp_loss`.
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        `SALTerms(loss, gp, la)`, scalars.

    Raises:
        ValueError, TypeError, RuntimeError: as `gp_loss`, `wla_set_loss` and `slice_pairs`, and
            for a negative `lambda_`.
    """
    lambda_ = check_number("lambda_", lambda_, above=0.0, inclusive=True)
    pairs = slice_pairs(volume, index, num_slices, t)
    gp = gp_loss(embeddings, near_positions(index, num_slices, check_threshold(t)), temperature)
    if not isinstance(lambda_, Tensor) and lambda_ == 0:
        # No pixel is read, and yet the layers before `features` stay part of the graph: parameters
        # that sometimes get no gradient stop distributed training.
        nothing = features[:0].sum().to(gp.dtype)
        return SALTerms(gp + nothing, gp, nothing.detach())
    la = wla_set_loss(
        *(features, pairs, window_size),
        detach_keys=detach_keys,
        valid=valid,
        eps=eps,
        backend=backend,
    )
    return SALTerms(gp + lambda_ * la, gp, la)


def explain(
    x: Tensor, window_size: WindowSize, y: Tensor | None = None
) -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference for this input, with the reason if it cannot run.

    Args:
        x: (B, C, H, W) feature maps, as given to a loss.
        window_size: ω, on which the order depends.
        y: the partners for the pairwise losses; None for `wla_set_loss`.

    Returns:
        One `BackendStatus` each; the first available one is what `backend=None` takes.
    """
    x = check_features("x", x)
    if y is not None:
        x, y = check_pairwise(x, y)
    return backends.statuses_for(x, y, check_window(window_size, x.shape[2], x.shape[3]))


def _chosen(given: SetInput) -> PairList:
    """The pairs whose losses are computed."""
    table = given.pairs
    if table.dtype == torch.int64:
        return given.listed()
    if table.dtype != torch.bool:
        table = torch.ones_like(table, dtype=torch.bool) if table.requires_grad else table > 0
    return PairList.of(table, given.features.device)


def _reduced(loss: Tensor, taking_part: Tensor | None, reduction: str) -> Tensor:
    """Losses (P,) of pairs that count alike, or not at all; None: all count."""
    if reduction == "none":
        return loss
    if reduction == "mean" and taking_part is None and loss.shape[0] > 0:
        return loss.mean()
    total = loss.sum()
    if reduction == "sum" or taking_part is None:
        return total
    return total / taking_part.sum().clamp_min(1)


def _weighted(weights: Tensor, loss: Tensor, taking_part: Tensor | None, reduction: str) -> Tensor:
    """Losses (P,) of pairs with weights (P,): their sum, or mean."""
    # Shares are computed in the weights' own precision: a small weight must not vanish in fp32.
    shares = to_device(weights, loss.device)
    shares = shares.to(torch.promote_types(shares.dtype, loss.dtype))
    if reduction == "mean":
        if taking_part is not None:
            shares = torch.where(taking_part, shares, 0)
        total = shares.sum()
        shares = shares / torch.where(total > 0, total, 1)
    return (shares.to(loss.dtype) * loss).sum()


def _mean_over_pixels(found: Outputs) -> tuple[Tensor, Tensor]:
    """Losses (P,) as means over the pixels that take part, and which pairs have any.

    The operator divides by all H·W.
    """
    count = (found.argmax != no_match(found.argmax.dtype)).sum(dim=(1, 2))
    height, width = found.argmax.shape[1:]
    share = height * width / count.clamp_min(1).to(found.loss.dtype)
    return found.loss * share, count > 0
