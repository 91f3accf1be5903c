"""Time of a pre-training step at the presets' sizes: by alignment loss, and by part."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import salkernels
from benchmarks.measure import Settings
from benchmarks.provider import Provider
from benchmarks.providers import providers

from .record import Context
from .timing import variants

STEPS, WARM_UP = 8, 2
WINDOW = 2


def find_training() -> None:
    """Lets `salkernels.training` be found in a source tree that was not installed."""
    if importlib.util.find_spec("salkernels.training") is None:
        salkernels.__path__.append(str(Path(__file__).resolve().parents[2]))


def losses(context: Context) -> Iterator[tuple[str, Provider | None, float]]:
    """Name, provider (None: the method's own choice) and weight, the costliest last."""
    yield "none", None, 0.0
    yield "own", None, 1.0
    for name in context.backends:
        yield name, providers()[f"salkernels-{name}"], 1.0
    yield "gram-half", variants([])["gram-half"], 1.0


def train(context: Context) -> None:
    find_training()
    from benchmarks.training import QUICK_SHAPE, SHAPES, Step

    shapes = {name: SHAPES[name] for name in ("acdc", "chd", "desk")}
    if not context.on_gpu:
        shapes = {"quick": QUICK_SHAPE}
    settings = Settings(context.device, torch.get_num_threads(), 0, STEPS, not context.on_gpu)
    for preset, shape in shapes.items():
        for loss, provider, weight in losses(context):
            label = f"{preset} {loss}"
            if label in context.finished:
                continue
            context.need(8 if context.on_gpu else 1, label)
            with context.measuring(label, preset=preset, loss=loss) as row:
                step = Step(provider, settings, WINDOW, shape, lambda_=weight, autocast=True)
                row.update(_timed(step, context))
                del step
            if context.on_gpu:
                torch.cuda.empty_cache()


def split(context: Context) -> None:
    """Where a step's time goes: loading, augmentation, encoder, heads, losses, optimiser."""
    find_training()
    from benchmarks.step import step_rows

    settings = Settings(context.device, torch.get_num_threads(), 0, 0, not context.on_gpu)
    for preset in ("acdc", "chd") if context.on_gpu else ("phantom",):
        if preset in context.finished:
            continue
        context.need(6 if context.on_gpu else 2, preset)
        with context.measuring(preset, preset=preset) as row:
            parts = step_rows(settings, preset)
            row["precision"] = parts[0]["precision"]
            row["ms"] = {part["part"]: float(part["seconds"]) * 1e3 for part in parts}


def _timed(step: object, context: Context) -> dict[str, float]:
    assert callable(step)
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = float(step())
    begin = time.perf_counter() - start
    for _ in range(WARM_UP):
        step()
    context.synchronise()
    count = STEPS if context.on_gpu else 2
    start = time.perf_counter()
    for _ in range(count):
        last = step()
    queued = time.perf_counter() - start
    context.synchronise()
    seconds = (time.perf_counter() - start) / count
    peak = torch.cuda.max_memory_allocated() / 1e9 if context.on_gpu else float("nan")
    return {
        "step_ms": seconds * 1e3,
        # Near step_ms, the host waits for the device, or the device for the host.
        "host_ms": queued / count * 1e3,
        "first_s": begin,
        "first_loss": first,
        "last_loss": float(last),
        **({"peak_gb": peak} if context.on_gpu else {}),
    }
