"""Which implementation runs a call: an order of backends, each of which can say why it cannot.

A backend is a module of this package with

    why_not(query, key, window) -> str | None       why it cannot run this input; None: it can
    status() -> str | None                          the same question without an input
    match(...), match_backward(...)                 as in `salkernels.reference`

and, if it has kernels of its own for the negatives of `wla_contrast`,

    window_lse(...), window_lse_backward(...)       as in `salkernels.reference_contrast`

and, if it computes the mean of the losses along with them, for `salkernels._short`,

    mean_match(...), mean_match_backward(...)       as in `backends.cuda`

and, if it takes tensors of some types of device only,

    DEVICES                                         their names: None does not even ask on others

and, if its outputs lie otherwise than plain contiguous tensors, or with norms,

    outputs(query, key, pairs, window)              them, uninitialised, as `reference.outputs`

An explicit name runs that backend or raises with its reason; `None` takes the first that can. Two
names, "triton+cuda", are one backend for the forward and another for the backward: the two for GPUs
keep the same for it.

The package itself can be called: `salkernels.backends()` is `statuses()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from ..reference import Outputs, outputs
from . import cpu, cuda, reference, slow, triton
from .measured import fastest


class Backend(Protocol):
    """What `salkernels.library` needs of a backend."""

    def status(self) -> str | None: ...

    def why_not(self, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None: ...

    @property
    def match(self) -> Callable[..., Outputs]: ...

    @property
    def match_backward(self) -> Callable[..., tuple[Tensor, Tensor | None]]: ...


class Negatives(Protocol):
    """What `salkernels.library_contrast` needs of a backend; see `for_negatives`."""

    @property
    def window_lse(self) -> Callable[..., Tensor]: ...

    @property
    def window_lse_backward(self) -> Callable[..., tuple[Tensor, Tensor | None]]: ...


# The order of preference, but see `in_order`. A backend that this version does not contain keeps
# its place and says so.
BACKENDS: dict[str, Backend] = {
    "cuda": cuda,
    "triton": triton,
    "cpu": cpu,
    "reference": reference,
}
MIXED = ("triton+cuda", "cuda+triton")  # forward, backward


@dataclass(frozen=True)
class Mixed:
    """One backend for the forward, and another for the backward."""

    forward: Backend
    backward: Backend
    DEVICES = ("cuda",)

    def status(self) -> str | None:
        return self.forward.status() or self.backward.status()

    def why_not(self, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
        return self.forward.why_not(query, key, window) or self.backward.why_not(query, key, window)

    @property
    def match(self) -> Callable[..., Outputs]:
        return self.forward.match

    @property
    def match_backward(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        return self.backward.match_backward

    @property
    def mean_match(self) -> Callable[..., Outputs] | None:
        return getattr(self.forward, "mean_match", None)

    @property
    def mean_match_backward(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        return getattr(self.backward, "mean_match_backward", None)

    @property
    def outputs(self) -> Callable[..., Outputs]:
        return getattr(self.forward, "outputs", outputs)


@dataclass(frozen=True)
class BackendStatus:
    """One backend and, if it cannot run, the reason.

    `negatives` names the backend that computes the negatives of `wla_contrast` where this one is
    chosen: itself, or "reference" where it has no kernels for them yet.
    """

    name: str
    reason: str | None
    negatives: str = "reference"

    @property
    def available(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.name:10} no: {self.reason}"
        elsewhere = f"; negatives of wla_contrast: {self.negatives}"
        return f"{self.name:10} available" + elsewhere * (self.negatives != self.name)


def get(name: str) -> Backend:
    """The backend of that name; an unknown name is a ValueError."""
    if name in MIXED:
        return Mixed(*(BACKENDS[part] for part in name.split("+")))
    try:
        return BACKENDS[name]
    except KeyError:
        known = ", ".join((*BACKENDS, *MIXED))
        raise ValueError(
            f"unknown backend {name!r}; expected one of {known}, or None to choose"
        ) from None


def for_negatives(name: str) -> Negatives:
    """What computes the negatives of `wla_contrast` where the backend of that name is chosen."""
    chosen = get(name)
    return cast("Negatives", chosen if hasattr(chosen, "window_lse") else reference)


def _status(name: str, backend: Backend, reason: str | None) -> BackendStatus:
    return BackendStatus(name, reason, name if hasattr(backend, "window_lse") else "reference")


def statuses() -> tuple[BackendStatus, ...]:
    """Every backend in order of preference, and why it cannot run on this machine at all."""
    return tuple(_status(name, backend, backend.status()) for name, backend in BACKENDS.items())


def statuses_for(
    query: Tensor, key: Tensor | None, window: tuple[int, int]
) -> tuple[BackendStatus, ...]:
    """Every backend in order of preference, and why it cannot run this input."""
    return tuple(
        _status(name, backend, backend.why_not(query, key, window))
        for name, backend in in_order(query, key, window)
    )


def in_order(
    query: Tensor, key: Tensor | None, window: tuple[int, int]
) -> Iterable[tuple[str, Backend]]:
    """All backends, the preferred ones for this input first; see `measured`."""
    order = dict(BACKENDS)
    if query.device.type == "cuda" and key is None:
        first = fastest(query.dtype, window)
        order = {first: get(first), **order}
    return order.items()


def select(name: str | None, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str:
    """The name of the backend that runs this input."""
    if name is not None:
        reason = get(name).why_not(query, key, window)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} cannot run this input: {reason}; "
                f"use backend=None to take the first that can (salkernels.explain lists them)"
            )
        return name
    device = query.device.type
    for candidate, backend in in_order(query, key, window):
        devices = getattr(backend, "DEVICES", None)
        if devices is not None and device not in devices:
            continue  # without asking torch or a driver what is there: most calls end here
        if backend.why_not(query, key, window) is None:
            if backend is reference and not torch.compiler.is_compiling():
                slow.tell(query, BACKENDS)
            return candidate
    raise RuntimeError("no backend can run this input")


class _CallablePackage(ModuleType):
    """So that `salkernels.backends` is one thing: this package, and the function that lists it."""

    def __call__(self) -> tuple[BackendStatus, ...]:
        return statuses()


sys.modules[__name__].__class__ = _CallablePackage
