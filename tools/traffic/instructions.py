"""Executed warp instructions of both passes, kernel by kernel, and the least time they take.

The issue floor is the time of a kernel whose instructions never wait: four schedulers of each of
132 multiprocessors issue one each at every clock of 1.98 GHz (H100 SXM). The DRAM floor is the time
of the bytes that any implementation must move, at 3.0 TB/s. Instructions are those of the PTX for
sm_80; the assembler turns most of them into one machine instruction each, some into several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .passes import Passes
from .shapes import Shape

ISSUED_PER_SECOND = 4 * 132 * 1.98e9
DRAM_BYTES_PER_SECOND = 3.0e12
SECTOR = 32  # bytes
TOTAL = "total"  # in place of a kernel's name: the whole pass


@dataclass(frozen=True)
class Count:
    """One kernel of one pass, or the whole pass, of a shape at its full size."""

    provider: str
    shape: str
    phase: str  # forward or backward
    kernel: str
    warp_instructions: int
    mma_instructions: int  # of these, products of the tensor cores
    issue_floor_us: float
    dram_floor_us: float  # of the whole pass
    requested: float  # bytes of the sectors read, warp by warp, over those of the features


def count(provider: str, passes: Passes, shape: Shape) -> list[Count]:
    """Both passes of a shape; of each, the kernels in the order of their launch, then the total."""
    whole: dict[str, dict[str, Counters]] = {"forward": {}, "backward": {}}
    for size in shape.maps():
        for phase, kernels in run_on(passes, shape, *size[:2], size.room).items():
            whole[phase] = add_map(shape, phase, whole[phase], kernels, size.weight)
    return [row for phase in whole for row in _rows(provider, shape, phase, whole[phase])]


@dataclass
class Counters:
    """Sums over the launches of one kernel."""

    instructions: float = 0.0
    mma: float = 0.0
    sectors: float = 0.0

    def add(self, other: Counters, weight: float = 1.0) -> None:
        self.instructions += weight * other.instructions
        self.mma += weight * other.mma
        self.sectors += weight * other.sectors


def by_kernel(stats: Iterable[Any]) -> dict[str, Counters]:
    """The emulator's counters, launches of one kernel added up."""
    found: dict[str, Counters] = defaultdict(Counters)
    for launch in stats:
        name = launch["kernel"].removeprefix("salkernels_")
        mma = sum(int(executed) for executed, _ in launch["mma"].values())
        sectors = int(launch["global_ld"]["sectors"])
        found[name].add(Counters(int(launch["warp_insns"]), mma, sectors))
    return dict(found)


def run_on(
    passes: Passes, shape: Shape, height: int, width: int, room: int = 0
) -> dict[str, dict[str, Counters]]:
    """Both passes on a small map, with room in the list of pairs."""
    features, pairs = shape.features(height, width), shape.pairs(room)
    window = (shape.window, shape.window)
    passes.stats.clear()
    outputs = passes.forward(features, pairs, window)
    forward = by_kernel(passes.stats)
    noise = torch.randn(outputs.max_sim.shape, generator=torch.Generator().manual_seed(1))
    grad_sim = torch.empty_like(outputs.max_sim).copy_(noise)  # in the layout of the maxima
    passes.stats.clear()
    passes.backward(grad_sim, features, pairs, window, outputs)
    return {"forward": forward, "backward": by_kernel(passes.stats)}


def add_map(
    shape: Shape,
    phase: str,
    whole: dict[str, Counters],
    kernels: dict[str, Counters],
    weight: float,
) -> dict[str, Counters]:
    if not whole:
        whole = {name: Counters() for name in kernels}
    if whole.keys() != kernels.keys():
        raise RuntimeError(
            f"{shape.name}, {phase}: the maps counted do not run the same kernels, so their counts "
            f"cannot be scaled: {sorted(whole)} and {sorted(kernels)}; "
            "choose other maps in tools/traffic/shapes.py"
        )
    for name, counters in kernels.items():
        whole[name].add(counters, weight)
    return whole


def _rows(provider: str, shape: Shape, phase: str, kernels: dict[str, Counters]) -> Iterable[Count]:
    total = Counters()
    for counters in kernels.values():
        total.add(counters)
    features = shape.bytes_moved("forward") / SECTOR
    for name, counters in [*kernels.items(), (TOTAL, total)]:
        yield Count(
            provider=provider,
            shape=shape.name,
            phase=phase,
            kernel=name,
            warp_instructions=round(counters.instructions),
            mma_instructions=round(counters.mma),
            issue_floor_us=round(1e6 * counters.instructions / ISSUED_PER_SECOND, 2),
            dram_floor_us=round(1e6 * shape.bytes_moved(phase) / DRAM_BYTES_PER_SECOND, 1),
            requested=round(counters.sectors / features, 3),
        )
