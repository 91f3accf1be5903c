"""Can the data keep up? Samples per second of loading and augmentation, without any training.

A sample is one augmented view, of which a step of n slices has 2n. Loading is what happens on the
CPU before a batch reaches the loop, in 0, 1 or 2 worker processes; augmentation is on the device.
Both together are the rate that a GPU must stay below to be kept busy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import markdown_table

from .machine import conditions, describe, synchronise
from .measure import Settings
from .report import MACHINE, Results, Row, number

COLUMNS = (
    "preset", "workers", "what", "batch", "crop", "samples_per_s", "p20", "p80", "batches",
    "scans", *MACHINE,
)  # fmt: skip
WORKERS = (0, 1, 2)
WARM = 3  # batches before the clock starts: workers start, the page cache fills


def measure_loading(
    label: str,
    settings: Settings,
    folder: Path,
    preset: str,
    data: Path | None = None,
    cache: Path | None = None,
) -> str:
    """Writes `<label>-loading.csv` and returns the table.

    data: folder in ACDC's layout; a small phantom, made for the occasion, if None.
    cache: of preprocessed slices; made for the occasion if None.
    """
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        config = preset_config(preset, data or write_small_phantom(where), cache or where / "cache")
        rows = list(_measure(config, settings))
    machine = describe(settings.device, settings.threads)
    named = [{**machine, "preset": preset, **row} for row in rows]
    results = Results(folder / f"{label}-loading.csv", COLUMNS, ("preset", "workers", "what"))
    results.add(named)
    table = _table(named)
    write_atomically(results.path.with_suffix(".md"), table)
    return table


def write_small_phantom(folder: Path) -> Path:
    from salkernels.training.data.phantom import write_phantom

    return write_phantom(folder / "phantom", subjects=6)


def preset_config(preset: str, data: Path, cache: Path) -> Any:
    from jsonargparse import ArgumentParser

    from salkernels.training.config import PretrainConfig
    from salkernels.training.presets import PRETRAIN

    if preset not in PRETRAIN:
        raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRETRAIN)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PretrainConfig)
    parser.set_defaults(PRETRAIN[preset])
    # Whatever the preset is of, the data are in this layout.
    settings = parser.parse_args([f"--data={data}", f"--cache={cache}", "--dataset=acdc"])
    return PretrainConfig(**vars(parser.instantiate(settings)))


def _measure(config: Any, settings: Settings) -> Iterator[Row]:
    from salkernels.training.data.sampling import TwoSubjects, batches
    from salkernels.training.device import step_generator
    from salkernels.training.inputs import open_dataset, subjects
    from salkernels.training.views import make_views

    cache = open_dataset(config)
    dataset = TwoSubjects(cache, subjects(config, cache), config.slices, config.seed)
    device = torch.device(settings.device)
    count = WARM + (5 if settings.quick else 60)
    common = {
        "batch": str(2 * config.slices), "crop": str(config.crop), "scans": str(len(cache.volumes)),
        "batches": str(count - WARM),
    }  # fmt: skip
    for workers in WORKERS:
        for what in ("loading", "loading + augmentation"):
            times = []
            began = time.perf_counter()
            for batch in batches(dataset, 0, count, workers):
                if what != "loading":
                    make_views(batch, config, device, step_generator(0, batch.step, device))
                    synchronise(settings.device)
                now = time.perf_counter()
                times.append(now - began)
                began = now
            rates = _rates(2 * config.slices, times[WARM:])
            yield {"workers": str(workers), "what": what, **common, **rates}


def _rates(samples: int, times: list[float]) -> Row:
    """Rate over all batches, since workers deliver in bursts, and percentiles of single batches."""
    low, high = np.quantile([samples / seconds for seconds in times], (0.2, 0.8))
    mean = samples * len(times) / sum(times)
    return {"samples_per_s": number(mean), "p20": number(low), "p80": number(high)}


def _table(rows: list[Row]) -> str:
    first = rows[0]
    heading = ["workers", "what", "views/s", "of single batches, 20–80 %"]
    cells = [
        [row["workers"], row["what"], row["samples_per_s"], f"{row['p20']}–{row['p80']}"]
        for row in rows
    ]
    return (
        f"Views per second, preset {first['preset']} ({first['batch']} views of {first['crop']} x "
        f"{first['crop']} per batch, {first['scans']} scans, {first['batches']} batches); "
        f"{conditions(first)}\n\n"
        f"{markdown_table([heading, *cells], 'rlrr')}\n"
    )
