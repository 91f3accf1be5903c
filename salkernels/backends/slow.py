"""Says once that a large call runs on the plain-torch reference for want of a compiled backend."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

LARGE = (
    2**20
)  # numbers in the features: from about here on a call takes more than some milliseconds
COMPILED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # by type of device; others have none

_said: set[str] = set()  # types of device


class HasStatus(Protocol):
    def status(self) -> str | None: ...


def tell(query: Tensor, backends: Mapping[str, HasStatus]) -> None:
    """Warns where no compiled backend for the device of `query` can run on this machine at all.

    One that could run, but not this input, is no reason: `salkernels.explain` says why.
    """
    device = query.device.type
    if device in _said or device not in COMPILED or query.numel() < LARGE:
        return
    reasons = {name: backends[name].status() for name in COMPILED[device]}
    if not all(reasons.values()):
        return
    _said.add(device)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    warnings.warn(
        f"salkernels runs on its plain-torch reference, which is many times slower, because no "
        f"compiled backend for this device is there ({listed}). This is said once; "
        f"backend='reference' asks for it without a word",
        RuntimeWarning,
        stacklevel=2,
    )
