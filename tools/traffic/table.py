"""Memory traffic of compiled kernels, counted by an emulator, on small maps of many kinds.

A provider is a module with `run(case) -> list[Row]`, one row for the forward and one for the
backward, and `obstacle() -> str | None`. Rows of all providers have the same columns and stand side
by side in one table. The emulator counts; it does not time, and knows no cache: what is "unique"
has to come from device memory, what is "requested" beyond that is the caches' to serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import LAYOUTS, Case
from salkernels import reference

from .passes import EPS, Passes

SECTOR = 32  # bytes

# The suites' windows and channels; maps of a few windows, since windows do not share work.
CASES = (
    Case(32, 384, 8, 8, 2),
    Case(32, 384, 8, 8, 2, "bfloat16"),
    Case(32, 384, 8, 8, 2, "float16"),
    Case(32, 384, 8, 8, 2, layout="nchw"),
    Case(32, 128, 12, 12, 2),
    Case(32, 128, 6, 6, 3),
    Case(32, 128, 8, 8, 4),
    Case(32, 128, 6, 6, 6),
    Case(32, 128, 8, 8, 4, "bfloat16"),
    Case(16, 64, 12, 12, 2),
    Case(4, 96, 14, 14, 14),
    Case(4, 96, 14, 14, 14, "bfloat16"),
)


@dataclass(frozen=True)
class Row:
    """One pass of one case: counts of all its kernels together."""

    provider: str
    case: str
    phase: str  # forward or backward
    kernels: str
    feature_bytes: int
    unique_read: float  # sectors that must be read, of any tensor, over the features' sectors
    requested: float  # sectors asked for, warp by warp, over the features' sectors
    unique_written: float  # sectors written over those of the outputs
    load_efficiency: float  # share of the sectors read by a warp that it uses
    store_efficiency: float
    shared_conflicts: float  # extra wavefronts over those needed
    mma_flops: int
    error: float  # forward: largest of loss and max_sim; backward: relative, as a vector


def row_of(
    provider: str,
    case: Case,
    phase: str,
    stats: list[Any],
    feature_bytes: int,
    output_bytes: int,
    error: float,
) -> Row:
    """A row from the emulator's counters of each launch."""

    def total(group: str, field: str) -> int:
        return sum(int(s[group][field]) for s in stats)

    def efficiency(group: str) -> float:
        sectors = total(group, "sectors")
        return total(group, "unique_bytes") / (SECTOR * sectors) if sectors else 1.0

    needed = total("shared_ld", "ideal") + total("shared_st", "ideal")
    conflicts = total("shared_ld", "conflicts") + total("shared_st", "conflicts")
    features = feature_bytes / SECTOR
    return Row(
        provider=provider,
        case=case.key,
        phase=phase,
        kernels=" ".join(s["kernel"].removeprefix("salkernels_") for s in stats),
        feature_bytes=feature_bytes,
        unique_read=round(sum(s["unique_read_sectors"] for s in stats) / features, 3),
        requested=round(total("global_ld", "sectors") / features, 3),
        unique_written=round(
            sum(s["unique_write_sectors"] for s in stats) * SECTOR / output_bytes, 3
        ),
        load_efficiency=round(efficiency("global_ld"), 3),
        store_efficiency=round(efficiency("global_st"), 3),
        shared_conflicts=round(conflicts / needed, 3) if needed else 0.0,
        mma_flops=int(sum(s.mma_flops for s in stats)),
        error=float(f"{error:.2g}"),
    )


def measure(provider: str, case: Case, passes: Passes) -> list[Row]:
    """Forward and backward of a case, compared with the definition."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.samples, case.channels, case.height, case.width)
    features = torch.randn(shape, generator=generator).to(case.torch_dtype)
    features = features.contiguous(memory_format=LAYOUTS[case.layout])[None]
    pairs, window = case.pairs.flatten().nonzero().squeeze(1), (case.window, case.window)
    size = features.numel() * features.element_size()

    stats = passes.stats
    stats.clear()
    outputs = passes.forward(features, pairs, window)
    expected = reference.match(features, None, pairs, None, window, EPS)
    error = max(float((outputs[i] - expected[i]).abs().max()) for i in (0, 1))
    written = sum(t.numel() * t.element_size() for t in outputs)
    rows = [row_of(provider, case, "forward", stats, size, written, error)]

    stats.clear()
    noise = torch.randn(outputs.max_sim.shape, generator=generator)
    grad_sim = torch.empty_like(outputs.max_sim).copy_(noise)  # as the maxima lie
    actual = passes.backward(grad_sim, features, pairs, window, outputs).double()
    call = (features, None, pairs, None, *expected[1:], window, EPS)
    wanted = reference.match_backward(grad_sim, *call)[0].double()
    error = float((actual - wanted).norm() / wanted.norm())
    rows.append(row_of(provider, case, "backward", stats, size, size, error))
    return rows
