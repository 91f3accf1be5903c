"""Where there is a GPU: the shapes that the emulators are given, on the real thing."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from against_reference import SHAPES, VALID, compare, features, some_pairs, valid_pixels
from targets import runs_on

from salkernels.backends import cuda
from salkernels.reference import Outputs

on_a_gpu = runs_on("cuda", "cuda")
LAYOUTS = ("channels_last", "nchw")
PAPER = (1, 32, 0, 384, 44, 44, (2, 2))  # its work shape, of which an emulator has enough for days


class OnDevice:
    """A backend that is given tensors of the CPU, and gives such."""

    def __init__(self, backend: ModuleType, device: str) -> None:
        self.backend, self.device = backend, device

    def _run(self, function, arguments):
        moved = (x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments)
        return tuple(None if x is None else x.cpu() for x in function(*moved))

    def match(self, *arguments):
        return Outputs(*self._run(self.backend.match, arguments))

    def match_backward(self, *arguments):
        return self._run(self.backend.match_backward, arguments)


def check(kernels, shape, layout, dtype=torch.float32, kind=None):
    query, key, window = features(shape, layout=layout, dtype=dtype)
    valid = None if kind is None else valid_pixels(query, key, window, kind)
    pairs = None if query.shape[1] > 100 else some_pairs(query, key, left_over=1)
    compare(kernels, query, key, pairs, valid, window)


@on_a_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, PAPER], ids=str)
def test_every_way_to_tile_on_a_gpu(shape, layout):
    check(OnDevice(cuda, "cuda"), shape, layout)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_to_tile_in_other_dtypes_on_a_gpu(shape, dtype):
    check(OnDevice(cuda, "cuda"), shape, "channels_last", dtype)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", VALID)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_that_take_no_part_on_a_gpu(shape, kind, dtype):
    check(OnDevice(cuda, "cuda"), shape, "channels_last", dtype, kind)


def test_the_comparison_itself_runs_without_a_gpu():
    """With the definition in the place of the kernels, and wrong where it is made wrong."""
    from salkernels import reference

    kernels = OnDevice(reference, "cpu")
    for kind in (None, "some"):
        check(kernels, SHAPES[0], "nchw", kind=kind)
    kernels.match_backward = lambda *arguments: tuple(
        None if x is None else 1.01 * x for x in OnDevice.match_backward(kernels, *arguments)
    )
    with pytest.raises(AssertionError):
        check(kernels, SHAPES[0], "nchw")
