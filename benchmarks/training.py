"""The loss's share of a pre-training step at the scale of the `desk` preset, backend by backend.

A step is encoder, heads, loss, backward and optimiser on 2n = 32 views of 96 x 96 pixels; reading
and augmenting slices is left out, since it overlaps or depends on the disk. The share is the time
of the alignment loss alone, forward and backward on the same features, over that of the step.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from salkernels import backends, slice_pairs
from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import markdown_table

from .cases import THRESHOLD, Problem
from .machine import conditions, describe, synchronise
from .measure import Settings, run_once
from .provider import Provider
from .providers import providers
from .report import MACHINE, Results, Row, number
from .verify import BOUNDS

COLUMNS = (
    "loss", "window", "step_ms", "step_p20_ms", "step_p80_ms", "alignment_ms", "share_percent",
    "status", "reason", *MACHINE,
)  # fmt: skip
EXTRA = ("naive", "gram")  # what the step would cost without this package


class Shape(NamedTuple):
    """The size of a pre-training step."""

    slices: int  # n, of two scans; the step has 2n views
    crop: int  # pixels of a side
    width: int  # channels of the first level
    depth: int = 5
    threshold: float = THRESHOLD


# By preset of salkernels.training.
SHAPES = {
    "desk": Shape(16, 96, 16),
    "acdc": Shape(32, 352, 48),
    "chd": Shape(32, 512, 32, threshold=0.1),
}
QUICK_SHAPE = Shape(4, 32, 4, 4)


def problem_of(features: Tensor, pairs: Tensor, window: int) -> Problem:
    query, key = (place.to(features.device) for place in pairs.nonzero(as_tuple=True))
    return Problem(features, pairs.cpu(), query, key, window)


class Step:
    """A pre-training step on random views; the same weights and views for every loss.

    Args:
        provider: of the alignment loss; None leaves the method as it is, which takes the first
            backend that can run.
        settings: device and threads.
        window: ω.
        shape: of the step.
        lambda_: weight of the alignment loss; 0 leaves it out.
        autocast: compute the step in bfloat16.
    """

    def __init__(
        self,
        provider: Provider | None,
        settings: Settings,
        window: int,
        shape: Shape,
        lambda_: float = 1.0,
        autocast: bool = False,
    ) -> None:
        from salkernels.training.methods import SAL, SALConfig, Views
        from salkernels.training.models import UNetConfig

        torch.manual_seed(0)
        model = UNetConfig(width=shape.width, depth=shape.depth)
        self.threshold = shape.threshold
        choices = SALConfig(window_size=window, t=shape.threshold, lambda_=lambda_)
        method = SAL(model, choices, corpus=None)
        self.expected = provider is not None and lambda_ > 0
        self.calls = 0
        self.alike: Problem | None = None

        def align(
            features: Tensor, valid: Tensor | None, pairs: Tensor, negatives: Tensor | None = None
        ) -> Tensor:
            assert valid is None, "views with one geometry are compared in every pixel"
            assert negatives is None, "the paper's LA is no contrast"
            assert provider is not None
            self.calls += 1
            if self.alike is None:  # views, and so pairs, are those of the first step
                self.alike = problem_of(features, pairs, window)
            return provider.run(self.alike._replace(features=features))

        if provider is not None:
            method.align = align
        device = torch.device(settings.device)
        self.precision = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
        self.method = method.to(device, memory_format=torch.channels_last)
        slices, crop = shape.slices, shape.crop
        half = torch.arange(slices // 2)
        samples = {
            "volume": torch.tensor([0, 1]).repeat_interleave(slices // 2),
            "slice_index": half.repeat(2),
            "num_slices": torch.full((slices,), slices // 2),
            "sample": torch.arange(slices),
        }
        # Both views of a slice side by side, and all but the images on the CPU: as in training.
        columns = {name: column.repeat_interleave(2) for name, column in samples.items()}
        images = torch.randn(2 * slices, 1, crop, crop).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        self.views = Views(images, **columns, generator=torch.Generator(device))
        self.optimiser = torch.optim.SGD(self.method.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> Tensor:
        self.optimiser.zero_grad()
        with self.precision:
            loss: Tensor = self.method(self.views).loss
        assert self.calls or not self.expected, (
            "the step does not take its alignment loss from the provider"
        )
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def problem(self, window: int) -> Problem:
        """The alignment loss's own input in this step."""
        with torch.no_grad():
            features = self.method(self.views).maps["embedding"]
        v = self.views
        pairs = slice_pairs(v.volume, v.slice_index, v.num_slices, self.threshold)
        return problem_of(features.detach().requires_grad_(), pairs, window)


