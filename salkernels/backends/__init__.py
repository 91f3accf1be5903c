"""Which implementation runs a call: an order of backends, each of which can say why it cannot.

A backend is a module of this package with

    why_not(query, key, window) -> str | None       why it cannot run this input; None: it can
    status() -> str | None                          the same question without an input
    match(...), match_backward(...)                 as in `salkernels.reference`

and, if it has kernels of its own for the negatives of `wla_contrast`,

    window_lse(...), window_lse_backward(...)       as in `salkernels.reference_contrast`

and, if it takes tensors of some types of device only,

    DEVICES                                         their names: None does not even ask on others

and, if its outputs lie otherwise than plain contiguous tensors, or with norms,

    outputs(query, key, pairs, window)              them, uninitialised, as `reference.outputs`

An explicit name runs that backend or raises with its reason; `None` takes the first that can.

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

from ..reference import Outputs
from . import cpu, cuda, reference, triton


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
CUDA_TILE = 128  # rows; kTile of csrc/cuda/problem.h


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
    try:
        return BACKENDS[name]
    except KeyError:
        raise ValueError(
            f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}, or None to choose"
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
    """All backends, the preferred ones for this input first.

    Of the two for GPUs `cuda` comes first where all rows of a window fit a tile of its backward:
    both passes then read each feature from memory once, with no compilation at the first call.
    Beyond that both passes of `cuda` together read features 3.1 to 3.9 times, those of `triton` 3.0
    to 3.4 times, and its backward, the longer of the two, works by tiles and not row by row. This
    is what benchmarks/results/traffic.md counts; neither was timed, and it is a close call.
    """
    if query.device.type != "cuda" or not _beyond_a_tile(query, key, window):
        return BACKENDS.items()
    swapped = {"cuda": "triton", "triton": "cuda"}
    return [(name, BACKENDS[name]) for name in (swapped.get(n, n) for n in BACKENDS)]


def _beyond_a_tile(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> bool:
    """Whether a window of all samples (of two, in the pairwise form) is larger than a tile.

    Of symbolic sizes that is not known, and not asked: the answer would tie a graph to it.
    """
    samples = query.shape[0] if key is None else 2
    beyond = samples * window[0] * window[1] > CUDA_TILE
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(beyond)
    return beyond


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
            return candidate
    raise RuntimeError("no backend can run this input")


class _CallablePackage(ModuleType):
    """So that `salkernels.backends` is one thing: this package, and the function that lists it."""

    def __call__(self) -> tuple[BackendStatus, ...]:
        return statuses()


sys.modules[__name__].__class__ = _CallablePackage
