"""Between the CPU and a GPU without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From the CPU without waiting for the device; from a GPU values would arrive too late."""
    return x.to(device, non_blocking=x.is_cpu)


class Travelling:
    """A tensor on its way from the device to the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tensor.device))

    def values(self) -> list[float]:
        """The numbers; waits until they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        found: list[float] = self.copy.tolist()
        return found
