"""Measurements as rows of a CSV file, with the columns of `report`."""

from __future__ import annotations

import numpy as np

from .cases import Case
from .machine import Rates
from .measure import Job, Times, Trial
from .report import Row, number

PASSES = {"forward": ("forward",), "both": ("backward", "both")}


def common(suite: str, case: Case, machine: Row) -> Row:
    """The columns that all rows of a case share."""
    return {
        **machine,
        "suite": suite,
        "case": case.key,
        "samples": str(case.samples),
        "channels": str(case.channels),
        "height": str(case.height),
        "width": str(case.width),
        "window": str(case.window),
        "pairs": str(case.num_pairs),
        "dtype": case.dtype,
        "layout": case.layout,
        "features_mb": number(case.feature_bytes / 1e6),
    }


def failed(shared: Row, job: Job, trial: Trial) -> list[Row]:
    """The rows of a job without times; `shared` as `common` has made it."""
    row = {
        **shared,
        "provider": job.provider,
        "status": trial.status,
        "reason": trial.reason,
        "loss_error": number(trial.errors.loss),
        "grad_error": number(trial.errors.grad),
    }
    return [{**row, "pass": name} for name in PASSES[job.mode]]


def timed(
    shared: Row, case: Case, job: Job, trial: Trial, times: Times, rates: Rates | None
) -> list[Row]:
    """One row per pass of a job."""
    row = {
        **shared,
        "provider": job.provider,
        "status": "ok",
        "peak_mb": number(trial.peak / 1e6),
        "copy_gb_per_s": number(rates.copy if rates else float("nan")),
        "gemm_gflop_per_s": number(rates.gemm if rates else float("nan")),
        "loss_error": number(trial.errors.loss),
        "grad_error": number(trial.errors.grad),
        "first_s": number(trial.first),
    }
    return [{**row, **_pass(case, name, times, rates)} for name in times.passes]


def _pass(case: Case, name: str, times: Times, rates: Rates | None) -> Row:
    low, middle, high = np.quantile(times.passes[name], (0.2, 0.5, 0.8))
    num_bytes, flops = case.bytes_moved(name), case.flops(name)
    floor = rates.floor(num_bytes, flops) if rates else float("nan")
    host = times.host.get(name)
    return {
        "pass": name,
        "rounds": str(len(times.passes[name])),
        "median_ms": number(middle * 1e3),
        "p20_ms": number(low * 1e3),
        "p80_ms": number(high * 1e3),
        "gb_per_s": number(num_bytes / middle / 1e9),
        "gflop_per_s": number(flops / middle / 1e9),
        "floor_ms": number(floor * 1e3),
        "times_floor": number(middle / floor),
        "host_us": number(float(np.median(host)) * 1e6) if host else "",
        # One graph holds the whole call; of the backward alone there is none.
        "graph_ms": "" if name == "backward" else number(times.graph * 1e3),
        "queued": ("yes" if times.queued else "no") if host else "",
    }
