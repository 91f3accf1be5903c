"""The short way of a call: what follows from its arguments' properties is kept, and found again.

A loss checks its arguments, chooses a backend, makes the list of its pairs and reshapes; then come
the operator and a mean, with a node of autograd each. For the calls that training is made of, mean
losses of whole maps, all this follows from shapes, dtypes, the device, settings, and the content of
the table of pairs. That is the key of a `Known` call, which does the rest in one node.

**Bad input never passes.** The key holds all that the checks look at, and values of one type only
where others may equal them (2.0 is 2, and True is 1). A table is known by its bytes.

**Who wants to see the operators does.** Tracing, modes, transforms, autocast, forward mode and
subclasses of tensors keep the long way, and so does a gradient that is to be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor

from . import _kept, library
from ._pair_list import PairList
from ._torch_private import nobody_looks_at_all

Key = tuple[Hashable, ...]


def key_of_set(
    features: object, pairs: object, window: object, eps: object, backend: str | None
) -> Key | None:
    """The key of a set's mean loss over a table of bool on the CPU; None: take the long way."""
    if (
        torch.compiler.is_compiling()  # first: what follows cannot be traced
        or type(features) is not Tensor
        or type(pairs) is not Tensor
        or pairs.dtype is not torch.bool
        or not pairs.is_cpu
        or not _is_open((features, pairs), window, eps, backend)
    ):
        return None
    content = pairs.numpy().tobytes()
    return (
        *(features.shape, features.dtype, features.device),
        *(window, eps, backend, pairs.shape, content),
    )


def key_of_pairs(
    x: object, y: object, window: object, eps: object, backend: str | None
) -> Key | None:
    """The key of the mean loss between two maps each; None: take the long way."""
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(y) is not Tensor
        or not _is_open((x, y), window, eps, backend)
    ):
        return None
    return x.shape, x.dtype, x.device, window, eps, backend, y.shape, y.dtype, y.device


def _is_open(tensors: tuple[Tensor, Tensor], window: object, eps: object, backend: object) -> bool:
    """Whether the settings can be a key, and nobody looks at what is done to the tensors."""
    first, second = tensors
    if first.is_cuda:
        device = "cuda"
    elif first.is_cpu:
        device = "cpu"
    else:
        return False
    return (
        first.layout is second.layout is torch.strided
        and (type(window) is int or (type(window) is tuple and all(type(w) is int for w in window)))
        and type(eps) is float
        and (backend is None or type(backend) is str)
        and nobody_looks_at_all(tensors)
        and not torch.is_autocast_enabled(device)
    )


def find(key: Key) -> Known | None:
    """The call of that key, if there was one on this stream."""
    return cast("Known | None", _kept.find(key, cast("torch.device", key[2])))


class Known:
    """A mean loss between checked arguments; from then on its arguments are maps alone."""

    def __init__(
        self,
        name: str,  # of the backend
        like: Tensor,  # (S, C, H, W), as each of the maps
        chosen: PairList | None,  # None: of two maps each
        window: tuple[int, int],
        eps: float,
    ) -> None:
        self.name, self.backend = name, library.open_backend(name)
        self.chosen, self.pairs = chosen, None if chosen is None else _ordinary(chosen.grouped)
        self.groups = len(like) if chosen is None else chosen.groups
        self.shape = (self.groups, len(like) // self.groups, *like.shape[1:])
        self.mean_match = getattr(self.backend, "mean_match", None)
        self.mean_match_backward = getattr(self.backend, "mean_match_backward", None)
        self.window, self.eps = window, eps

    def keep(self, key: Key) -> Known:
        """From now on `find` finds it."""
        size = sum(len(part) for part in key if isinstance(part, bytes))
        if self.chosen is not None:
            size += self.chosen._bytes()
        _kept.keep(key, cast("torch.device", key[2]), self, size)
        return self

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar."""
        library.require_open()
        if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
            loss: Tensor = _Mean.apply(self, x, y)
            return loss
        return self.forward(x, y)[0]

    def forward(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean loss, and the maxima, their places and the norms for the backward."""
        if self.mean_match is not None:
            found: tuple[Tensor, Tensor, Tensor, Tensor] = self.mean_match(
                x, y, self.pairs, self.groups, self.window, self.eps
            )
            return found
        loss, max_sim, argmax, norm = self.backend.match(
            x.view(self.shape),
            None if y is None else y.view(self.shape),
            self.pairs,
            None,
            self.window,
            self.eps,
        )
        return loss.mean(), max_sim, argmax, norm

    def backward(
        self, grad: Tensor, x: Tensor, y: Tensor | None, max_sim: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of x and y, which nobody differentiates."""
        if self.mean_match_backward is not None:
            grads: tuple[Tensor, Tensor | None] = self.mean_match_backward(
                *(grad, x, y, self.pairs, self.groups, max_sim, *rest, self.window, self.eps)
            )
            return grads
        grad_sim = torch.empty_like(max_sim)
        library.penalty_of_mean(grad, max_sim, grad_sim)
        grad_x, grad_y = self.backend.match_backward(
            grad_sim,
            x.view(self.shape),
            None if y is None else y.view(self.shape),
            self.pairs,
            None,
            max_sim,
            *rest,
            self.window,
            self.eps,
        )
        return grad_x.view(x.shape), None if grad_y is None else grad_y.view(x.shape)

    def seen_backward(
        self, grad: Tensor, x: Tensor, y: Tensor | None, max_sim: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same for who differentiates them, or asks for a batch of them."""
        run: Callable[..., tuple[Tensor, Tensor]] = library._match_backward_operator
        if torch.is_grad_enabled():
            run = library._once_differentiable_backward
        count = max_sim.shape[0]
        grad_x, grad_y = run(
            library.penalty_gradient((grad / count).expand(count), max_sim),
            x.view(self.shape),
            None if y is None else y.view(self.shape),
            self.pairs,
            None,
            max_sim,
            *rest,
            self.window,
            self.eps,
            self.name,
        )
        return grad_x.view(x.shape), None if y is None else grad_y.view(x.shape)


def _ordinary(pairs: Tensor) -> Tensor:
    """A list that was made in inference mode could not be saved for a later call's backward."""
    if not pairs.is_inference():
        return pairs
    with torch.inference_mode(False):
        return pairs.clone()


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Known, x: Tensor, y: Tensor | None) -> Tensor:
        loss, *found = known.forward(x, y)
        ctx.known = known
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, *found)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        library.require_open()
        run = ctx.known.backward
        if torch.is_grad_enabled() or not library.unobserved(grad):
            run = ctx.known.seen_backward
        return None, *run(grad, *ctx.saved_tensors)
