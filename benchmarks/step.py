"""Where the seconds of a pre-training step go: each part of it timed alone, at a preset's size.

Every part runs on inputs of the size that it has in the step, forward and backward. The encoder
may be timed on fewer views than the step has (`--views`), and its time scaled: convolutions and
norms cost the same for each view, and those of the full presets take minutes on a CPU.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from salkernels import gp_loss, positional_positives, slice_pairs, wla_set_loss
from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import markdown_table

from .loading import preset_config, write_small_phantom
from .machine import conditions, describe, synchronise
from .measure import Settings
from .report import MACHINE, Results, Row, number

COLUMNS = (
    "preset", "part", "on", "seconds", "p20", "p80", "share_percent", "precision", "batch",
    "views_timed", *MACHINE,
)  # fmt: skip
Part = Callable[[], object]
WHOLE = "step"


def measure_step(
    label: str,
    settings: Settings,
    folder: Path,
    preset: str,
    data: Path | None = None,
    cache: Path | None = None,
    views: int = 0,
) -> str:
    """Writes `<label>-step.csv` and returns the table.

    views: how many of the views the encoder is timed on; 0: all.
    """
    rows = step_rows(settings, preset, data, cache, views)
    Results(folder / f"{label}-step.csv", COLUMNS, ("preset", "part")).add(rows)
    table = _table(rows)
    write_atomically(folder / f"{label}-step-{preset}.md", table)
    return table


def step_rows(
    settings: Settings,
    preset: str,
    data: Path | None = None,
    cache: Path | None = None,
    views: int = 0,
) -> list[Row]:
    """A row for each part, and one for their sum; arguments as those of `measure_step`."""
    from salkernels.training.device import NAMES, Device

    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        config = preset_config(preset, data or write_small_phantom(where), cache or where / "cache")
        config.device = settings.device
        device = Device.of(config)
        parts = Parts(config, device, min(views or 2 * config.slices, 2 * config.slices))
        times = _timed(parts, settings)
    machine = describe(settings.device, settings.threads)
    common = {
        **machine, "preset": preset, "precision": NAMES[device.dtype],
        "batch": str(2 * config.slices), "views_timed": str(parts.views),
    }  # fmt: skip
    return [{**common, **row} for row in _rows(times, parts)]


class Parts:
    """The parts of a step, on inputs of their own; `places` says where each computes."""

    def __init__(self, config: Any, device: Any, views: int) -> None:
        """views: how many of the step's views the encoder is timed on."""
        from salkernels.training.data.sampling import TwoSubjects
        from salkernels.training.inputs import open_dataset, subjects
        from salkernels.training.methods import SAL

        self.config, self.device, self.views = config, device, views
        self.scale = 2 * config.slices / views
        cache = open_dataset(config)
        self.dataset = TwoSubjects(cache, subjects(config, cache), config.slices, config.seed)
        self.batch = self.dataset[0]
        torch.manual_seed(0)
        self.method = device.to(SAL(config.model, config.sal, None))
        self.images = torch.randn(views, 1, config.crop, config.crop, device=device.device)
        channels = config.model.channels[config.sal.scale - 1]
        side = config.crop // 2 ** (config.sal.scale - 1)
        dtype = device.dtype
        self.features = torch.randn(
            2 * config.slices, channels, side, side, device=device.device, dtype=dtype
        ).contiguous(memory_format=torch.channels_last)
        self.embeddings = torch.randn(2 * config.slices, config.sal.projection_dim)
        self.embeddings = self.embeddings.to(device.device)
        self.volume = self.batch.volume.repeat_interleave(2)
        self.index = self.batch.slice_index.repeat_interleave(2)
        self.depth = self.batch.num_slices.repeat_interleave(2)
        self.optimiser = torch.optim.SGD(self.method.parameters(), lr=1e-6, momentum=0.9)
        for parameter in self.method.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.step = 0

    def all(self) -> dict[str, tuple[str, float, Part]]:
        """name -> where it computes, the factor on its time, and what to run."""
        place = self.device.device.type
        return {
            "loading": ("cpu", 1, self.load),
            "augmentation": (place, 1, self.augment),
            "encoder": (place, self.scale, self.encode),
            "embedding E": (place, 1, self.embed),
            "GP": (place, 1, self.gp),
            "LA": (place, 1, self.la),
            "optimiser": (place, 1, self.update),
        }

    def load(self) -> None:
        self.step += 1
        self.batch = self.dataset[self.step]

    def augment(self) -> None:
        from salkernels.training.device import step_generator
        from salkernels.training.views import make_views

        device = self.device.device
        make_views(self.batch, self.config, device, step_generator(0, self.step, device))

    def encode(self) -> None:
        with self.device.autocast():
            maps = self.method.encoder(self.images)
            loss = maps[self.config.sal.scale - 1].float().mean() + maps[-1].float().mean()
        self._backward(loss)

    def embed(self) -> None:
        with self.device.autocast():
            embedded = self.method.embedding(self.features.detach().requires_grad_())
        self._backward(embedded.float().mean())

    def gp(self) -> None:
        positives = positional_positives(self.index.double() / self.depth, self.config.sal.t)
        rows = self.embeddings.detach().requires_grad_()
        self._backward(gp_loss(rows, positives, self.config.sal.temperature))

    def la(self) -> None:
        pairs = slice_pairs(self.volume, self.index, self.depth, self.config.sal.near)
        features = self.features.detach().requires_grad_()
        self._backward(wla_set_loss(features, pairs, self.config.sal.window_size))

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip)
        self.optimiser.step()

    def _backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # an embedding may be none
            loss.backward()


def _timed(parts: Parts, settings: Settings) -> dict[str, list[float]]:
    """Seconds of each part in each round; in a new random order every round."""
    chosen = parts.all()
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _, _, run in chosen.values():
        run()  # compilation, memory, the page cache
    synchronise(settings.device)
    for index in range(2 if settings.quick else 7):
        order = list(chosen)
        random.Random(index).shuffle(order)
        for name in order:
            _, factor, run = chosen[name]
            began = time.perf_counter()
            run()
            synchronise(settings.device)
            times[name].append(factor * (time.perf_counter() - began))
    return times


def _rows(times: dict[str, list[float]], parts: Parts) -> list[Row]:
    quantiles = {name: np.quantile(seconds, (0.2, 0.5, 0.8)) for name, seconds in times.items()}
    whole = sum(float(found[1]) for found in quantiles.values())
    rows: list[Row] = [
        {
            "part": name,
            "on": parts.all()[name][0],
            "seconds": number(float(middle)),
            "p20": number(float(low)),
            "p80": number(float(high)),
            "share_percent": number(100 * float(middle) / whole),
        }
        for name, (low, middle, high) in quantiles.items()
    ]
    return [*rows, {"part": WHOLE, "on": "", "seconds": number(whole), "share_percent": "100"}]


def _table(rows: list[Row]) -> str:
    first = rows[0]
    heading = ["part", "on", "s", "20–80 %", "share"]
    spreads = [f"{row['p20']}–{row['p80']}" if "p20" in row else "" for row in rows]
    cells = [
        [row["part"], row["on"], row["seconds"], spread, f"{row['share_percent']} %"]
        for row, spread in zip(rows, spreads, strict=True)
    ]
    return (
        f"Parts of a step of SAL, preset {first['preset']}, {first['batch']} views, "
        f"{first['precision']}, each timed alone (median of rounds); the encoder on "
        f"{first['views_timed']} views, scaled. {conditions(first)}\n\n"
        f"{markdown_table([heading, *cells], 'llrrr')}\n"
    )
