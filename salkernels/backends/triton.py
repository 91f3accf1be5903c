"""Kernels in Triton: NVIDIA GPUs from compute capability 8.0 on, AMD GPUs where Triton runs.

With `TRITON_INTERPRET=1` in the environment before the first import, the same kernels run on CPU
tensors in Triton's interpreter: slow, for tests; then only a call by name uses them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache

import torch
from torch import Tensor

from .._torch_private import constant_for_dynamo
from ..reference import Outputs, check_not_empty, count_pairs, index_dtype, no_match
from ..reference_contrast import output

DEVICES = ("cuda",)  # CPU tensors in the interpreter, but by name only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # bf16 and tf32 products
ROW_MULTIPLE = 16  # channels: rows of so many start at addresses that the compiler knows of
# As Triton itself reads it, when the kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@constant_for_dynamo
def status() -> str | None:
    return _ask()


@cache
def _ask() -> str | None:
    reason = _missing()
    if reason is not None:
        return reason
    if INTERPRETED:
        return _interpreter_obstacle()
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


def _missing() -> str | None:
    """Whether triton can be imported, and is what it says: libraries that can do without it put a
    module of that name in its place."""
    try:
        spec = importlib.util.find_spec("triton")
    except ValueError:  # of a module that somebody made by hand: it has no spec
        stands_in = True
    else:
        if spec is None:
            return "triton is not installed; `pip install triton` (Linux only)"
        stands_in = spec.origin is None
    if stands_in:
        return (
            "the module `triton` in this process is not the real one: another library, or a folder "
            "of that name, stands in its place; `pip install triton` (Linux only)"
        )
    return None


def _interpreter_obstacle() -> str | None:
    """Triton before 3.7 converts arrays of one element by `int(...)`, which NumPy 2.4 refuses."""
    import numpy
    import triton

    if _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} does not run with numpy "
            f"{numpy.__version__}: it needs triton 3.7 or newer, or numpy before 2.4"
        )
    return None


def _version(text: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    reason = status()
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 or float16, got {query.dtype}: use the reference"
    if INTERPRETED:
        if query.is_cpu:
            return None
        return "Triton is in interpreter mode (TRITON_INTERPRET=1), which takes CPU tensors only"
    if not query.is_cuda:
        return f"it runs on GPUs, and the features are on {query.device}"
    if torch.version.hip is None:
        return _too_old(query.device)
    return None


@cache
def _too_old(device: torch.device) -> str | None:
    """Asked once for each device: the driver's answer costs more than a launch."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return None
    return "it needs compute capability 8.0 or newer, and {} has {}.{}".format(
        torch.cuda.get_device_name(device), *capability
    )


def outputs(
    query: Tensor, key: Tensor | None, pairs: Tensor | None, window: tuple[int, int]
) -> Outputs:
    """The outputs of the forward, uninitialised, and the norms (samples, H, W).

    Maps lie pixel by pixel with the pairs (or samples) innermost: the pairs of one query and pixel
    are neighbours, and stores and loads fill whole sectors.
    """
    groups, samples, _, height, width = query.shape
    nodes = groups * (samples if key is None else samples + key.shape[1])
    count = count_pairs(query, key, pairs)

    def planes(count: int, dtype: torch.dtype) -> Tensor:
        strides = (1, width * count, count)
        return query.new_empty_strided((count, height, width), strides, dtype=dtype)

    return Outputs(
        query.new_empty((count,), dtype=torch.float32),
        planes(count, torch.float32),
        planes(count, index_dtype(window)),
        planes(nodes, torch.float32),
    )


def match(
    query: Tensor,  # (G, N, C, H, W)
    key: Tensor | None,  # (G, M, C, H, W)
    pairs: Tensor | None,  # (P,) int64
    valid: Tensor | None,  # (G, V, H, W) bool
    window: tuple[int, int],
    eps: float,
) -> Outputs:
    """As `salkernels.reference.match`, and the norms (samples, H, W).

    The norm of a pixel that is not to be loaded again is Inf.
    """
    _require(query)
    check_not_empty(query)
    found = outputs(query, key, pairs, window)
    if found.loss.numel() == 0 or count_pairs(query, key, None) == 0:
        found.loss.zero_()
        found.max_sim.fill_(1)
        found.argmax.fill_(no_match(found.argmax.dtype))
        found.norm.fill_(torch.inf)
        return found
    from ..triton_kernels import launch

    launch.forward(launch.Problem(query, key, pairs, valid, window, eps), *found)
    return found