def measure_training(label: str, settings: Settings, folder: Path, window: int = 2) -> str:
    """Writes `<label>-training.csv` and returns the table."""
    torch.set_num_threads(settings.threads)
    chosen = [*EXTRA, *(f"salkernels-{status.name}" for status in backends() if status.available)]
    found = {name: providers()[name] for name in chosen}
    shape = QUICK_SHAPE if settings.quick else SHAPES["desk"]
    steps = {name: Step(provider, settings, window, shape) for name, provider in found.items()}
    problem = next(iter(steps.values())).problem(window)
    # The first step of each starts from the same weights: its loss must be the same.
    first = {name: float(step()) for name, step in steps.items()}
    expected = first["salkernels-reference"]
    good = [
        name for name in chosen if abs(first[name] - expected) <= BOUNDS["float32"].loss * expected
    ]
    times: dict[tuple[str, str], list[float]] = {}
    order = [(name, what) for name in good for what in ("step", "alignment")]
    for index in range(2 if settings.quick else 20):
        random.Random(index).shuffle(order)
        for name, what in order:
            alone = functools.partial(run_once, found[name], problem, "both")
            run: Callable[[], object] = steps[name] if what == "step" else alone
            times.setdefault((name, what), []).append(_seconds(run, settings.device))
    machine = describe(settings.device, settings.threads)
    rows = []
    for name in chosen:
        row = {**machine, "loss": name, "window": str(window)}
        if name in good:
            rows.append({**row, **_figures(times[name, "step"], times[name, "alignment"])})
        else:
            reason = f"first loss {first[name]:.6g}, expected {expected:.6g}"
            rows.append({**row, "status": "wrong", "reason": reason})
    results = Results(folder / f"{label}-training.csv", COLUMNS, ("loss", "window"))
    results.add(rows)
    table = _table(rows, problem)
    write_atomically(results.path.with_suffix(".md"), table)
    return table


def _seconds(run: Callable[[], object], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def _figures(step: list[float], alignment: list[float]) -> Row:
    low, middle, high = (float(q) * 1e3 for q in np.quantile(step, (0.2, 0.5, 0.8)))
    alone = float(np.median(alignment)) * 1e3
    return {
        "step_ms": number(middle),
        "step_p20_ms": number(low),
        "step_p80_ms": number(high),
        "alignment_ms": number(alone),
        "share_percent": number(100 * alone / middle),
        "status": "ok",
    }


def _table(rows: list[Row], problem: Problem) -> str:
    shape = " x ".join(str(extent) for extent in problem.features.shape)
    heading = ["loss", "step ms (20–80 %)", "alignment loss alone ms", "share of the step"]
    cells = [
        [row["loss"], f"{row['step_ms']} ({row['step_p20_ms']}–{row['step_p80_ms']})",
         row["alignment_ms"], f"{row['share_percent']} %"]
        if row["status"] == "ok"
        else [row["loss"], f"{row['status']}: {row['reason']}", "", ""]
        for row in rows
    ]  # fmt: skip
    return (
        f"Step of pre-training, alignment loss on {shape}, window {problem.window}, "
        f"{len(problem.query)} pairs; {conditions(rows[0])}\n\n"
        f"{markdown_table([heading, *cells], 'lrrr')}\n"
    )
