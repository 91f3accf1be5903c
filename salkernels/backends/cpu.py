"""The C++ kernel for CPUs: AVX-512, AVX2 or plain vectors, chosen at run time.

`SALKERNELS_CPU_ISA` = avx2 or baseline, read once per process, keeps it from taking more than that.

Gradients of 32 MB or more are written to memory that is kept from an earlier call: to take fresh
pages costs as much as the arithmetic. See csrc/cpu/kept_memory.h and `release_memory`;
`SALKERNELS_KEEP_MEMORY` = 0, read once per process, switches it off.
"""

from __future__ import annotations

import ctypes
import os
import warnings

import torch
from torch import Tensor

from .. import _native
from ..reference import Outputs

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LEVELS = ("baseline", "avx2", "avx512")
LEVEL_VARIABLE = "SALKERNELS_CPU_ISA"
KEEP_VARIABLE = "SALKERNELS_KEEP_MEMORY"


def _unknown_instruction_set() -> str | None:
    """What is wrong with the variable that limits the kernel; said aloud: all else is slower."""
    level = os.environ.get(LEVEL_VARIABLE, "")
    if level in ("", *LEVELS):
        return None
    reason = f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}, got {level!r}"
    warnings.warn(f"the cpu backend cannot run: {reason}", stacklevel=2)
    return reason


def _tell_unknown_switch() -> None:
    value = os.environ.get(KEEP_VARIABLE, "")
    if value not in ("", "0", "1"):
        said = f"{KEEP_VARIABLE} must be 0 or 1, got {value!r}; memory is kept, as with 1"
        warnings.warn(said, stacklevel=2)


_tell_unknown_switch()

# Now, not at the first call: that may be one which torch.compile traces. It takes milliseconds.
_MISSING = _native.load("cpu") or _unknown_instruction_set()
_match = torch.ops.salkernels.native_match.default
_match_backward = torch.ops.salkernels.native_match_backward.default
_window_lse = torch.ops.salkernels.native_window_lse.default
_window_lse_backward = torch.ops.salkernels.native_window_lse_backward.default


def status() -> str | None:
    return _MISSING


def why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
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
    return LEVELS[_native.number("cpu", "instruction_set")]


def kept_bytes() -> int:
    """Bytes of the memory that is kept for the next gradient and not in use."""
    return _bytes("kept_bytes")


def release_memory() -> int:
    """Gives the memory that the `cpu` backend keeps for gradients back to the system.

    The gradient of a feature map of 32 MB or more is written to memory that stays with the process
    when the gradient is freed, and is used again at the next call: the pages of fresh memory take
    a quarter of a call. Kept is at most what the latest backward needed, and the system may
    take it whenever memory runs short, although it counts as used until then. Call this after the
    last training step of a process that goes on with other work.

    Gradients that are still in use are not touched; their memory goes back when they are freed. The
    next backward starts anew. `SALKERNELS_KEEP_MEMORY=0` in the environment keeps nothing at all.

    Returns:
        The bytes that were given back; 0 where none were kept.
    """
    return _bytes("release_memory")


def _bytes(function: str) -> int:
    return 0 if _MISSING is not None else _native.number("cpu", function, ctypes.c_int64)


def match(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    pairs: Tensor | None,  # (P,) int64
    valid: Tensor | None,  # (G, V, H, W) bool
    window: tuple[int, int],
    eps: float,
) -> Outputs:
    """As `salkernels.reference.match`."""
    _require_library()
    found: Outputs = _match(query, key, pairs, valid, window, eps, False)
    return found


def match_backward(
    grad_sim: Tensor,  # (P, H, W)
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    max_sim: Tensor,  # (P, H, W)
    argmax: Tensor,  # (P, H, W)
    norm: Tensor,
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference.match_backward`."""
    _require_library()
    # Hooks on saved tensors may give them back in other strides.
    grad_sim, max_sim, argmax = (
        x.contiguous() for x in (grad_sim.to(max_sim.dtype), max_sim, argmax)
    )
    pairs, valid = (None if x is None else x.contiguous() for x in (pairs, valid))
    grads: tuple[Tensor, Tensor | None] = _match_backward(
        *(grad_sim, query, key, pairs, valid, max_sim, argmax, norm, window, eps, False)
    )
    return grads


def window_lse(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    pairs: Tensor | None,  # (P,) int64
    valid: Tensor | None,  # (G, V, H, W) bool
    window: tuple[int, int],
    temperature: float,
    eps: float,
) -> Tensor:
    """As `salkernels.reference_contrast.window_lse`."""
    _require_library()
    pairs, valid = (None if x is None else x.contiguous() for x in (pairs, valid))
    lse: Tensor = _window_lse(query, key, pairs, valid, window, temperature, eps, False)
    return lse


def window_lse_backward(
    grad_lse: Tensor,  # (G, N, H, W)
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    lse: Tensor,  # (G, N, H, W)
    window: tuple[int, int],
    temperature: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference_contrast.window_lse_backward`."""
    _require_library()
    # Hooks on saved tensors may give them back in other strides.
    grad_lse, lse = grad_lse.to(lse.dtype).contiguous(), lse.contiguous()
    pairs, valid = (None if x is None else x.contiguous() for x in (pairs, valid))
    grads: tuple[Tensor, Tensor | None] = _window_lse_backward(
        *(grad_lse, query, key, pairs, valid, lse, window, temperature, eps, False)
    )
    return grads
