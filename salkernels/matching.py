"""The matches: which pixel is most similar to which, differentiable in the similarity.

Every loss is built on these. Letters: B pairs, S samples, P pairs of a set, C channels, H and W the
feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from ._dtensor import prepare
from ._pair_list import PairList
from ._torch_private import transforms_active
from .checks import (
    Rows,
    Valid,
    WindowSize,
    check_eps,
    check_features,
    check_integers,
    check_pairs,
    check_same_kind,
    check_same_shape,
    check_tensor,
    check_valid,
    check_valid_each,
    check_valid_pair,
    check_window,
    values_visible,
)
from .library import match
from .reference import Outputs, match_places, no_match

EPS = 1e-12

Result = TypeVar("Result")


class Matches(NamedTuple):
    """The match of each pixel of each pair."""

    max_sim: Tensor  # cosine similarity with the match
    argmax: Tensor  # where the match lies in its window; see `match_pixels`


def align(
    x: Tensor,
    y: Tensor,
    window_size: WindowSize,
    *,
    valid: Valid = None,
    eps: float = EPS,
    backend: str | None = None,
) -> Matches:
    """The best match of each pixel of `x` in the same window of `y`.

    `max_sim` is differentiable, so any function of it can be a loss. `wla_loss` is the mean of
    `|1 - max_sim|`.

    Args:
        x: (B, C, H, W) feature maps.
        y: (B, C, H, W) feature maps of the partner slices.
        window_size: ω = (rows, columns) or an integer, as in `wla_loss`.
        valid: as in `wla_loss`.
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        `Matches(max_sim, argmax)`. `max_sim` (B, H, W), the cosine similarity with the match,
        fp32 or fp64; `argmax` (B, H, W) int64, the offset of the match in its window, which
        `match_pixels` converts to rows and columns. A pixel that takes no part, because it is not
        valid or has no valid pixel in its window, has `max_sim` 1 without gradient and `argmax` −1.

    Raises:
        ValueError, TypeError, RuntimeError: as `wla_loss`.
    """
    x, y = check_pairwise(x, y)
    window = check_window(window_size, x.shape[2], x.shape[3])
    return _matches(match_pairwise(x, y, check_valid_pair(valid, x), window, eps, backend))


def align_set(
    features: Tensor,
    pairs: Rows,
    window_size: WindowSize,
    *,
    keys: Tensor | None = None,
    detach_keys: bool = False,
    valid: Valid = None,
    eps: float = EPS,
    backend: str | None = None,
) -> Matches:
    """The matches of many pairs from one set of samples, or two; each feature is read once.

    Args:
        features: (S, C, H, W) feature maps of the samples.
        pairs: (S, S) bool, row i the query and column j the key, or indices (K, 2) of query and
            key; (S, M) with M `keys`. A table is counted, which waits for the GPU if it is on one
            and costs nothing on the CPU; see `wla_set_loss`.
        window_size: ω, as in `wla_loss`.
        keys: (M, C, H, W), as in `wla_set_loss`.
        detach_keys: as in `wla_set_loss`.
        valid: (S, H, W) bool, or a pair of masks, as in `wla_set_loss`.
        eps: as in `wla_loss`.
        backend: as in `wla_loss`.

    Returns:
        `Matches(max_sim, argmax)`, (P, H, W) each, as from `align`: one row for each pair, in the
        order of `pairs.nonzero()`; of indices (K, H, W), in their own order.

    Raises:
        ValueError, TypeError, RuntimeError: as `wla_set_loss`; TypeError for weights, which the
            caller applies.
    """
    given = check_set(features, pairs, keys, detach_keys, valid)
    if given.pairs.dtype.is_floating_point:
        raise TypeError(
            f"pairs must be bool, or indices (K, 2), got {given.pairs.dtype}; multiply what you "
            f"make of max_sim by weights"
        )
    features = given.features
    window = check_window(window_size, features.shape[2], features.shape[3])
    if given.pairs.dtype != torch.bool:
        chosen = given.listed()
    elif values_visible(given.pairs):
        chosen = PairList.of(given.pairs, features.device)
    else:
        places = given.pairs.reshape(-1).nonzero().squeeze(1)
        chosen = PairList.exactly(places, len(features), features.device, given.pairs.shape[1])
    found = _matches(match_set(features, chosen, given.valid, window, eps, backend, given.keys))
    return Matches(*map(chosen.ordered, found))


def match_pixels(argmax: Tensor, window_size: WindowSize) -> tuple[Tensor, Tensor]:
    """Where the matches of `align` and `align_set` lie in the map.

    Args:
        argmax: (..., H, W) int64, as they return it.
        window_size: ω, as given to them.

    Returns:
        Row and column of each match in the key's map, (..., H, W) int64 each; −1 for a pixel that
        takes no part.

    Raises:
        ValueError: `argmax` has fewer than two axes, or the window does not fit the map.
        TypeError: `argmax` is not a tensor of integers.
    """
    check_integers("argmax", check_tensor("argmax", argmax))
    if argmax.dim() < 2:
        raise ValueError(f"argmax must be (..., H, W), got shape {tuple(argmax.shape)}")
    height, width = argmax.shape[-2:]
    window = check_window(window_size, height, width)
    rows, columns = match_places(argmax, window)
    none = argmax < 0
    return rows.masked_fill(none, -1), columns.masked_fill(none, -1)


def check_pairwise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = check_features("x", x), check_features("y", y)
    check_same_shape("x", x, "y", y)
    check_same_kind("x", x, "y", y)
    return x, y


class SetInput(NamedTuple):
    """The checked arguments of a loss on a set."""

    features: Tensor  # (S, C, H, W)
    keys: Tensor | None  # (M, C, H, W); None: the features themselves
    pairs: Tensor  # (S, M) of bool or weights, or (K, 2) int64
    valid: Tensor | tuple[Tensor, Tensor] | None  # (S, H, W); with keys also (M, H, W)

    def listed(self) -> PairList:
        """The pairs, where they are given as indices."""
        keys = self.features if self.keys is None else self.keys
        return PairList.listed(self.pairs, len(self.features), len(keys), self.features.device)


def check_set(
    features: object, pairs: object, keys: object, detach_keys: bool, valid: object
) -> SetInput:
    features = check_features("features", features)
    if keys is None and not detach_keys:
        table = check_pairs(pairs, features.shape[0])
        return SetInput(features, None, table, check_valid("valid", valid, features))
    if keys is None:
        others, table = features, check_pairs(pairs, features.shape[0])
    else:
        others = check_features("keys", keys)
        if others.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"features and keys must have the same channels, height and width, got "
                f"{tuple(features.shape)} and {tuple(others.shape)}"
            )
        check_same_kind("features", features, "keys", others)
        table = check_pairs(pairs, features.shape[0], others.shape[0])
    masks = check_valid_each(valid, features, others)
    return SetInput(features, others.detach() if detach_keys else others, table, masks)


def chosen_backend(
    query: Tensor, key: Tensor | None, window: tuple[int, int], eps: float, backend: str | None
) -> tuple[str, float]:
    """The name of the backend that runs a call, and eps, checked."""
    eps = check_eps(eps)
    return backends.select(backend, query, key, window), eps


def match_pairwise(
    x: Tensor,
    y: Tensor,
    valid: Tensor | None,  # (B, 2, H, W)
    window: tuple[int, int],
    eps: float,
    backend: str | None,
) -> Outputs:
    """Pairs as groups of one query and one key."""
    name, eps = chosen_backend(x, y, window, eps, backend)
    # Views, whose gradients are views: indexing would copy into zeros in the backward.
    return _match(x.unsqueeze(1), y.unsqueeze(1), None, valid, window, eps, name)


def match_set(
    features: Tensor,
    pairs: PairList,
    valid: Tensor | tuple[Tensor, Tensor] | None,  # (S, H, W); with keys also (M, H, W)
    window: tuple[int, int],
    eps: float,
    backend: str | None,
    keys: Tensor | None = None,  # (M, C, H, W)
) -> Outputs:
    """Pairs within groups of samples, whose keys are its queries unless there are others."""
    name, eps = chosen_backend(features, keys, window, eps, backend)
    return _match(*grouped(features, keys, valid, pairs), window, eps, name)


def grouped(
    features: Tensor,  # (S, C, H, W)
    keys: Tensor | None,  # (M, C, H, W)
    valid: Tensor | tuple[Tensor, Tensor] | None,  # (S, H, W); with keys also (M, H, W)
    pairs: PairList,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Query, key, pairs and valid pixels as the operators take them, group by group."""
    query = _grouped(features, pairs.groups)
    if keys is None:
        own = None if valid is None else _grouped(cast("Tensor", valid), pairs.groups)
        return query, None, pairs.grouped, own
    among = None
    if valid is not None:  # queries then keys, in each group
        among = torch.cat([_grouped(own, pairs.groups) for own in valid], dim=1)
    return query, _grouped(keys, pairs.groups), pairs.grouped, among


