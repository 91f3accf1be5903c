"""The machine: what has been measured means nothing without it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

import torch

import salkernels
from benchmarks.machine import describe
from salkernels.__main__ import report as text

from . import triton_cache
from .record import Context

PACKAGES = ("numpy", "triton", "monai", "nibabel", "late-interaction-kernels", "flash-maxsim")
QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu",
         "power.draw", "power.limit")  # fmt: skip


def report(context: Context) -> None:
    """Also fails where the GPU cannot be used: then no other step means anything."""
    print(text(), flush=True)
    with context.measuring("machine") as row:
        row.update(describe(context.device, torch.get_num_threads()))
        row["packages"] = {name: _version(name) for name in PACKAGES}
        row["backends"] = {s.name: s.reason or "available" for s in salkernels.backends()}
        if context.on_gpu:
            row["gpu"] = _gpu()
    with context.measuring("triton") as row:
        here = triton_cache.facts()
        row.update(here)
        if (line := triton_cache.compared(here)) is not None:
            row["pack"] = line
            print(line, flush=True)
    if context.on_gpu and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --device cpu rehearses without one")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    found: dict[str, object] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": properties.L2_cache_size / 1e6,
        "memory_gb": properties.total_memory / 1e9,
    }
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True)
        values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 else []
        found |= dict(zip(QUERY, values, strict=False))
    return found
