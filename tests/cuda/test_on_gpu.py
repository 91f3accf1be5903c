"""Where there is a GPU: the shapes that the emulators are given, on the real thing."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from test_on_host import LARGE, compare, maps

from salkernels.backends import cuda

on_a_gpu = pytest.mark.skipif(cuda.status() is not None, reason=str(cuda.status()))
LAYOUTS = ("channels_last", "nchw")
PAPER = (1, 32, 0, 384, 44, 44, (2, 2))  # its work shape, of which an emulator has enough for days


class OnDevice:
    """A backend that is given tensors of the CPU, and gives such."""

    def __init__(self, backend: ModuleType, device: str) -> None:
        self.backend, self.device = backend, device

    def _run(self, function, arguments):
        moved = (x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments)
        return tuple(None if x is None else x.cpu() for x in function(*moved))

    def pair_losses_forward(self, *arguments):
        return self._run(self.backend.pair_losses_forward, arguments)

    def pair_losses_backward(self, *arguments):
        return self._run(self.backend.pair_losses_backward, arguments)


def check(kernels, shape, layout, dtype=torch.float32):
    groups, queries, keys, channels, height, width, window = shape
    query = maps(groups, queries, channels, height, width, layout=layout, dtype=dtype)
    key = maps(groups, keys, channels, height, width, layout=layout, dtype=dtype) if keys else None
    mask = torch.rand(groups, queries, keys or queries) < 0.4
    compare(kernels, query, key, None if mask.numel() > 10_000 else mask, window)


@on_a_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*(row[0] for row in LARGE), PAPER], ids=str)
def test_every_way_to_tile_on_a_gpu(shape, layout):
    check(OnDevice(cuda, "cuda"), shape, layout)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [row[0] for row in LARGE], ids=str)
def test_every_way_to_tile_in_other_dtypes_on_a_gpu(shape, dtype):
    check(OnDevice(cuda, "cuda"), shape, "channels_last", dtype)


def test_the_comparison_itself_runs_without_a_gpu():
    """With the definition in the place of the kernels, and wrong where it is made wrong."""
    from salkernels import reference

    kernels = OnDevice(reference, "cpu")
    check(kernels, LARGE[0][0], "nchw")
    kernels.pair_losses_backward = lambda *arguments: tuple(
        None if x is None else 1.01 * x for x in OnDevice.pair_losses_backward(kernels, *arguments)
    )
    with pytest.raises(AssertionError):
        check(kernels, LARGE[0][0], "nchw")
