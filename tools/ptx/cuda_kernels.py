"""The PTX of the CUDA kernels, compiled by nvcc for sm_80 and run on `tools.ptxemu`.

The host build of `tools.host_cuda` plans each call as on a GPU; `CompiledKernels` takes each launch
before it runs, and runs the PTX in its place. The emulator checks every access and counts
instructions and memory traffic.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from typing import Any

from tools import ptxemu
from tools.host_cuda import kernels as host
from tools.host_cuda.kernels import ROOT, TAKE, HostKernels

FILES = ("forward", "backward")
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


def ptx(name: str) -> str:
    """The PTX of a file in csrc/cuda; nvcc runs when a source or its version has changed."""
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256(version.stdout.encode())
    for path in sorted([*source.parent.iterdir(), ROOT / "csrc" / "geometry.h"]):
        digest.update(path.read_bytes())
    target = ROOT / "build" / "ptx" / f"{name}-{digest.hexdigest()[:16]}.ptx"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(ptxemu.nvcc_ptx(source, "sm_80"), encoding="utf-8")
        partial.replace(target)
    return target.read_text(encoding="utf-8")


class CompiledKernels(HostKernels):
    """The PTX for sm_80; `stats` holds the counters of the launches since `clear`."""

    def __init__(self, allow_tf32: bool = False, modules: list[Any] | None = None) -> None:
        super().__init__(80, allow_tf32)
        self.modules = modules or [ptxemu.Module(ptx(name)) for name in FILES]
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
