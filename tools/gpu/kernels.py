"""Time on the GPU kernel by kernel: by torch's profiler, and in depth by Nsight Compute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

import salkernels
from benchmarks.cases import ACDC, PAPER, QUICK, Case

from . import counters
from .record import Context
from .timing import wanted

ROOT = Path(__file__).resolve().parents[2]
CALLS = 5
OURS = (
    "regex:salkernels_|"
    "(match|norm|loss|gradient|gradient_across|plan|partners|count|list|sum)_kernel"
)
# What says why a kernel is as slow as it is, in a third of the passes of the full set.
SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "InstructionStats", "LaunchStats", "Occupancy",
)  # fmt: skip
CLOSING = 15  # seconds in which ncu writes what it has found
REPORT = "kernels.ncu-rep"


def cases(on_gpu: bool, parts: tuple[str, ...] = ()) -> list[Case]:
    """Those whose keys contain one of the parts; all if there are none."""
    if not on_gpu:
        return [QUICK]
    half = replace(PAPER, dtype="bfloat16")
    wide = [replace(PAPER, window=6), replace(half, window=22), replace(PAPER, window=3)]
    found = [PAPER, half, replace(ACDC, order="scans"), *wide]
    return [case for case in found if wanted(case, parts)]


def step_of(case: Case, backend: str, device: str) -> Callable[[], object]:
    """Forward and backward."""
    problem = case.problem(device)

    def run() -> object:
        loss = salkernels.wla_set_loss(
            problem.features, problem.pairs, problem.window, backend=backend
        )
        return problem.gradient(loss)

    return run


def kernels(context: Context) -> None:
    activity = ProfilerActivity.CUDA if context.on_gpu else ProfilerActivity.CPU
    for case in cases(context.on_gpu, context.cases):
        for name in context.backends:
            label = f"{case.key} {name}"
            if label in context.finished:
                continue
            context.need(3, label)
            with context.measuring(label, case=case.key, backend=name) as row:
                run = step_of(case, name, context.device)
                run()
                context.synchronise()
                with profile(activities=[activity]) as seen:
                    for _ in range(CALLS):
                        run()
                    context.synchronise()
                row["us"] = _by_kernel(seen, context.on_gpu)


def _by_kernel(seen: profile, on_gpu: bool) -> dict[str, float]:
    """Microseconds of a call by kernel, the ten longest, longest first."""
    found = {}
    for event in seen.key_averages():
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if total > 0:
            found[event.key[:60]] = total / CALLS
    longest = sorted(found, key=lambda name: -found[name])[:10]
    return {name: found[name] for name in longest}


def ncu(context: Context) -> None:
    """Nsight Compute on the main kernels; in a rehearsal what it would look at."""
    target = [sys.executable, "-m", "tools.gpu", "step", "inspected", "--device", context.device]
    target += ["--out", str(context.folder), "--seconds", f"{context.left - CLOSING:.1f}"]
    target += ["--cases", *context.cases] if context.cases else []
    label = " ".join(("inspected", *context.cases))
    if label in context.finished:
        return
    with context.measuring(label) as row:
        if not context.on_gpu:
            subprocess.run(target, cwd=ROOT, check=True)
            return
        if shutil.which("ncu") is None:
            raise FileNotFoundError("ncu is not on the PATH; it comes with CUDA's toolkit")
        report = context.folder / REPORT
        words = ["ncu", "--clock-control", "none", "--import-source", "no"]
        words += [word for section in SECTIONS for word in ("--section", section)]
        words += ["-k", OURS, "-f", "-o", str(report), *target]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
        if done.returncode or not report.exists():
            said = (done.stdout + done.stderr).strip().splitlines()
            raise RuntimeError(f"ncu ended with {done.returncode}: {' '.join(said[-3:])}")
        words = ["ncu", "--import", str(report), "--page", "raw", "--csv"]
        raw = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        row["kernels"] = counters.rows_of(raw, counters.labels_of(done.stdout))
        counters.write(context.folder, row["kernels"])


def inspected(context: Context) -> None:
    """What ncu looks at: one call of each backend, in the order of worth."""
    for case in cases(context.on_gpu, context.cases):
        for name in context.backends:
            if context.left < 1:
                print(f"out of time before {case.key} {name}", flush=True)
                return
            step_of(case, name, context.device)()
            context.synchronise()
            print(f"{case.key} {name}", flush=True)
