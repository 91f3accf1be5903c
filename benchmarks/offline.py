"""Compiles the Triton kernels for GPUs that are not here, exactly as a call would launch them.

A call on CPU tensors is recorded instead of run: kernel, arguments, constants, tile. From that come
the signature and the hints of alignment that Triton takes at a launch, and the compiler does the
rest without a driver. Not in a process with `TRITON_INTERPRET=1`, which defines other kernels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from salkernels.triton_kernels import launch
from salkernels.triton_kernels.config import Tile

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One launch: what a GPU would have been given."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def names(self) -> list[str]:
        """Of the arguments that are not constants."""
        return [name for name in self.kernel.arg_names if name not in self.constants]

    def signature(self) -> dict[str, str]:
        """Types by name, as a launch finds them: an integer 1 becomes a constant."""
        types = dict.fromkeys(self.kernel.arg_names, "constexpr")
        for name, value in zip(self.names, self.arguments, strict=True):
            types[name] = _type(value)
        return types

    def hints(self) -> dict[str, int]:
        """Arguments divisible by 16: aligned pointers and integers."""
        found = {}
        for name, value in zip(self.names, self.arguments, strict=True):
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if isinstance(number, int) and number != 1 and number % 16 == 0:
                found[name] = 16
        return found

    def all_constants(self) -> dict[str, Any]:
        ones = {
            name: 1
            for name, value in zip(self.names, self.arguments, strict=True)
            if isinstance(value, int) and value == 1
        }
        return {**self.constants, **ones}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches inside are recorded for a device of this capability, and not run."""
    found: list[Launch] = []

    def record(
        kernel: Any, programs: int, tile: Tile, arguments: tuple[Any, ...], **constants: Any
    ) -> None:
        found.append(Launch(kernel, programs, tile, arguments, constants))

    before = launch.capability, launch._launch
    launch.capability = lambda _: capability
    launch._launch = record
    try:
        yield found
    finally:
        launch.capability, launch._launch = before


@dataclass(frozen=True)
class Compiled:
    """What the compiler and the assembler say of a kernel."""

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compile_launch(item: Launch, capability: int) -> Compiled:
    """Triton to PTX to machine code, which is thrown away."""
    order = {name: (i,) for i, name in enumerate(item.kernel.arg_names)}
    source = ASTSource(
        item.kernel,
        item.signature(),
        item.all_constants(),
        {order[name]: [["tt.divisibility", 16]] for name in item.hints()},
    )
    options = {"num_warps": item.tile.warps, "num_stages": item.tile.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    registers, spill_bytes = resources(ptx, capability)
    return Compiled(ptx, registers, spill_bytes, kernel.metadata.shared)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, stores and loads together."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={target[1]}", str(path)]
        done = subprocess.run(
            [*command, "-o", f"{path}.cubin"], capture_output=True, text=True, check=True
        )
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", done.stderr))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))


def forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, window: tuple[int, int], *, cross: bool, layout: str
) -> Callable[[], None]:
    """A call of the backend: both directions, a mask in the set form."""
    from salkernels.backends import triton as backend

    groups, samples, channels, height, width = shape

    def features() -> Tensor:
        if layout == "channels_last":
            return torch.zeros(groups, samples, height, width, channels, dtype=dtype).movedim(-1, 2)
        return torch.zeros(shape, dtype=dtype)

    query = features()
    key = features() if cross else None
    mask = None if cross else ~torch.eye(samples, dtype=torch.bool).repeat(groups, 1, 1)
    capacity = groups * samples * samples if mask is None else int(mask.count_nonzero())

    def call() -> None:
        found = backend.outputs(query, key, window, capacity)
        launch.forward(query, key, mask, window, 1e-12, found)
        grads = torch.empty_like(query), None if key is None else torch.empty_like(key)
        launch.backward(
            found[0], query, key, mask, found[1], found[2], found[3], window, 1e-12, *grads
        )

    return call
