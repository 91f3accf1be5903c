"""An emulator of PTX on the CPU: runs what nvcc and Triton compile, checks it, counts it.

    module = ptxemu.Module(ptx)
    stats = module.launch("kernel", grid=(8, 2), block=128, args=[out, ptxemu.ReadOnly(x), 100])

README.md says what is modelled and what is not.
"""

from .errors import (
    Deadlock,
    DeviceAssert,
    Misaligned,
    OutOfBounds,
    PtxEmuError,
    RaceError,
    UninitRead,
    Unsupported,
)
from .library import obstacle
from .memory import DevPtr, PtrTable, ReadOnly, Struct, Uninit
from .module import Kernel, Module, Stats, nvcc_ptx

__all__ = [
    "Deadlock",
    "DevPtr",
    "DeviceAssert",
    "Kernel",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "PtrTable",
    "PtxEmuError",
    "RaceError",
    "ReadOnly",
    "Stats",
    "Struct",
    "Uninit",
    "UninitRead",
    "Unsupported",
    "nvcc_ptx",
    "obstacle",
]
