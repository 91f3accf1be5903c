"""What torch needs to know of `salkernels::window_lse`: shapes, derivatives and autocast.

As `salkernels.library` for `match`. The backward computes the similarities anew, and keeps nothing
but the log-sum-exp beside the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, schema
from .library import NO_SECOND_DERIVATIVE, autocast_rule
from .reference import check_not_empty
from .reference_contrast import output

_operator = torch.ops.salkernels.window_lse.default
_backward_operator = torch.ops.salkernels.window_lse_backward.default


def _window_lse(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: list[int],
    temperature: float,
    eps: float,
    backend: str,
) -> Tensor:
    cut = (window[0], window[1])
    run = backends.for_negatives(backend, query, key, cut).window_lse
    return run(query, key, pairs, valid, cut, temperature, eps)


def _window_lse_backward(
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    lse: Tensor,
    window: list[int],
    temperature: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """In the set form the second gradient is empty, as that of `match`."""
    cut = (window[0], window[1])
    grad_query, grad_key = backends.for_negatives(backend, query, key, cut).window_lse_backward(
        *(grad_lse, query, key, pairs, valid, lse), cut, temperature, eps
    )
    return grad_query, query.new_empty((0,)) if grad_key is None else grad_key


def _fake(query: Tensor, *_: Any) -> Tensor:
    check_not_empty(query)
    return output(query)


def _backward_fake(
    grad_lse: Tensor, query: Tensor, key: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((0,)) if key is None else torch.empty_like(key)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, pairs, valid, *ctx.settings = inputs
    ctx.save_for_backward(query, key, pairs, valid, output)


def _differentiate(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_query, grad_key = _backward_operator(grad_lse, *saved, *ctx.settings)
    return (grad_query, None if saved[1] is None else grad_key, *(None,) * 6)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _register() -> None:
    library = torch.library
    for name, run, fake in (
        ("window_lse", _window_lse, _fake),
        ("window_lse_backward", _window_lse_backward, _backward_fake),
    ):
        schema.LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"salkernels::{name}", fake, lib=schema.LIBRARY)
    library.register_autograd(
        "salkernels::window_lse", _differentiate, setup_context=_keep, lib=schema.LIBRARY
    )
    library.register_autograd("salkernels::window_lse_backward", _refuse, lib=schema.LIBRARY)
    for device in ("cpu", "cuda"):
        autocast_rule("window_lse", device)


if schema.FIRST and "_registered" not in globals():  # as in schema.py
    _register()
    _registered = True


def window_lse(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    pairs: Tensor | None,  # (P,) int64
    valid: Tensor | None,  # (G, V, H, W) bool
    window: tuple[int, int],
    temperature: float,
    eps: float,
    backend: str,
) -> Tensor:
    """`salkernels::window_lse`: (G, N, H, W)."""
    lse: Tensor = _operator(query, key, pairs, valid, window, temperature, eps, backend)
    return lse
