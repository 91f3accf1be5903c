"""A CPU that plays a GPU: whatever would wait for the device raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators of which the CPU needs a result, or the shape of one, from the device.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "is_nonzero", "equal", "masked_select",
    "unique_dim", "unique_consecutive", "_unique", "_unique2", "_linalg_check_errors", "bincount",
}  # fmt: skip
READING = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__,
    Tensor.__float__, Tensor.__index__,
}  # fmt: skip


class Waited(AssertionError):
    """The step waited for the device."""


class Fake:
    """Which tensors lie on the device that is played: by their memory."""

    def __init__(self) -> None:
        self.memory: dict[int, StorageWeakRef] = {}

    def put(self, value: Any) -> Any:
        for x in tree_leaves(value):
            if isinstance(x, Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                self.memory[reference.cdata] = reference
        return value

    def holds(self, value: Any) -> bool:
        return any(
            isinstance(x, Tensor)
            and (found := self.memory.get(x.untyped_storage()._cdata)) is not None
            and not found.expired()
            for x in tree_leaves(value)
        )


class _Operators(TorchDispatchMode):
    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = self.fake.holds((args, kwargs))
        name = func.overloadpacket.__name__
        masked = name.startswith(("index", "_unsafe_index")) and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1:2])
        )
        if here and (name in WAITING or masked):
            raise Waited(f"{func} needs a result of the device")
        result = func(*args, **kwargs)
        # Random numbers are drawn on the device; all that comes from what lies there lies there.
        return self.fake.put(result) if here or kwargs.get("generator") is not None else result


class _Calls(TorchFunctionMode):
    def __init__(self, fake: Fake) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READING and self.fake.holds(args[0]):
            raise Waited(f"{func.__name__} of a tensor on the device")
        if func is torch.tensor and isinstance(kwargs.get("device"), torch.device):
            raise Waited("torch.tensor(..., device=...) copies and waits; use torch.full")
        if func is Tensor.new_tensor and self.fake.holds(args[0]):
            raise Waited("new_tensor copies and waits; use new_full")
        if func is Tensor.to and _device(args, kwargs) is not None:
            return self.moved(func, args, kwargs)
        return func(*args, **kwargs)

    def moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`.to(device)`: both sides are this CPU, so here it is a copy that changes sides.

        The text "cpu" is the CPU, a `torch.device` the device that is played.
        """
        here, to_cpu = self.fake.holds(args[0]), _device(args, kwargs) == "cpu"
        if here != to_cpu:
            return func(*args, **kwargs)  # it is there already
        if not kwargs.get("non_blocking", False):
            raise Waited(".to(device) waits without non_blocking=True")
        copy = func(*args, **kwargs).detach().clone()
        if to_cpu:
            self.fake.memory.pop(copy.untyped_storage()._cdata, None)
            return copy
        return self.fake.put(copy)


def _device(args: Any, kwargs: Any) -> str | torch.device | None:
    """What `.to` names as the device."""
    given = (*args[1:], kwargs.get("device"))
    return next((value for value in given if isinstance(value, (str, torch.device))), None)


@contextmanager
def no_waiting(*on_device: torch.nn.Module) -> Iterator[Fake]:
    """Within the block a wait for the device raises; these modules lie there."""
    fake = Fake()
    for module in on_device:
        fake.put([*module.parameters(), *module.buffers()])
    with _Calls(fake), _Operators(fake):
        yield fake
