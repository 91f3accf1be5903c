"""The operator as torch sees it: schema, shapes, autograd and autocast rules.

`salkernels::pair_losses` is opaque to `torch.compile`, and dispatches by the name of a backend, so
that a new backend needs no new rule. Its backward is an operator of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .reference import accumulate_dtype, check_not_empty, index_dtype

LIBRARY = torch.library.Library("salkernels", "DEF")
LIBRARY.define(
    "pair_losses(Tensor query, Tensor? key, Tensor? mask, SymInt[2] window, float eps, "
    "SymInt capacity, str backend) "
    "-> (Tensor loss, Tensor argmax, Tensor max_sim, Tensor norm)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "pair_losses_backward(Tensor grad_loss, Tensor query, Tensor? key, Tensor? mask, "
    "Tensor argmax, Tensor max_sim, Tensor norm, SymInt[2] window, float eps, str backend) "
    "-> (Tensor grad_query, Tensor? grad_key)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# argmax, max_sim and norm are kept for the backward; norm is empty for a backend that needs none.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
pair_losses = torch.ops.salkernels.pair_losses.default
pair_losses_backward = torch.ops.salkernels.pair_losses_backward.default


def _forward(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: list[int],
    eps: float,
    capacity: int,
    backend: str,
) -> Outputs:
    run = backends.get(backend).pair_losses_forward
    loss, argmax, max_sim, *kept = run(query, key, mask, (window[0], window[1]), eps, capacity)
    return loss, argmax, max_sim, kept[0] if kept else max_sim.new_empty(0)


def _backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    argmax: Tensor,
    max_sim: Tensor,
    norm: Tensor,
    window: list[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    chosen = backends.get(backend)
    kept = () if backends.outputs_of(chosen) is None else (norm,)
    return chosen.pair_losses_backward(
        grad_loss, query, key, mask, argmax, max_sim, (window[0], window[1]), eps, *kept
    )


LIBRARY.impl("pair_losses", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("pair_losses_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("salkernels::pair_losses", lib=LIBRARY)
def _forward_fake(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: list[int],
    eps: float,
    capacity: int,
    backend: str,
) -> Outputs:
    check_not_empty(query)
    outputs = backends.outputs_of(backends.get(backend))
    if outputs is not None:
        return outputs(query, key, (window[0], window[1]), capacity)
    groups, samples, _, height, width = query.shape
    dtype = accumulate_dtype(query.dtype)
    keys = samples if key is None else key.shape[1]
    plane = (capacity, height, width)
    return (
        query.new_empty((groups, samples, keys), dtype=dtype),
        query.new_empty(plane, dtype=index_dtype((window[0], window[1]))),
        query.new_empty(plane, dtype=dtype),
        query.new_empty(0, dtype=dtype),
    )


@torch.library.register_fake("salkernels::pair_losses_backward", lib=LIBRARY)
def _backward_fake(
    grad_loss: Tensor, query: Tensor, key: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(query), None if key is None else torch.empty_like(key)


def _unobserved(tensor: Tensor) -> bool:
    """Whether nothing stands between the operator and its implementation.

    Then calling the latter spares a way through the dispatcher: 5 µs of a small call's 40.
    """
    plain = type(tensor) is Tensor and not tensor.is_meta
    return plain and torch._C._len_torch_dispatch_stack() == 0


def _below_autograd(query: Tensor, *rest: Any) -> Outputs:
    run: Callable[..., Outputs] = _forward if _unobserved(query) else pair_losses
    with torch._C._AutoDispatchBelowAutograd():
        return run(query, *rest)


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        window: list[int],
        eps: float,
        capacity: int,
        backend: str,
    ) -> Outputs:
        outputs = _below_autograd(query, key, mask, window, eps, capacity, backend)
        ctx.save_for_backward(query, key, mask, *outputs[1:])
        ctx.window, ctx.eps, ctx.backend = window, eps, backend
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_loss = grads[0]
        if grad_loss is None:
            return (None,) * 7
        run: Callable[..., tuple[Tensor, Tensor | None]] = pair_losses_backward
        # What would act here: a second derivative, and autocast where backward() runs under it.
        if _unobserved(grad_loss) and not (
            torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()
        ):
            run = _backward
        grad_query, grad_key = run(grad_loss, *ctx.saved_tensors, ctx.window, ctx.eps, ctx.backend)
        return grad_query, grad_key, None, None, None, None, None


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _reject_unsupported_autograd(*tensors: Tensor | None) -> None:
    """Forward-mode AD would otherwise give zero tangents without a word."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "salkernels losses cannot be differentiated by torch.func (grad, vjp, jvp, jacrev, "
            "...); use loss.backward() or torch.autograd.grad"
        )
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "salkernels losses do not support forward-mode automatic differentiation; "
                "use loss.backward() or torch.autograd.grad"
            )


def _forward_autograd(
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    window: list[int],
    eps: float,
    capacity: int,
    backend: str,
) -> Outputs:
    if _transforms_possible():
        _reject_unsupported_autograd(query, key)
    if _needs_grad(query, key):
        return _PairLosses.apply(query, key, mask, window, eps, capacity, backend)
    return _below_autograd(query, key, mask, window, eps, capacity, backend)


def _transforms_possible() -> bool:
    """A cheap test that is almost always False: no torch.func transform, no dual level."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _OnceDifferentiable(torch.autograd.Function):
    """The backward operator as a node that raises when a second derivative passes through it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        with torch._C._AutoDispatchBelowAutograd():
            return pair_losses_backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the salkernels losses are differentiable once only: a second derivative was asked "
            "for; use the formula in plain torch where you need one"
        )


def _backward_autograd(
    grad_loss: Tensor, query: Tensor, key: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    if _needs_grad(grad_loss, query, key):
        return _OnceDifferentiable.apply(grad_loss, query, key, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return pair_losses_backward(grad_loss, query, key, *rest)


LIBRARY.impl("pair_losses", _forward_autograd, "Autograd")
LIBRARY.impl("pair_losses_backward", _backward_autograd, "Autograd")


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Switches autocast off; some device types (meta) have none to switch."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _autocast_rule(device: str) -> None:
    """Under autocast: features keep their dtype (the wider of two), sums stay in fp32."""

    def forward(query: Tensor, key: Tensor | None, *rest: Any) -> Outputs:
        if key is not None and key.dtype != query.dtype:
            wider = torch.promote_types(query.dtype, key.dtype)
            query, key = query.to(wider), key.to(wider)
        with without_autocast(device):
            return pair_losses(query, key, *rest)

    def backward(*args: Any) -> tuple[Tensor, Tensor | None]:
        with without_autocast(device):
            return pair_losses_backward(*args)

    LIBRARY.impl("pair_losses", forward, f"Autocast{device.upper()}")
    LIBRARY.impl("pair_losses_backward", backward, f"Autocast{device.upper()}")


for _device in ("cpu", "cuda"):
    _autocast_rule(_device)
