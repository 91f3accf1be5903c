"""The machine: its own copy bandwidth and matrix rate, and what a row must say about it."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import salkernels
from salkernels._shared.revision import commit

PACKAGES = ("pykeops", "late-interaction-kernels", "flash-maxsim", "maxsim-cpu", "triton")
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far beyond any cache
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}


class Rates(NamedTuple):
    """What the machine reaches in plain torch, measured beside the providers."""

    copy: float  # GB/s, read plus written
    gemm: float  # GFLOP/s of a square product in the case's dtype

    def floor(self, num_bytes: int, flops: int) -> float:
        """Seconds below which the work cannot be done: the roofline."""
        return max(num_bytes / (self.copy * 1e9), flops / (self.gemm * 1e9))


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_rates(device: str, dtype: torch.dtype, quick: bool = False) -> Rates:
    """Copy of a large buffer and a square GEMM; the median of a few each.

    On a CPU half-precision input is multiplied in fp32, as the contract wants, so that is the rate.
    """
    kind = torch.device(device).type
    if kind == "cpu" and dtype.itemsize == 2:
        dtype = torch.float32
    shrink = 16 if quick else 1
    source = torch.ones(COPY_BYTES[kind] // shrink, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = GEMM_SIDE[kind] // (8 if quick else 1)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    copy = _seconds(lambda: target.copy_(source), device)
    gemm = _seconds(lambda: torch.mm(a, b, out=product), device)
    return Rates(2 * source.numel() / copy / 1e9, 2 * side**3 / gemm / 1e9)


def _seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return median(times)


def describe(device: str, threads: int) -> dict[str, str]:
    """The columns that make a row evidence: where, with what, of which commit, when."""
    versions = [f"salkernels {salkernels.__version__}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device,
        "processor": _gpu() if device.startswith("cuda") else _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": "; ".join(versions),
        "commit": commit() or "",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def conditions(row: Mapping[str, str]) -> str:
    """What stands above a table: where its rows were measured, and of which commit."""
    return (
        f"{row['processor']}, {row['threads']} threads, torch {row['torch']}, "
        f"commit {row['commit']}."
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {capability}"


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory >> 30} GiB, CUDA {torch.version.cuda}"
