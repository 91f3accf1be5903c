"""The PTX of the CUDA kernels, compiled by nvcc for sm_80 and run on `tools.ptxemu`.

The host build of `tools.host_cuda` plans each call as on a GPU; `CompiledKernels` takes each launch
before it runs, and runs the PTX in its place. The emulator checks every access and counts
instructions and memory traffic.
"""

from __future__ import annotations

import ctypes
import shutil
from typing import Any

from tools import ptxemu
from tools.host_cuda import kernels as host
from tools.host_cuda.kernels import ROOT, TAKE, HostKernels

LINE = 64  # bytes; torch aligns what it allocates to that, so no two tensors share one
_I64 = ctypes.c_int64


class _Pointer(ctypes.Structure):
    """As in host_cuda/library.cpp: a pointer's place in a Problem, and what it points to."""

    _fields_ = (("place", _I64), ("begin", ctypes.c_void_p), ("bytes", _I64))


def obstacle() -> str | None:
    """Why PTX cannot be compiled and run, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return host.obstacle() or ptxemu.obstacle()


class CompiledKernels(HostKernels):
    """The PTX for sm_80; `stats` holds the counters of the launches since `clear`."""

    def __init__(self, allow_tf32: bool = False, modules: list[Any] | None = None) -> None:
        super().__init__(80, allow_tf32)
        self.modules = modules or [  # those of another, or compiled anew
            ptxemu.from_nvcc(str(ROOT / "csrc" / "cuda" / f"{name}.cu"), arch="sm_80")
            for name in ("forward", "backward")
        ]
        self.stats: list[Any] = []
        self.failure: Exception | None = None
        self._take = TAKE(self._launch)

    def _call(self, name: str, *arguments: Any) -> Any:
        self.failure = None
        try:
            return super()._call(name, *arguments)
        except RuntimeError:
            if self.failure is None:
                raise
            raise self.failure from None

    def _launch(
        self, name: bytes, blocks: int, rows: int, threads: int, shared: int, problem: int
    ) -> int:
        """Takes a launch: 0, or, since nothing can be raised through C++, 1 and `failure`."""
        kernel = name.decode()
        try:
            module = next(m for m in self.modules if kernel in m.kernels)
            argument = ptxemu.Struct(*self._words(problem))
            self.stats.append(module.launch(kernel, (blocks, rows), threads, [argument], shared))
        except Exception as error:
            self.failure = error
            return 1
        return 0

    def _words(self, problem: int) -> list[tuple[str, Any]]:
        """The 8-byte words of a Problem, with each pointer replaced by the memory it points to."""
        import numpy

        count = self.library.emulator_problem_bytes() // 8
        words = list((_I64 * count).from_address(problem))
        pointers = (_Pointer * 24)()
        number = self.library.emulator_pointers(ctypes.c_void_p(problem), pointers)
        fields: list[tuple[str, Any]] = [("q", word) for word in words]
        for pointer in pointers[:number]:
            # From the start of its line on, so that its alignment is the same for the emulator.
            ahead = pointer.begin % LINE
            memory = (ctypes.c_uint8 * (ahead + pointer.bytes)).from_address(pointer.begin - ahead)
            owned = numpy.frombuffer(memory, dtype=numpy.uint8)[ahead:]
            fields[pointer.place // 8] = ("Q", ptxemu.DevPtr(owned, 0))
        known = {pointer.begin for pointer in pointers[:number]}
        forgotten = [i for i, field in enumerate(fields) if field[0] == "q" and field[1] in known]
        assert not forgotten, f"words {forgotten} of a Problem are pointers, but not in the table"
        return fields
