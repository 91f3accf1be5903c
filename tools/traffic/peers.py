"""late-interaction-kernels in the traffic table: its compiled kernel on the same pairs.

It takes the windows of every pair gathered; the gather itself, plain torch, is not counted, and
the features it is measured against are those of the samples, each once. Forward only: its backward
refuses tensors that are not on a GPU (and normalises in plain torch, pair by pair).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from benchmarks.cases import Case
from benchmarks.peers import late_interaction
from benchmarks.verify import errors, truth
from tools.ptx import triton_kernels

from .table import Row, row_of

PROVIDER = "late-interaction-kernels"


def obstacle() -> str | None:
    if find_spec("late_interaction_kernels") is None:
        return "late-interaction-kernels is not installed"
    return triton_kernels.obstacle()


def run(case: Case) -> list[Row]:
    """The forward of a case in fp32 (the package scores fp16 otherwise)."""
    if case.dtype != "float32":
        return []
    problem = case.problem("cpu")
    emulator = triton_kernels.Emulator()
    with torch.no_grad(), emulator.instead_of_a_gpu():
        loss = late_interaction(problem)
    error = errors(truth(case, "cpu"), loss, None).loss
    written = 4 * case.num_pairs * case.height * case.width // case.window**2
    return [row_of(PROVIDER, case, "forward", emulator.stats, case.feature_bytes, written, error)]
