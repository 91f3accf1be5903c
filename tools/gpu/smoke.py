"""Each backend against the definition in float64, on small inputs of every form; and rounding."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from salkernels import reference
from salkernels.backends import get
from salkernels.reference import Outputs

from .inputs import BF16, EPS, F16, F32, F64, SMOKE, Call, call
from .record import Context

# Losses and maxima; gradients as one vector. As in tests/cuda, with room for a few flips.
BOUNDS = {F32: (1e-5, 1e-5), BF16: (1e-5, 5e-3), F16: (1e-5, 1e-3), F64: (1e-12, 1e-12)}
FLIPS = 2e-3  # share of matches that may differ: random features tie once in a long while


def smoke(context: Context) -> None:
    # All of one backend first: compiling the other's kernels may take the rest of the time.
    for name, form in itertools.product(context.backends, SMOKE):
        label = f"{form.key} {name}"
        if label in context.finished or (name == "triton" and form.dtype == F64):
            continue
        context.need(1, label)
        with context.measuring(label, backend=name) as row:
            row.update(against_definition(name, call(form, context.device), BOUNDS[form.dtype]))
            context.synchronise()


def against_definition(name: str, given: Call, bounds: tuple[float, float]) -> dict[str, object]:
    """Errors of loss, maxima and gradients, the share of other matches, and whether all is well."""
    backend, wide = get(name), given.widened()
    found = Outputs(*backend.match(*given))
    expected = reference.match(*wide)
    grad = torch.randn(found.max_sim.shape, generator=torch.Generator().manual_seed(3))
    grad = grad.to(found.max_sim)
    saved = (given.pairs, given.valid, *found[1:], given.window, given.eps)
    ours = backend.match_backward(grad, given.query, given.key, *saved)
    # From the same matches: where two keys are equally near, either is right.
    places = (given.pairs, given.valid, found.max_sim.double(), found.argmax, expected.norm)
    theirs = reference.match_backward(
        grad.double(), wide.query, wide.key, *places, given.window, given.eps
    )
    errors = {
        "loss": _largest(found.loss, expected.loss),
        "max_sim": _largest(found.max_sim, expected.max_sim),
        "grad": max(_relative(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None),
    }
    flips = float((found.argmax.long() != expected.argmax.long()).double().mean())
    value, gradient = bounds
    well = (
        errors["loss"] <= value
        and errors["max_sim"] <= value
        and errors["grad"] <= gradient
        and flips <= FLIPS
    )
    return {"ok": well, **errors, "argmax": flips}


def _largest(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max()) if actual.numel() else 0.0


def _relative(actual: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def numerics(context: Context) -> None:
    """Features that are nearly aligned, whose losses are near 0.

    Tensor cores cut off the bits below those of their largest product; the emulators that the
    kernels were developed on round. Only here does it show.
    """
    for dtype, noise, name in itertools.product((F32, BF16), (0.3, 0.03, 0.003), context.backends):
        label = f"{str(dtype)[6:]} noise {noise:g} {name}"
        if label in context.finished:
            continue
        context.need(1, label)
        with context.measuring(label, backend=name, dtype=str(dtype)[6:], noise=noise) as row:
            row.update(_nearly_aligned(name, dtype, noise, context.device))


def _nearly_aligned(name: str, dtype: torch.dtype, noise: float, device: str) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(samples: int) -> Tensor:
        return torch.randn(samples, 384, 8, 8, generator=generator, device=device)

    features = (drawn(1) + noise * drawn(8)).to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    pairs = (~torch.eye(8, dtype=torch.bool, device=device)).flatten().nonzero().squeeze(1)
    given = Call(features[None], None, pairs, None, (2, 2), EPS)
    found = Outputs(*get(name).match(*given))
    expected = reference.match(*given.widened())
    error = found.max_sim.double() - expected.max_sim
    relative = (found.loss.double() - expected.loss).abs() / expected.loss
    return {
        "loss": float(expected.loss.mean()),
        "loss_relative": float(relative.max()),
        "bias": float(error.mean()),
        "largest": float(error.abs().max()),
        "above_one": float((found.max_sim > 1).double().mean()),
    }