def _grouped(samples: Tensor, groups: int) -> Tensor:
    """(S, ...) as (groups, S / groups, ...), a view."""
    return samples.unsqueeze(0) if groups == 1 else samples.view(groups, -1, *samples.shape[1:])


def _match(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: tuple[int, int],
    eps: float,
    backend: str,
) -> Outputs:
    """The operator, with an error if it is differentiated in a way that it does not support."""
    prepare(query, key, pairs, valid)
    return reverse_mode_only(match, query, key, pairs, valid, window, eps, backend)


def reverse_mode_only(
    operator: Callable[..., Result], query: Tensor, key: Tensor | None, *rest: Any
) -> Result:
    """An operator, with an error if it is differentiated in a way that it does not support.

    Forward mode would otherwise return zero tangents silently.
    """
    for tensor in (query, key):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "salkernels losses do not support forward-mode automatic differentiation; "
                "use loss.backward() or torch.autograd.grad"
            )
    try:
        return operator(query, key, *rest)
    except RuntimeError as error:
        if not transforms_active():
            raise
        raise RuntimeError(
            "salkernels losses cannot be differentiated by torch.func (grad, vjp, jvp, jacrev, "
            "...); use loss.backward() or torch.autograd.grad"
        ) from error


def _matches(found: Outputs) -> Matches:
    argmax = found.argmax.long()
    none = no_match(found.argmax.dtype)
    return Matches(found.max_sim, argmax if none < 0 else argmax.masked_fill_(argmax == none, -1))
