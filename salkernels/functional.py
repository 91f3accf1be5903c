"""The public functions: validate, select a backend, call the operator, reduce.

Letters: B pairs, S samples, C channels, H and W the feature map, D embedding dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends as _backends
from .backends import BackendStatus
from .checks import (
    WindowSize,
    check_embeddings,
    check_features,
    check_finite_number,
    check_pairs,
    check_positives,
    check_reduction,
    check_same_kind,
    check_same_shape,
    check_window,
    values_visible,
)
from .library import pair_losses, without_autocast
from .pairs import positional_positives, slice_pairs

EPS = 1e-12


def wla_loss(
    x: Tensor,
    y: Tensor,
    window_size: WindowSize,
    *,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    r"""Window-based local alignment loss between maps of two slices (paper, Sec. 2.2 and Eq. 1).

    .. math:: L(x, y) = \frac{1}{HW} \sum_p \Bigl| 1 - \max_{l \in \omega(p)} \cos(x_p, y_l) \Bigr|

    Each pixel p of `x` is matched with the most similar pixel of `y` in the same window; windows
    tile the plane and are smaller at the edge where they do not divide it. The gradient goes to the
    matched pixels only; among equals the first one, row by row, is the match. Equal as computed,
    that is: on constant regions rounding may set products of identical vectors apart.

    Args:
        x: (B, C, H, W) feature maps, not yet normalised; any strides; fp16, bf16, fp32 or fp64.
        y: (B, C, H, W) maps of the partner slices.
        window_size: ω, in pixels of the feature map: an integer or (rows, columns).
        reduction: "mean" over the pairs, or "none".
        eps: lower bound of a vector's norm; a vector at or below it gets no gradient.
        backend: name from `salkernels.backends()`, or None to take the first that can run.

    Returns:
        The mean loss, a scalar (0 for an empty batch), or (B,) for "none"; fp32, or fp64 for fp64.

    Raises:
        ValueError: shapes or devices differ, the window is smaller than 1 or larger than the map.
        TypeError: a dtype is not floating point, or the dtypes differ.
        RuntimeError: the named backend cannot run this input.
    """
    x, y = _check_pairwise(x, y)
    window = check_window(window_size, x.shape[2], x.shape[3])
    check_reduction(reduction)
    loss, _, _ = _pairwise(x, y, window, eps, backend)
    if reduction == "none":
        return loss.reshape(-1)
    return loss.mean() if loss.shape[0] > 0 else loss.sum()


def la_loss(
    x: Tensor,
    y: Tensor,
    *,
    reduction: str = "mean",
    eps: float = EPS,
    backend: str | None = None,
) -> Tensor:
    """Local alignment loss without windows: every pixel may match any other (paper, Eq. 1).

    The same as `wla_loss` with one window over the whole map; arguments and errors as there.
    """
    x = check_features("x", x)
    return wla_loss(x, y, (x.shape[2], x.shape[3]), reduction=reduction, eps=eps, backend=backend)


def wla_set_loss(
    features: Tensor,
    pairs: Tensor,
    window_size: WindowSize,
    *,
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
            `slice_pairs`. It may live on the CPU while the features are on a GPU; weights on a
            GPU are not checked, since that would synchronise.
        window_size: ω, as in `wla_loss`.
        reduction: "mean" weighted by `pairs`, or "none".
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        A scalar (0 with zero gradient if there is no pair), or for "none" the (S, S) losses,
        0 where there is no pair.

    Raises:
        ValueError, TypeError, RuntimeError: as `wla_loss`, and for `pairs` of a wrong shape or
            dtype, or with a negative weight.
    """
    features = check_features("features", features)
    pairs = check_pairs(pairs, features.shape[0])
    window = check_window(window_size, features.shape[2], features.shape[3])
    check_reduction(reduction)
    check_finite_number("eps", eps, above=0.0)
    name = _backends.select(backend, features, None, window)
    mask = pairs if pairs.dtype == torch.bool else pairs > 0
    # Room for as many pairs as there are, if counting them costs nothing; else for all.
    counted = values_visible(mask)
    capacity = int(mask.count_nonzero()) if counted else mask.numel()
    # Asynchronous to a GPU only: from one, values could be read before they arrive.
    to_gpu = pairs.is_cpu
    if mask.device != features.device:
        mask = mask.to(features.device, non_blocking=to_gpu)
    loss, *_ = pair_losses(
        features.unsqueeze(0), None, mask.unsqueeze(0), window, eps, capacity, name
    )
    if reduction == "none":
        return loss.squeeze(0)
    if counted and pairs.dtype == torch.bool:
        return loss.sum() / max(1, capacity)
    # Shares are taken in the weights' own precision: a small weight must not vanish in fp32.
    weights = pairs.to(loss.device, non_blocking=to_gpu)
    weights = weights.to(torch.promote_types(weights.dtype, loss.dtype))
    total = weights.sum()
    shares = weights / torch.where(total > 0, total, 1)
    return (shares.to(loss.dtype) * loss.squeeze(0)).sum()


