"""µs that a call takes the host, with kernels that do nothing, beside torch's own part of it.

    python -m tools.host_cost [--backends cuda triton | cpu]

On a machine without a GPU: the CPU plays one. Of the backend `cpu` the kernels do run. Medians and
minima of rounds of 100 calls back to back on one core, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import salkernels

from . import stubs
from .floor import floors

CALLS = 100  # of a round
Call = Callable[[], object]


def calls(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Call]:
    """The set form with a mask of two scans on the CPU, and pairs of maps."""
    x, y = (torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
    scan = torch.ones(shape[0] // 2, shape[0] // 2, dtype=torch.bool).fill_diagonal_(False)
    pairs = torch.block_diag(scan, scan)

    def of_set(x: Tensor) -> Tensor:
        return salkernels.wla_set_loss(x, pairs, 2, backend=backend)

    def of_pairs(x: Tensor, y: Tensor) -> Tensor:
        return salkernels.wla_loss(x, y, 2, backend=backend)

    def forward(loss: Callable[..., Tensor], *maps: Tensor) -> Call:
        def run() -> object:
            with torch.no_grad():
                return loss(*maps)

        return run

    def both(loss: Callable[..., Tensor], *maps: Tensor) -> Call:
        leaves = tuple(m.clone().requires_grad_() for m in maps)
        return lambda: torch.autograd.grad(loss(*leaves), leaves)

    return {
        f"{backend}: set, forward": forward(of_set, x),
        f"{backend}: set, both": both(of_set, x),
        f"{backend}: pairs, forward": forward(of_pairs, x, y),
        f"{backend}: pairs, both": both(of_pairs, x, y),
    }


def measure(call: Call, seconds: float) -> tuple[float, float]:
    """Median and minimum of rounds, µs per call."""
    for _ in range(20):
        call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(found), min(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.host_cost", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each call")
    parser.add_argument("--backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--shape", nargs=4, type=int, default=[16, 8, 4, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="calls with this in their name")
    words = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of memory that no kernel fills
    if words.backends != ["cpu"]:
        stubs.play_gpu()
    found = dict(floors())
    for name in words.backends:
        if name != "cpu":
            getattr(stubs, f"stub_{name}")()
        found |= calls(name, tuple(words.shape), getattr(torch, words.dtype))
    for name, call in found.items():
        if words.only in name:
            median, least = measure(call, words.seconds)
            print(f"{name:36} {median:7.1f} {least:7.1f}", flush=True)


if __name__ == "__main__":
    main()
