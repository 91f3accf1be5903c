"""The CUDA C++ kernels: compiled ahead of time, for GPUs of compute capability 8.0 or later.

Nothing waits for the device, so a call can be part of a CUDA graph. For the same reason a pair that
is out of range is no error here: it counts as room that is left over.

fp32 products are as exact as fp32 (three tf32 products each) unless
`torch.backends.cuda.matmul.allow_tf32` says that one will do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _native
from .._torch_private import constant_for_dynamo, tf32_allowed, without_wrapper
from ..reference import Outputs, accumulate_dtype, count_pairs, index_dtype

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MINIMUM = (8, 0)  # compute capability

_match = torch.ops.salkernels.native_match.default
_match_backward = torch.ops.salkernels.native_match_backward.default
_mean_match = without_wrapper(torch.ops.salkernels.native_mean_match.default)
_mean_match_backward = without_wrapper(torch.ops.salkernels.native_mean_match_backward.default)


def _load() -> str | None:
    """The library needs libtorch_cuda: without it the loader's message would hide the reason."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return _native.load("cuda")


# Now, not at the first call: that may be one which torch.compile traces. It takes milliseconds.
_MISSING = _load()


def _absent() -> str | None:
    """Why no input at all can run, as far as that is known without asking the driver."""
    if _MISSING is not None:
        return _MISSING
    return None if torch.cuda.is_available() else "torch sees no GPU"


def status() -> str | None:
    if (reason := _absent()) is not None:
        return reason
    reasons = [_unsupported(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def why_not(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
    if not query.is_cuda:
        # Without a word to the driver: that would break graphs of CPU code, and forked processes.
        return _absent() or f"it runs on GPUs, and the features are on {query.device}"
    if query.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 or float16, got {query.dtype}"
    return _MISSING or _unsupported(query.device.index or 0)


def built_for() -> str | None:
    """What the library was compiled for, in words; None if it was not built."""
    info = _native.build_info().get("cuda", {})
    if not info.get("built"):
        return None
    ptx = f", PTX {', '.join(info['ptx'])}" if info["ptx"] else ""
    return f"compute capability {', '.join(info['architectures'])}{ptx} (nvcc {info['nvcc']})"


@constant_for_dynamo
def _unsupported(index: int) -> str | None:
    """Why a GPU cannot run what was compiled, or None."""
    return _ask(index)


@functools.cache
def _ask(index: int) -> str | None:
    info = _native.build_info().get("cuda", {})
    capability = torch.cuda.get_device_capability(index)
    has = f"cuda:{index} has {capability[0]}.{capability[1]}"
    if capability < MINIMUM:
        return f"it needs compute capability {MINIMUM[0]}.{MINIMUM[1]} or later, and {has}"
    # Machine code runs on later minor versions of its generation, PTX on everything later.
    built, ptx = (list(map(_version, info.get(key, []))) for key in ("architectures", "ptx"))
    by_code = any(a[0] == capability[0] and a <= capability for a in built)
    if not by_code and not any(a <= capability for a in ptx):
        return (
            f"it was built for {built_for()}, and {has}; "
            f"reinstall with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
        )
    # A driver runs machine code of its own generation of CUDA, but PTX of its own version only,
    # and of earlier ones.
    toolkit, driver = _version(info.get("nvcc", "")), _driver_version()
    if driver != (0, 0) and (driver[0] < toolkit[0] or (not by_code and driver < toolkit)):
        what = "it" if by_code else f"{has}, for which there is PTX only, and that"
        return (
            f"{what} was built with CUDA {info['nvcc']}, while the driver is one for CUDA "
            f"{driver[0]}.{driver[1]}; update the driver, or reinstall with an earlier nvcc"
        )
    return None


def _version(text: str) -> tuple[int, int]:
    """(13, 0) of "13.0"; (0, 0) of what is no version."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _driver_version() -> tuple[int, int]:
    """The latest CUDA that the driver supports; (0, 0) if it does not say."""
    number = _native.number("cuda", "driver_version")
    return number // 1000, number % 1000 // 10


def _require(query: Tensor, key: Tensor | None, window: tuple[int, int]) -> None:
    """The operator can be called without `backends.select` having asked first."""
    reason = why_not(query, key, window)
    if reason is not None:
        raise RuntimeError(f"the cuda backend cannot run: {reason}")


def outputs(
    query: Tensor, key: Tensor | None, pairs: Tensor | None, window: tuple[int, int]
) -> Outputs:
    """The outputs of the forward, uninitialised, and the norms (samples, H, W).

    They lie as those of the triton backend, so that the backward of either can follow the forward
    of the other: pixel by pixel with the pairs (or samples) innermost.
    """
    groups, samples, _, height, width = query.shape
    nodes = groups * (samples if key is None else samples + key.shape[1])
    count, dtype = count_pairs(query, key, pairs), accumulate_dtype(query.dtype)

    def planes(count: int, dtype: torch.dtype) -> Tensor:
        return query.new_empty((height, width, count), dtype=dtype).permute(2, 0, 1)

    return Outputs(
        query.new_empty((count,), dtype=dtype),
        planes(count, dtype),
        planes(count, index_dtype(window)),
        planes(nodes, dtype),
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
    _require(query, key, window)
    return Outputs(*_match(query, key, pairs, valid, window, eps, tf32_allowed()))


def match_backward(
    grad_sim: Tensor,  # (P, H, W), any strides
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor | None,
    valid: Tensor | None,
    max_sim: Tensor,  # (P, H, W)
    argmax: Tensor,  # (P, H, W)
    norm: Tensor,  # (samples, H, W), or empty: they are computed anew
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As `salkernels.reference.match_backward`."""
    _require(query, key, window)
    # Hooks on saved tensors may give them back in other strides; of the maxima and of what belongs
    # to them the operator takes any.
    pairs, valid = (None if x is None else x.contiguous() for x in (pairs, valid))
    grads: tuple[Tensor, Tensor | None] = _match_backward(
        *(grad_sim, query, key, pairs, valid, max_sim, argmax, norm, window, eps, tf32_allowed())
    )
    return grads


def mean_match(
    x: Tensor,  # (S, C, H, W)
    y: Tensor | None,
    pairs: Tensor | None,  # (P,) int64
    groups: int,
    window: tuple[int, int],
    eps: float,
) -> Outputs:
    """As `match` of maps in groups, but with the mean of the losses in their place."""
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    found: Outputs = _mean_match(x, y, pairs, groups, window, eps, tf32)
    return found


def mean_match_backward(
    grad: Tensor,  # ()
    x: Tensor,
    y: Tensor | None,
    pairs: Tensor | None,
    groups: int,
    max_sim: Tensor,
    argmax: Tensor,
    norm: Tensor,
    window: tuple[int, int],
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and y."""
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    grads: tuple[Tensor, Tensor | None] = _mean_match_backward(
        *(grad, x, y, pairs, groups, max_sim, argmax, norm, window, eps, tf32)
    )
    return grads
