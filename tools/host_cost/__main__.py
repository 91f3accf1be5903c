"""python -m tools.host_cost: µs that calls of the backends for GPUs take the host."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import salkernels

from . import stubs
from .floor import floors

Call = Callable[[], object]


def calls(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Call]:
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    half = shape[0] // 2
    scan = torch.ones(half, half, dtype=torch.bool).fill_diagonal_(False)
    pairs = torch.block_diag(scan, scan)
    leaf = x.clone().requires_grad_()
    y, other = torch.randn_like(x), torch.randn_like(x).requires_grad_()

    def no_grad(call: Call) -> Call:
        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    def both(loss: Callable[[], torch.Tensor], *of: torch.Tensor) -> Call:
        def run() -> object:
            return torch.autograd.grad(loss(), of)

        return run

    def given(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: salkernels.wla_set_loss(x, pairs, 2, backend=backend)

    def pairwise(x: torch.Tensor, y: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: salkernels.wla_loss(x, y, 2, backend=backend)

    return {
        f"{backend} set forward": no_grad(given(x)),
        f"{backend} set both": both(given(leaf), leaf),
        f"{backend} pairs forward": no_grad(pairwise(x, y)),
        f"{backend} pairs both": both(pairwise(leaf, other), leaf, other),
    }


def measure(call: Call, seconds: float) -> tuple[float, float]:
    """Median and minimum of rounds, µs per call."""
    for _ in range(20):
        call()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 5:
        start = time.perf_counter()
        for _ in range(100):
            call()
        found.append((time.perf_counter() - start) * 1e4)
    return statistics.median(found), min(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.host_cost", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each call")
    parser.add_argument("--backends", nargs="*", default=["cuda", "triton"])
    parser.add_argument("--shape", nargs=4, type=int, default=[16, 8, 4, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", default="", help="calls with this in their name")
    parser.add_argument("--profile", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # of memory that no kernel fills
    found = dict(floors())
    real = "cpu" in words.backends  # no GPU is played: a CPU's own calls
    if not real:
        stubs.play_gpu()
    for name in words.backends:
        if name != "cpu":
            getattr(stubs, f"stub_{name}")()
        found |= calls(name, tuple(words.shape), getattr(torch, words.dtype))
    for name, call in found.items():
        if words.only in name:
            median, least = measure(call, words.seconds)
            print(f"{name:40} {median:7.1f} {least:7.1f}", flush=True)
            if words.profile:
                import cProfile
                import pstats

                profile = cProfile.Profile()
                with torch.autograd.set_multithreading_enabled(False):
                    profile.enable()
                    for _ in range(500):
                        call()
                    profile.disable()
                pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
