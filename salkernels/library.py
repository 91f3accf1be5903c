"""What torch needs to know about the operators: shapes, derivatives and autocast.

`salkernels::match` is opaque to `torch.compile`, and dispatches by the name of a backend, so that a
new backend needs no new rule. Its backward is an operator of its own, and takes one number for each
pair and pixel: ∂L/∂max_sim. torch differentiates all that follows the maxima; the loss that the
forward sums is the only penalty that is known here, in one place. `salkernels._short` goes past the
operators where nobody would see them.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _kept, backends, schema
from ._torch_private import nobody_looks
from .checks import AUTOCAST_DEVICES, autocast_on
from .reference import Outputs, check_not_empty, match_tangent, outputs

_match_operator = torch.ops.salkernels.match.default
_match_backward_operator = torch.ops.salkernels.match_backward.default
_smooth_l1_backward = torch.ops.aten.smooth_l1_loss_backward.grad_input

# ---- To the backend ------------------------------------------------------------------------------

_closed = False  # whether Python is ending


def _close() -> None:
    global _closed
    _closed = True


# torch removes the operators while Python shuts down; a later call would crash.
atexit.register(_close)


def require_open() -> None:
    if _closed:
        raise RuntimeError("salkernels cannot be called while Python is shutting down")


def open_backend(name: str) -> backends.Backend:
    require_open()
    return backends.get(name)


def _match(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: list[int],
    eps: float,
    backend: str,
) -> Outputs:
    return open_backend(backend).match(query, key, pairs, valid, (window[0], window[1]), eps)


def _match_backward(
    grad_sim: Tensor,
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    max_sim: Tensor,
    argmax: Tensor,
    norm: Tensor,
    window: list[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """In the set form the second gradient is empty: torch loops over batches of gradients only
    where all results are tensors."""
    grad_query, grad_key = open_backend(backend).match_backward(
        *(grad_sim, query, key, pairs, valid, max_sim, argmax, norm),
        (window[0], window[1]),
        eps,
    )
    return grad_query, query.new_empty((0,)) if grad_key is None else grad_key


# ---- Shapes --------------------------------------------------------------------------------------


def _match_fake(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: list[int],
    eps: float,
    backend: str,
) -> Outputs:
    check_not_empty(query)
    lay_out = getattr(backends.get(backend), "outputs", outputs)
    found: Outputs = lay_out(query, key, pairs, (window[0], window[1]))
    return found


def _match_backward_fake(
    grad_sim: Tensor, query: Tensor, key: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((0,)) if key is None else torch.empty_like(key)


# ---- Derivatives ---------------------------------------------------------------------------------


def penalty_gradient(grad_loss: Tensor, max_sim: Tensor) -> Tensor:
    """∂L/∂max_sim (P, H, W) of the loss (P,) that the forward sums: |1 − max_sim|, over H·W.

    NaN in `max_sim` needs no special case: the backward passes it to both rows of such a match.
    """
    scale = grad_loss / -(max_sim.shape[1] * max_sim.shape[2])
    # Not in place: each gradient of a batch has a scale of its own.
    return torch.sign(1 - max_sim) * scale[:, None, None]


_MEAN = 1  # as torch numbers reductions
NO_WIDTH = 1e-30  # less than any distance from 1 that a float can have, but not 0: sign(0) is 0


def _penalty_gradient_at_once(grad_loss: Tensor, max_sim: Tensor) -> Tensor:
    """The same numbers in one pass over the maxima instead of three: |1 − m| is the smooth L1 loss
    of no width. NaN is NaN. Only where nobody differentiates it once more."""
    if not (max_sim.is_cpu or max_sim.is_cuda):  # others may not have the operator
        return penalty_gradient(grad_loss, max_sim)
    scale = grad_loss / (max_sim.shape[1] * max_sim.shape[2])
    # Into a result that lies as the maxima do: without one torch would make a contiguous one.
    result, one = torch.empty_like(max_sim), _kept.one(max_sim)
    _smooth_l1_backward(scale.view(-1, 1, 1), max_sim, one, 0, NO_WIDTH, grad_input=result)
    return result


def penalty_of_mean(grad: Tensor, max_sim: Tensor, result: Tensor) -> None:
    """∂L/∂max_sim (P, H, W) of the mean of the losses (P,), likewise; `grad` is ()."""
    _smooth_l1_backward(grad, max_sim, _kept.one(max_sim), _MEAN, NO_WIDTH, grad_input=result)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, key, pairs, valid, ctx.window, ctx.eps, ctx.backend = inputs
    loss, max_sim, argmax, norm = output
    ctx.mark_non_differentiable(argmax, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, pairs, valid, max_sim, argmax, norm)


def _differentiate(
    ctx: Any, grad_loss: Tensor | None, grad_max_sim: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    given = [grad for grad in (grad_loss, grad_max_sim) if grad is not None]
    if not given:
        return (None,) * 7
    run: Callable[..., tuple[Tensor, Tensor | None]] = _match_backward_operator
    penalty = penalty_gradient
    choice: tuple[Any, ...] = (ctx.window, ctx.eps, ctx.backend)
    if torch.is_grad_enabled():
        run = _once_differentiable_backward
    elif all(map(unobserved, given)):
        run, penalty = open_backend(ctx.backend).match_backward, _penalty_gradient_at_once
        choice = (tuple(ctx.window), ctx.eps)
    grad_sim = given[-1] if grad_loss is None else penalty(grad_loss, saved[4])
    if len(given) == 2:
        grad_sim = grad_sim + given[1]
    grad_query, grad_key = run(grad_sim, *saved, *choice)
    return (grad_query, None if saved[1] is None else grad_key, None, None, None, None, None)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, query, key, pairs, _, _, argmax, _, ctx.window, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, pairs, argmax)


def _differentiate_backward(
    ctx: Any, tangent_query: Tensor | None, tangent_key: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The backward is linear in grad_sim and differentiable in it, but not in the features.

    Each number of grad_sim moves the gradients along those of its maximum.
    """
    query, key, pairs, argmax = ctx.saved_tensors
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    along = match_tangent(
        query, key, pairs, argmax, ctx.window, ctx.eps, tangent_query, tangent_key
    )
    return (along, *(None,) * 10)


