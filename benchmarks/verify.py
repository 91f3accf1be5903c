"""Right before fast: each result against the definition in float64, and the bounds it must keep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from salkernels import wla_set_loss

from .cases import FP16_SCALE, Case


class Truth(NamedTuple):
    """Loss and gradient of the definition, in float64 from the features as the case rounds them."""

    loss: Tensor  # scalar
    grad: Tensor  # (S, C, H, W)


class Errors(NamedTuple):
    loss: float  # relative
    grad: float  # L2 norm of the difference over that of the gradient; 0 if there is none


class Bounds(NamedTuple):
    loss: float
    grad: float


# The row-max jumps: where two keys are equally near within rounding, another match is as good, and
# one flip in N = P·H·W moves the gradient by about sqrt(2 / N) of its norm. Bounds on the
# gradient leave room for a few flips; a missing role, factor or projection is off by far more.
BOUNDS = {
    "float64": Bounds(1e-10, 1e-8),  # no flips: ties within 1e-16 do not occur in random numbers
    "float32": Bounds(1e-5, 5e-3),  # sums of C products of 6e-8; up to ten flips at "paper"
    "float16": Bounds(2e-3, 2e-2),  # unit vectors of peers are rounded to 2^-11, and so flip often
    "bfloat16": Bounds(1e-2, 6e-2),  # the same at 2^-8, and so is the gradient
}


def truth(case: Case, device: str) -> Truth:
    """The reference backend on the case's features, in float64."""
    problem = case.problem(device)
    features = problem.features.detach().double().requires_grad_()
    loss = wla_set_loss(features, problem.pairs, problem.window, backend="reference")
    (grad,) = torch.autograd.grad(loss, features)
    if case.dtype == "float16":
        grad *= FP16_SCALE
    return Truth(loss.detach(), grad)


def errors(expected: Truth, loss: Tensor, grad: Tensor | None) -> Errors:
    """How far a result is from the truth; NaN wherever it is not finite."""
    loss_error = (loss.detach().double().cpu() - expected.loss.cpu()).abs() / expected.loss.cpu()
    if grad is None:
        return Errors(float(loss_error), 0.0)
    if grad.shape != expected.grad.shape:
        raise ValueError(f"gradient of shape {tuple(grad.shape)}, not {tuple(expected.grad.shape)}")
    difference = grad.detach().double().sub_(expected.grad.to(grad.device))
    ratio = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected.grad)
    return Errors(float(loss_error), float(ratio))


def complaint(found: Errors, dtype: str) -> str | None:
    """Why a result does not count, None if it does. NaN never does."""
    bounds = BOUNDS[dtype]
    if not found.loss <= bounds.loss:
        return f"relative error of the loss {found.loss:.1e} > {bounds.loss:.0e}"
    if not found.grad <= bounds.grad:
        return f"relative error of the gradient {found.grad:.1e} > {bounds.grad:.0e}"
    return None