@torch.no_grad()
def align(
    x: Tensor,
    y: Tensor,
    window_size: WindowSize,
    *,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What matched what: for each pixel of `x` its best match in the same window of `y`.

    Args:
        x: (B, C, H, W) feature maps.
        y: (B, C, H, W) feature maps of the partner slices.
        window_size: ω = (rows, columns) or an integer, as in `wla_loss`.
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        `max_sim` (B, H, W), the cosine similarity with the match; and `argmax` (B, H, W) int64,
        the offset of the match in its window, `offset // columns` rows and `offset % columns`
        columns from the window's first pixel. Neither carries gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as `wla_loss`.
    """
    x, y = _check_pairwise(x, y)
    window = check_window(window_size, x.shape[2], x.shape[3])
    _, argmax, max_sim = _pairwise(x, y, window, eps, backend)
    return max_sim, argmax.long()


def gp_loss(embeddings: Tensor, positives: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Global positional contrastive loss (paper, Eq. 2; the first term of Eq. 3).

    .. math:: L_i = -\frac{1}{|P_i|} \sum_{j \in P_i}
        \log \frac{e^{\cos(f_i, f_j)/\tau}}{\sum_{q \ne i} e^{\cos(f_i, f_q)/\tau}}

    averaged over the samples i that have a positive.

    Args:
        embeddings: (S, D) global features f, not yet normalised.
        positives: (S, S) bool, row i holds P_i; the diagonal is ignored. See
            `positional_positives`.
        temperature: τ > 0.

    Returns:
        A scalar, fp32 (fp64 for fp64); 0 with zero gradient if no sample has a positive.

    Raises:
        ValueError: wrong shapes, or `temperature` not positive.
        TypeError: `embeddings` not floating point, or `positives` not bool.
    """
    embeddings = check_embeddings(embeddings)
    positives = check_positives(positives, embeddings.shape[0])
    check_finite_number("temperature", temperature, above=0.0)
    # fp32 at least, whatever the input and the autocast state: exp(cos/τ) overflows in half.
    with without_autocast(embeddings.device.type):
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        # As for features, a vector at or below EPS gets no gradient, where F.normalize gives 1/EPS.
        unit = torch.where(norm <= EPS, 0, wide / norm.clamp_min(EPS))
        logits = unit @ unit.T / temperature
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        positives = positives.to(unit.device) & ~itself
        # The lowest finite number, not -inf: with one sample a row of -inf would be NaN.
        log_prob = logits.masked_fill(itself, torch.finfo(logits.dtype).min).log_softmax(dim=1)
        count = positives.sum(dim=1)
        per_sample = -torch.where(positives, log_prob, 0).sum(dim=1) / count.clamp_min(1)
        return per_sample.sum() / (count > 0).sum().clamp_min(1)


class SALTerms(NamedTuple):
    """The SAL loss and the two terms it is made of."""

    loss: Tensor
    gp: Tensor
    la: Tensor


def sal_loss(
    features: Tensor,
    embeddings: Tensor,
    volume: Tensor,
    index: Tensor,
    num_slices: Tensor,
    window_size: WindowSize,
    *,
    lambda_: float = 1.0,
    t: float = 0.35,
    temperature: float = 0.1,
    eps: float = EPS,
    backend: str | None = None,
) -> SALTerms:
    r"""The whole objective of SAL (paper, Eq. 3): GP over all samples + λ · LA over slice pairs.

    Args:
        features: (S, C, H, W) maps after the embedding layer E, for LA.
        embeddings: (S, D) projected global features, for GP.
        volume: (S,) integers, the scan of each sample.
        index: (S,) integers, the slice's index in its scan.
        num_slices: (S,) integers, the number of slices of that scan.
        window_size: ω of the LA term.
        lambda_: λ >= 0; 0 leaves LA out, which is the loss of PCL.
        t: threshold of both terms, a fraction of the scan.
        temperature: τ of the GP term.
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        `SALTerms(loss, gp, la)`, scalars.

    Raises:
        ValueError, TypeError, RuntimeError: as `gp_loss`, `wla_set_loss` and `slice_pairs`, and
            for a negative `lambda_`.
    """
    check_finite_number("lambda_", lambda_, above=0.0, inclusive=True)
    pairs = slice_pairs(volume, index, num_slices, t)
    position = index.double() / num_slices
    gp = gp_loss(embeddings, positional_positives(position, t), temperature)
    if lambda_ == 0:
        return SALTerms(gp, gp, gp.new_zeros(()))
    la = wla_set_loss(features, pairs, window_size, eps=eps, backend=backend)
    return SALTerms(gp + lambda_ * la, gp, la)


def backends() -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference, and why one cannot run on this machine."""
    return _backends.statuses()


def explain(
    x: Tensor, y: Tensor | None = None, window_size: WindowSize = 1
) -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference for this input, and why one cannot run it.

    Args:
        x: (B, C, H, W) feature maps, as given to a loss.
        y: the partners for the pairwise losses; None for `wla_set_loss`.
        window_size: ω.

    Returns:
        One `BackendStatus` each; the first available one is what `backend=None` takes.
    """
    x = check_features("x", x)
    if y is not None:
        x, y = _check_pairwise(x, y)
    return _backends.statuses_for(x, y, check_window(window_size, x.shape[2], x.shape[3]))


def _check_pairwise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_features("x", x), check_features("y", y)
    check_same_shape("x", x, "y", y)
    check_same_kind("x", x, "y", y)
    return x, y


def _pairwise(
    x: Tensor, y: Tensor, window: tuple[int, int], eps: float, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs as groups of one query and one key: loss (B, 1, 1), argmax and max_sim (B, H, W)."""
    check_finite_number("eps", eps, above=0.0)
    name = _backends.select(backend, x, y, window)
    # Views whose gradients are views: indexing would copy into zeros on the way back.
    loss, argmax, max_sim, _ = pair_losses(
        x.unsqueeze(1), y.unsqueeze(1), None, window, eps, x.shape[0], name
    )
    return loss, argmax, max_sim
