"""Distributed tensors: pairs are sharded over samples, which is exact; sets raise an error.

torch.distributed is imported only when a tensor of another type than torch.Tensor is passed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def prepare(query: Tensor, key: Tensor | None, pairs: Tensor | None, valid: Tensor | None) -> None:
    """Registers the operators with DTensor if the features are one."""
    if not _is_distributed(query):
        return
    if key is None or pairs is not None:
        raise TypeError(
            "features are a DTensor, but the pairs of a set may join samples of different devices: "
            "give features.full_tensor(), or pairs of maps to wla_loss, which shards over samples"
        )
    for name, tensor in (("y", key), ("valid", valid)):
        if tensor is not None and not _is_distributed(tensor):
            raise TypeError(f"x is a DTensor, so {name} must be one too; see distribute_tensor")
    _register_sharding()


def _is_distributed(tensor: Tensor) -> bool:
    if type(tensor) is Tensor or not torch.distributed.is_available():
        return False
    if type(tensor).__module__.partition(".")[0] != "torch":
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@cache
def _register_sharding() -> None:
    """Groups of the operator are independent: each device computes its own."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def strategies(outputs: int, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
        tensors = [hasattr(argument, "tensor_meta") for argument in arguments]
        return [
            ([place] * outputs, [place if tensor else None for tensor in tensors])
            for place in (Replicate(), Shard(0))
        ]

    operators = torch.ops.salkernels
    register_sharding(operators.match.default)(lambda *a: strategies(4, *a))
    register_sharding(operators.match_backward.default)(lambda *a: strategies(2, *a))
