"""The C++ kernel for CPUs: AVX-512, AVX2 or plain vectors, chosen at run time.

`SALKERNELS_CPU_ISA` = avx2 or baseline, read once per process, keeps it from taking more than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The schemas live here, the kernels in csrc/register_cpu.cpp: the operators exist without them.
LIBRARY = torch.library.Library("salkernels_cpu", "DEF")
LIBRARY.define(
    "pair_losses(Tensor query, Tensor? key, Tensor? mask, int[] window, float eps, int capacity) "
    "-> (Tensor loss, Tensor argmax, Tensor max_sim)"
)
LIBRARY.define(
    "pair_losses_backward(Tensor grad_loss, Tensor query, Tensor? key, Tensor? mask, "
    "Tensor argmax, Tensor max_sim, int[] window, float eps) "
    "-> (Tensor grad_query, Tensor? grad_key)"
)
LIBRARY.define("instruction_set() -> int")
# Now, not at the first call: that may be one which torch.compile traces. It takes milliseconds.
_MISSING = _native.load("cpu")
_forward = torch.ops.salkernels_cpu.pair_losses.default
_backward = torch.ops.salkernels_cpu.pair_losses_backward.default


def status() -> str | None:
    return _MISSING


def can_run(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    if not query.is_cpu:
        return f"it runs on CPUs, and the features are on {query.device}"
    if query.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 or float16, got {query.dtype}"
    return _MISSING


def _require_library() -> None:
    """The operator can be called without `backends.select` having asked first."""
    if _MISSING is not None:
        raise RuntimeError(f"the cpu backend cannot run: {_MISSING}")


def instruction_set() -> str:
    """What the kernels were chosen for: "baseline", "avx2" or "avx512"."""
    _require_library()
    return ("baseline", "avx2", "avx512")[torch.ops.salkernels_cpu.instruction_set()]


def pair_losses_forward(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    mask: Tensor | None,  # (G, N, M) bool
    window: tuple[int, int],
    eps: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `salkernels.reference.pair_losses_forward`."""
    _require_library()
    try:
        return _forward(query, key, mask, window, eps, capacity)
    except RuntimeError as error:
        # The stable ABI knows one class of exception; this case is part of the contract.
        if mask is None or "but capacity is" not in str(error):
            raise
        num_pairs = int(mask.count_nonzero())
        raise ValueError(f"the mask holds {num_pairs} pairs, but capacity is {capacity}") from None


def pair_losses_backward(
    grad_loss: Tensor,  # (G, N, M)
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    argmax: Tensor,  # (P, H, W)
    max_sim: Tensor,  # (P, H, W)
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference.pair_losses_backward`."""
    _require_library()
    grad_loss = grad_loss.to(max_sim.dtype)
    return _backward(grad_loss, query, key, mask, argmax, max_sim, window, eps)
