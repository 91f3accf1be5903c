"""Every private name of torch that the package uses, each with what happens if it is missing.

`tests/test_torch_private.py` fails when a version of torch no longer has one; users of that version
lose only the feature described next to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


_count_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
# Of torch.autograd.grad(is_grads_batched=True) and vectorised jacobians.
_is_batched: Callable[[torch.Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None
)


_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


_precision: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)


def tf32_allowed() -> bool:
    """Whether fp32 products on a GPU may be of one tf32 product. Without the name: slower.

    Not `allow_tf32`: reading that raises where the user has set `fp32_precision` instead.
    """
    if _precision is None:
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _precision("cuda", "matmul") == "tf32"


def transforms_active() -> bool:
    """Whether a transform of torch.func is active. Without the name, errors are torch's own."""
    return _transforms is not None and _transforms()


def nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether no mode and no transform of torch sees the operators that are called on a tensor.

    If one of the names is missing this is unknown, and calls go through the dispatcher.
    """
    if _count_modes is None or _transforms is None or _is_batched is None:
        return False
    return _count_modes() == 0 and not _transforms() and not _is_batched(tensor)


def nobody_looks_at_all(tensors: tuple[torch.Tensor, ...]) -> bool:
    """The same of several tensors, none of which may have a tangent of forward mode either."""
    if _count_modes is None or _transforms is None or _is_batched is None:
        return False
    if _count_modes() != 0 or _transforms():
        return False
    for tensor in tensors:
        if _is_batched(tensor) or forward_ad.unpack_dual(tensor).tangent is not None:
            return False
    return True


def without_wrapper(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """What an operator's Python object calls; without the name, that object."""
    return getattr(operator, "_op", operator)


def raw_stream(device: torch.device) -> int:
    """The current stream of a GPU, as a number. Without the name it takes ten times longer."""
    if _raw_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


def constant_for_dynamo(function: Function) -> Function:
    """Marks a function that torch.compile calls and whose result is a constant of the graph.

    `torch.compiler.assume_constant_result` does the same, but loads the compiler. Without the name,
    the function is traced and the graph breaks there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
