"""What torch needs to know of the operators: shapes, derivatives and autocast.

`salkernels::match` is opaque to `torch.compile`, and dispatches by the name of a backend, so that a
new backend needs no new rule. Its backward is an operator of its own, and takes one number for each
pair and pixel: ∂L/∂max_sim. Whatever is made of the maxima is torch's to differentiate; the loss
that the forward sums on its way is the only penalty known here, in one place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backends
from ._torch_private import nobody_looks
from .checks import AUTOCAST_DEVICES, autocast_on
from .reference import Outputs, check_not_empty, outputs
from .schema import LIBRARY

_match_operator = torch.ops.salkernels.match.default
_match_backward_operator = torch.ops.salkernels.match_backward.default

# ---- To the backend ------------------------------------------------------------------------------


def _match(
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    window: list[int],
    eps: float,
    backend: str,
) -> Outputs:
    return backends.get(backend).match(query, key, pairs, valid, (window[0], window[1]), eps)


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
) -> tuple[Tensor, Tensor | None]:
    return backends.get(backend).match_backward(
        *(grad_sim, query, key, pairs, valid, max_sim, argmax, norm),
        (window[0], window[1]),
        eps,
    )


LIBRARY.impl("match", _match, "CompositeExplicitAutograd")
LIBRARY.impl("match_backward", _match_backward, "CompositeExplicitAutograd")

# ---- Shapes --------------------------------------------------------------------------------------


@torch.library.register_fake("salkernels::match", lib=LIBRARY)
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


@torch.library.register_fake("salkernels::match_backward", lib=LIBRARY)
def _match_backward_fake(
    grad_sim: Tensor, query: Tensor, key: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(query), None if key is None else torch.empty_like(key)


# ---- Derivatives ---------------------------------------------------------------------------------


def penalty_gradient(grad_loss: Tensor, max_sim: Tensor) -> Tensor:
    """∂L/∂max_sim (P, H, W) of the loss (P,) that the forward sums: |1 − max_sim|, over H·W.

    NaN in `max_sim` needs no care: the backward gives it to both rows of such a match.
    """
    scale = grad_loss / -(max_sim.shape[1] * max_sim.shape[2])
    return torch.sign(1 - max_sim).mul_(scale[:, None, None])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    query, key, pairs, valid, ctx.window, ctx.eps, ctx.backend = inputs
    loss, max_sim, argmax, norm = output
    ctx.mark_non_differentiable(argmax, norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, pairs, valid, max_sim, argmax, norm)


def _differentiate(
    ctx: Any, grad_loss: Tensor | None, grad_max_sim: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None and grad_max_sim is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    if grad_loss is None:
        grad_sim = grad_max_sim
    else:
        grad_sim = penalty_gradient(grad_loss, saved[4])
        if grad_max_sim is not None:
            grad_sim += grad_max_sim
    run = _match_backward_operator
    if not torch.is_grad_enabled() and unobserved(grad_sim):
        run = _match_backward
    grads = run(grad_sim, *saved, ctx.window, ctx.eps, ctx.backend)
    return (*grads, None, None, None, None, None)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "the salkernels losses are differentiable once only: a second derivative was asked for; "
        "use the formula in plain torch where you need one"
    )


torch.library.register_autograd(
    "salkernels::match", _differentiate, setup_context=_keep, lib=LIBRARY
)
torch.library.register_autograd(
    "salkernels::match_backward",
    _refuse_second_derivative,
    setup_context=_keep_nothing,
    lib=LIBRARY,
)

# ---- Autocast ------------------------------------------------------------------------------------


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off; some device types (meta) have none to switch."""
    if device not in AUTOCAST_DEVICES:
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _autocast_rule(device: str) -> None:
    """Under autocast: features keep their dtype (the wider of two), sums stay in fp32."""

    def forward(query: Tensor, key: Tensor | None, *rest: Any) -> Outputs:
        if key is not None and key.dtype != query.dtype:
            wider = torch.promote_types(query.dtype, key.dtype)
            query, key = query.to(wider), key.to(wider)
        with without_autocast(device):
            found: Outputs = _match_operator(query, key, *rest)
            return found

    def backward(*args: Any) -> tuple[Tensor, Tensor | None]:
        with without_autocast(device):
            grads: tuple[Tensor, Tensor | None] = _match_backward_operator(*args)
            return grads

    LIBRARY.impl("match", forward, f"Autocast{device.upper()}")
    LIBRARY.impl("match_backward", backward, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    _autocast_rule(_device)

# ---- A call --------------------------------------------------------------------------------------


def unobserved(tensor: Tensor) -> bool:
    """Whether nothing stands between the operator and its implementation.

    Then the way through the dispatcher can be spared, which takes longer than a small call itself:
    with it, forward and backward of 2 x 16 x 6 x 6 take twice as long (`benchmarks overhead`).
    """
    return (
        type(tensor) is Tensor
        and not tensor.is_meta
        and nobody_looks()
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
    """`salkernels::match`, by the shortest way that does the same."""
    if torch.compiler.is_compiling() or not unobserved(query):
        found = _match_operator(query, key, pairs, valid, window, eps, backend)
    else:
        found = _Match.apply(query, key, pairs, valid, window, eps, backend)
    return Outputs(*found)
