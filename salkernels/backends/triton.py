"""Kernels in Triton: NVIDIA GPUs from compute capability 8.0 on, AMD GPUs where Triton runs.

With `TRITON_INTERPRET=1` in the environment before the first import, the same kernels run on CPU
tensors in Triton's interpreter: slow, for tests; then only a call by name uses them.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ..checks import values_visible
from ..reference import check_not_empty, index_dtype

DEVICES = ("cuda",)  # CPU tensors in the interpreter, but by name only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # bf16 and tf32 products
# As Triton itself reads it, when the kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def status() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux only)"
    if INTERPRETED:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) is built for CPUs only; install a CUDA or ROCm build"
        )
    if not torch.cuda.is_available():
        return (
            "torch finds no GPU; it needs an NVIDIA GPU of compute capability 8.0 or newer (or an "
            "AMD one) and its driver"
        )
    return None


def why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    reason = status()
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, got {query.dtype}: use the reference"
    if INTERPRETED:
        if query.device.type == "cpu":
            return None
        return "Triton is in interpreter mode (TRITON_INTERPRET=1), which takes CPU tensors only"
    if query.device.type != "cuda":
        return f"it runs on GPUs, and the features are on {query.device}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < LEAST_CAPABILITY:
            return "it needs compute capability 8.0 or newer, and {} has {}.{}".format(
                torch.cuda.get_device_name(query.device), *capability
            )
    return None


def outputs(
    query: Tensor, key: Tensor | None, window: tuple[int, int], capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, argmax, max_sim and norm, uninitialised.

    Maps lie pixel by pixel with the pairs (or samples) innermost: the pairs of one query and pixel
    are neighbours, and stores and loads fill whole sectors.
    """
    groups, samples, _, height, width = query.shape
    keys = samples if key is None else key.shape[1]
    nodes = groups * (samples if key is None else samples + keys)

    def planes(count: int, dtype: torch.dtype) -> Tensor:
        return query.new_empty((height, width, count), dtype=dtype).permute(2, 0, 1)

    return (
        query.new_empty((groups, samples, keys), dtype=torch.float32),
        planes(capacity, index_dtype(window)),
        planes(capacity, torch.float32),
        planes(nodes, torch.float32),
    )


def pair_losses_forward(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    mask: Tensor | None,  # (G, N, M) bool
    window: tuple[int, int],
    eps: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `salkernels.reference.pair_losses_forward`, and the norms (samples, H, W)."""
    _require(query)
    check_not_empty(query)
    if mask is not None and values_visible(mask):
        num_pairs = int(mask.count_nonzero())
        if num_pairs > capacity:
            raise ValueError(f"the mask holds {num_pairs} pairs, but capacity is {capacity}")
    found = outputs(query, key, window, capacity)
    pairs = found[0].numel()
    if mask is None and pairs > capacity:
        raise ValueError(f"there are {pairs} pairs, but capacity is {capacity}")
    if mask is not None or pairs < capacity:
        clear(found)
    if pairs == 0 or capacity == 0:
        # A mask on a GPU may hold pairs that have no room: their loss is NaN, as in the kernel.
        found[0].zero_() if mask is None else found[0].copy_(torch.where(mask, torch.nan, 0.0))
        clear(found)
        return found
    from ..triton_kernels import launch

    launch.forward(query, key, mask, window, eps, found)
    return found


def clear(outputs: tuple[Tensor, ...]) -> None:
    """What the kernels leave alone: matches beyond the last pair, norms of tiles without a pair.

    An infinite norm says that a row is never to be loaded, whatever it holds.
    """
    _, argmax, max_sim, norm = outputs
    argmax.zero_()
    max_sim.zero_()
    norm.fill_(torch.inf)


def pair_losses_backward(
    grad_loss: Tensor,  # (G, N, M)
    query: Tensor,
    key: Tensor | None,
    mask: Tensor | None,
    argmax: Tensor,  # (P, H, W)
    max_sim: Tensor,  # (P, H, W)
    window: tuple[int, int],
    eps: float,
    norm: Tensor,  # (samples, H, W)
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference.pair_losses_backward`."""
    _require(query)
    # The interpreter cuts fp32 off to bf16 where a GPU rounds: there, torch rounds.
    dtype = torch.float32 if INTERPRETED else query.dtype
    grad_query = torch.empty_like(query, dtype=dtype)
    grad_key = None if key is None else torch.empty_like(key, dtype=dtype)
    if grad_loss.numel() == 0 or argmax.shape[0] == 0:
        grad_query.zero_()
        if grad_key is not None:
            grad_key.zero_()
    else:
        from ..triton_kernels import launch

        argmax, max_sim, norm = (_pixel_by_pixel(x) for x in (argmax, max_sim, norm))
        launch.backward(
            grad_loss, query, key, mask, argmax, max_sim, norm, window, eps, grad_query, grad_key
        )
    return grad_query.to(query.dtype), None if grad_key is None else grad_key.to(query.dtype)


def _pixel_by_pixel(x: Tensor) -> Tensor:
    """The layout of `outputs`, which hooks on saved tensors may have undone."""
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _require(query: Tensor) -> None:
    """The operator can be called without `backends.select` having asked first."""
    reason = why_not(query, None, (1, 1))
    if reason is not None:
        raise RuntimeError(f"the triton backend cannot run: {reason}")
