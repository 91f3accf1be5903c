"""The providers of the loss: plain torch in three ways, torch.compile of each, peers, our backends.

Every provider is a function from a `Problem` to the mean loss over its pairs, differentiable with
respect to the features unless it says otherwise. Letters: P pairs, S samples, T windows of a map,
L pixels of a window, C channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

import salkernels

from .cases import Problem
from .peers import PEERS
from .provider import Provider, Run, to_windows, widen


def aligned(sim: Tensor) -> Tensor:
    """|1 - best match| of each row of similarities (..., L, L) -> (..., L)."""
    return (1 - sim.max(dim=-1).values).abs()


def naive(problem: Problem) -> Tensor:
    """The paper's formula, literally, for all pairs at once."""
    features = widen(problem.features)
    x = F.normalize(features[problem.query], dim=1)  # (P, C, H, W)
    y = F.normalize(features[problem.key], dim=1)
    x, y = to_windows(x, problem.window), to_windows(y, problem.window)  # (P, T, L, C)
    return aligned(x @ y.transpose(-1, -2)).mean()


def gather(problem: Problem) -> Tensor:
    """Normalises and cuts into windows once per sample instead of once per pair."""
    unit = F.normalize(widen(problem.features), dim=1)
    windows = to_windows(unit, problem.window)  # (S, T, L, C)
    return aligned(windows[problem.query] @ windows[problem.key].transpose(-1, -2)).mean()


def gram(problem: Problem) -> Tensor:
    """Window by window: one product of all samples with all, and no gather of features.

    The similarities are (T, S·L, S·L). All S² pairs are computed, which is cheaper than picking:
    the product is one large batched GEMM, and the pairs are picked from S² numbers at the end.
    """
    samples, pixels = problem.features.shape[0], problem.window**2
    unit = F.normalize(widen(problem.features), dim=1)
    windows = to_windows(unit, problem.window)  # (S, T, L, C)
    rows = windows.transpose(0, 1).flatten(1, 2)  # (T, S·L, C)
    sim = rows @ rows.transpose(-1, -2)
    sim = sim.unflatten(2, (samples, pixels)).unflatten(1, (samples, pixels))  # (T, S, L, S, L)
    per_pair = aligned(sim).mean(dim=(0, 2))  # (S, S)
    return per_pair[problem.query, problem.key].mean()


# Backends that compile their kernels at the first call of a shape in a process.
COMPILING = ("triton",)


def backend_provider(name: str, reason: str | None) -> Provider:
    """A backend of this package, through its public function."""

    def run(problem: Problem) -> Tensor:
        return salkernels.wla_set_loss(
            problem.features, problem.pairs, problem.window, backend=name
        )

    compiles = name in COMPILING
    return Provider(f"salkernels-{name}", run, builds=compiles, eager_windows=False, reason=reason)


def compiled_provider(name: str, function: Run) -> Provider:
    """`torch.compile` of a function, specialised on the shape; compiled when first called."""

    @functools.cache
    def compiled() -> Run:
        return torch.compile(function, dynamic=False, fullgraph=True)

    return Provider(f"{name}-compiled", lambda problem: compiled()(problem), builds=True)


@functools.cache
def providers() -> dict[str, Provider]:
    """Every provider by name, whether it can run here or not."""
    found = [Provider(name, run) for name, run in EAGER.items()]
    found += [compiled_provider(name, run) for name, run in EAGER.items()]
    found += PEERS
    found += [backend_provider(b.name, b.reason) for b in salkernels.backends()]
    return {provider.name: provider for provider in found}


EAGER: dict[str, Run] = {"naive": naive, "gather": gather, "gram": gram}
# Compilers and peers take minutes per shape. Everybody runs on the first case of these suites;
# elsewhere it is plain torch, our backends, and whom the suite is of particular interest for.
FULL_SUITES = ("single", "quick", "paper", "desk")
ALSO = {
    "desk": ("gram-compiled",),
    "vanilla": ("keops", "late-interaction-padded", "maxsim-cpu"),  # made for large windows
}
ON_GPU = ("gram-compiled", "late-interaction-kernels", "flash-maxsim")


def names_for(suite: str, first: bool, device: str) -> list[str]:
    """The providers of a suite's first case, or of its other cases."""
    if first and suite in FULL_SUITES:
        return list(providers())
    wanted = {*EAGER, *ALSO.get(suite, ()), *(ON_GPU if device.startswith("cuda") else ())}
    return [name for name in providers() if name in wanted or name.startswith("salkernels-")]