NO_SECOND_DERIVATIVE = (
    "the salkernels losses are differentiable once only: a second derivative with respect to the "
    "features was asked for; use the formula in plain torch where you need one"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Zeros in place of the dependence of a gradient on the features, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.new_zeros(()).expand_as(features)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _once_differentiable_backward(
    grad_sim: Tensor, query: Tensor, key: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The backward for a result that will be differentiated, which works in grad_sim only."""
    fixed = None if key is None else key.detach()
    grad_query, grad_key = _match_backward_operator(grad_sim, query.detach(), fixed, *rest)
    if key is not None:
        grad_key = grad_key + _NoSecondDerivative.apply(key)
    return grad_query + _NoSecondDerivative.apply(query), grad_key


# ---- Autocast ------------------------------------------------------------------------------------


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off; some device types (meta) have no autocast."""
    if device not in AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device, enabled=False)


def same_dtype(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the wider of their dtypes."""
    if key is None or key.dtype == query.dtype:
        return query, key
    wider = torch.promote_types(query.dtype, key.dtype)
    return query.to(wider), key.to(wider)


def autocast_rule(name: str, device: str) -> None:
    """Under autocast: features keep their dtype (the wider of two), sums stay in fp32."""
    operator = getattr(torch.ops.salkernels, name).default
    backward_operator = getattr(torch.ops.salkernels, f"{name}_backward").default

    def forward(query: Tensor, key: Tensor | None, *rest: Any) -> Any:
        query, key = same_dtype(query, key)
        with without_autocast(device):
            return operator(query, key, *rest)

    def backward(*args: Any) -> Any:
        with without_autocast(device):
            return backward_operator(*args)

    schema.LIBRARY.impl(name, forward, f"Autocast{device.upper()}")
    schema.LIBRARY.impl(f"{name}_backward", backward, f"Autocast{device.upper()}")


def _register() -> None:
    library = torch.library
    for name, run, fake in (
        ("match", _match, _match_fake),
        ("match_backward", _match_backward, _match_backward_fake),
    ):
        schema.LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        library.register_fake(f"salkernels::{name}", fake, lib=schema.LIBRARY)
    library.register_autograd(
        "salkernels::match", _differentiate, setup_context=_keep, lib=schema.LIBRARY
    )
    library.register_autograd(
        "salkernels::match_backward",
        _differentiate_backward,
        setup_context=_keep_backward,
        lib=schema.LIBRARY,
    )
    for device in ("cpu", "cuda"):
        autocast_rule("match", device)


if schema.FIRST and "_registered" not in globals():  # as in schema.py
    _register()
    _registered = True

# ---- A call --------------------------------------------------------------------------------------


def unobserved(tensor: Tensor) -> bool:
    """Whether no mode or transform intercepts the operator.

    The dispatcher can then be bypassed, which takes longer than a small call itself: with it,
    forward and backward of 2 x 16 x 6 x 6 take twice as long (`benchmarks overhead`).
    """
    return (
        type(tensor) is Tensor
        and not tensor.is_meta
        and nobody_looks(tensor)
        and not autocast_on(tensor.device.type)
    )


class _Match(torch.autograd.Function):
    """The operator with its derivative, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        output = _match(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def match(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    pairs: Tensor | None,  # (P,) int64
    valid: Tensor | None,  # (G, V, H, W) bool
    window: tuple[int, int],
    eps: float,
    backend: str,
) -> Outputs:
    """`salkernels::match`, without the dispatcher where that gives the same result."""
    run: Callable[..., Any] = _match  # nothing to keep for a backward
    if torch.compiler.is_compiling() or not unobserved(query):
        run = _match_operator
    elif torch.is_grad_enabled() and (
        query.requires_grad or (key is not None and key.requires_grad)
    ):
        run = _Match.apply
    return Outputs(*run(query, key, pairs, valid, window, eps, backend))