def match_backward(
    grad_sim: Tensor,  # (P, H, W), any strides
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    max_sim: Tensor,  # (P, H, W)
    argmax: Tensor,  # (P, H, W)
    norm: Tensor,  # (samples, H, W)
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference.match_backward`."""
    _require(query)
    # The interpreter cuts fp32 off to bf16 where a GPU rounds: there, torch rounds.
    dtype = torch.float32 if INTERPRETED else query.dtype
    grad_query = torch.empty_like(query, dtype=dtype)
    grad_key = None if key is None else torch.empty_like(key, dtype=dtype)
    if argmax.shape[0] == 0 or count_pairs(query, key, None) == 0:
        grad_query.zero_()
        if grad_key is not None:
            grad_key.zero_()
    else:
        from ..triton_kernels import launch

        launch.backward(
            launch.Problem(query, key, pairs, valid, window, eps),
            _pixel_by_pixel(grad_sim.to(torch.float32)),
            _pixel_by_pixel(max_sim),
            _pixel_by_pixel(argmax),
            _pixel_by_pixel(norm),
            grad_query,
            grad_key,
        )
    return grad_query.to(query.dtype), None if grad_key is None else grad_key.to(query.dtype)


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
    _require(query)
    check_not_empty(query)
    lse = output(query)
    if _no_pair(query, key, pairs):
        return lse.fill_(-torch.inf)
    from ..triton_kernels import launch_lse

    query, key = as_rows(query), None if key is None else as_rows(key)
    problem = launch_lse.Problem(query, key, pairs, valid, window, eps)
    launch_lse.forward(problem, temperature, lse)
    return lse


def window_lse_backward(
    grad_lse: Tensor,  # (G, N, H, W), any strides
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
    _require(query)
    check_not_empty(query)
    if _no_pair(query, key, pairs):
        return torch.zeros_like(query), None if key is None else torch.zeros_like(key)
    from ..triton_kernels import launch_lse

    rows, key_rows = as_rows(query), None if key is None else as_rows(key)
    dtype = torch.float32 if INTERPRETED else query.dtype  # as in `match_backward`
    grad = torch.empty_like(rows, dtype=dtype)
    grad_key = None if key_rows is None else torch.empty_like(key_rows, dtype=dtype)
    problem = launch_lse.Problem(rows, key_rows, pairs, valid, window, eps)
    sums = lse.contiguous(), grad_lse.to(torch.float32).contiguous()
    launch_lse.backward(problem, temperature, *sums, grad, grad_key)
    if key is not None and grad_key is not None:
        grad_key = _laid_out_as(key, grad_key)
    return _laid_out_as(query, grad), grad_key


def _no_pair(query: Tensor, key: Tensor | None, pairs: Tensor | None) -> bool:
    """Whether no pair can be, and nothing is launched."""
    return 0 in (count_pairs(query, key, pairs), count_pairs(query, key, None))


def as_rows(maps: Tensor) -> Tensor:
    """The maps, or a copy whose channels are neighbours, with zeros up to a multiple of 16.

    The kernels of the negatives read them many times over; and the addresses of any other layout
    take more registers than there are.
    """
    channels = maps.shape[2]
    if channels % ROW_MULTIPLE == 0 and maps.stride(2) == 1:
        return maps
    extent = channels + -channels % ROW_MULTIPLE
    rows = maps.new_zeros((*maps.shape[:2], *maps.shape[3:], extent)).movedim(-1, 2)
    rows[:, :, :channels] = maps
    return rows


def _laid_out_as(maps: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `as_rows(maps)` as the operator promises that of the maps."""
    like = torch.empty_like(maps)
    if grad.dtype == like.dtype and grad.shape == like.shape and grad.stride() == like.stride():
        return grad
    return like.copy_(grad[:, :, : maps.shape[2]])


def _pixel_by_pixel(x: Tensor) -> Tensor:
    """The layout of `outputs`: gradients come in any, and hooks on saved tensors may undo it."""
    count, _, width = x.shape
    if x.stride() == (1, width * count, count):  # nearly always, and ten times faster
        return x
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _require(query: Tensor) -> None:
    """The operator can be called without `backends.select` having asked first."""
    reason = why_not(query, None, (1, 1))
    if reason is not None:
        raise RuntimeError(f"the triton backend cannot run: {reason}")
