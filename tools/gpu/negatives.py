"""The negatives of `wla_contrast`: each backend against float64 on small inputs, then its times."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

import salkernels
from benchmarks.cases import LAYOUTS, PAPER, QUICK, Case
from benchmarks.clock import Mark, Stopwatch, queue_for
from salkernels import reference_contrast
from salkernels.backends import for_negatives

from .inputs import BF16, F16, Call, Form, call
from .record import Context, Row
from .smoke import BOUNDS

TAU = 0.1
ROUNDS = 10
FORMS = [
    Form(1, 6, 0, 32, 8, 8, (2, 2)),
    Form(1, 32, 0, 384, 4, 4, (2, 2)),
    Form(1, 32, 0, 384, 4, 4, (2, 2), BF16),
    Form(1, 6, 0, 33, 7, 7, (2, 2), F16),
    Form(2, 3, 5, 24, 6, 10, (5, 5), layout="nchw", valid=0.6),
    Form(1, 3, 0, 50, 24, 13, (12, 12), BF16),
    Form(1, 9, 0, 16, 2, 3, (1, 1)),
]


def timed(on_gpu: bool) -> list[Case]:
    """The paper's maps; what is no positive is a negative."""
    return [PAPER, replace(PAPER, dtype="bfloat16")] if on_gpu else [QUICK]


def negatives(context: Context) -> None:
    """By backend that is chosen for the matches; `by` names the one that takes the negatives."""
    for form, name in itertools.product(FORMS, context.backends):
        label = f"{form.key} {name}"
        if label in context.finished:
            continue
        context.need(1, label)
        with context.measuring(label, backend=name) as row:
            row.update(against_definition(name, call(form, context.device), BOUNDS[form.dtype]))
            context.synchronise()
    names = [*context.backends, "reference"] if context.on_gpu else context.backends
    for case, name in itertools.product(timed(context.on_gpu), names):
        label = f"{case.key} {name}"
        if label in context.finished:
            continue
        context.need(3 if context.on_gpu else 1, label)
        with context.measuring(label, case=case.key, backend=name) as row:
            row.update(times(context, case, name))


def against_definition(name: str, given: Call, bounds: tuple[float, float]) -> Row:
    """Errors of the log-sum-exp, in cosines, and of the gradients; and whether all is well."""
    backend, wide = for_negatives(name, given.query, given.key, given.window), given.widened()
    among, window, eps = (given.pairs, given.valid), given.window, given.eps
    found = backend.window_lse(given.query, given.key, *among, window, TAU, eps)
    expected = reference_contrast.window_lse(wide.query, wide.key, *among, window, TAU, eps)
    same = torch.equal(found == -torch.inf, expected == -torch.inf)
    finite = expected.isfinite()
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(found)
    ours = backend.window_lse_backward(
        grad, given.query, given.key, *among, found, window, TAU, eps
    )
    theirs = reference_contrast.window_lse_backward(
        grad.double(), wide.query, wide.key, *among, expected, window, TAU, eps
    )
    error = float((found.double() - expected)[finite].abs().max()) * TAU
    off = max(_relative(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)
    well = same and error <= bounds[0] and off <= bounds[1]
    return {"ok": well, "lse": error, "grad": off, "by": getattr(backend, "__name__", name)}


def _relative(actual: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def times(context: Context, case: Case, name: str) -> dict[str, float]:
    """Milliseconds of the device for a forward and a backward of `wla_contrast`."""
    shape = (case.samples, case.channels, case.height, case.width)
    features = torch.randn(shape, device=context.device).to(case.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[case.layout]).requires_grad_()

    def run(mark: Mark) -> Tensor:
        loss = salkernels.wla_contrast(
            features, case.pairs, ~case.pairs, case.window, TAU, backend=name
        )
        mark()
        loss.backward()
        return loss

    watch = Stopwatch(queue_for(context.device))
    for _ in range(2):  # compiles, if it must
        watch.time(run)
    rounds = [watch.time(run).device for _ in range(ROUNDS if context.on_gpu else 2)]
    forward, backward = (median(parts) * 1e3 for parts in zip(*rounds, strict=True))
    return {"forward_ms": forward, "backward_ms": backward}
