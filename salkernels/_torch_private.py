"""Every private name of torch that the package uses, each with what happens where it is missing.

`tests/test_torch_private.py` fails when a torch no longer has one; users of that torch lose what
stands beside it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def transforms_active() -> bool:
    """Whether a transform of torch.func is at work; without it, errors there are torch's own."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is not None and bool(ask())


def constant_for_dynamo(function: Function) -> Function:
    """Marks a function that torch.compile is to call, and whose result is a constant of the graph.

    As `torch.compiler.assume_constant_result` does, which loads the compiler. Without it, the
    function is traced, and a graph breaks there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
