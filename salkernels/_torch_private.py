"""Every private name of torch that the package uses, each with what happens where it is missing.

`tests/test_torch_private.py` fails when a torch no longer has one; users of that torch lose what
stands beside it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


_count_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
# Of torch.autograd.grad(is_grads_batched=True) and vectorised jacobians.
_is_batched: Callable[[torch.Tensor], bool] | None = getattr(
    getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None
)


def transforms_active() -> bool:
    """Whether a transform of torch.func is at work. Without it, errors there are torch's own."""
    return _transforms is not None and _transforms()


def nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether no mode and no transform of torch sees the operators that are called on a tensor.

    Without one of the names that is not known: calls take the long way through the dispatcher.
    """
    if _count_modes is None or _transforms is None or _is_batched is None:
        return False
    return _count_modes() == 0 and not _transforms() and not _is_batched(tensor)


def constant_for_dynamo(function: Function) -> Function:
    """Marks a function that torch.compile is to call, and whose result is a constant of the graph.

    As `torch.compiler.assume_constant_result` does, which loads the compiler. Without it, the
    function is traced, and a graph breaks there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
