"""The CUDA kernels without a GPU: their source compiled for the host, or their PTX on an emulator.

The host library is `csrc/register_cuda.cpp`, the registration that a GPU runs, with `csrc/cuda` as
host code by `csrc/emulator`: the operators of `salkernels.schema` in a library of their own, for
tensors of the CPU. `HostKernels` calls them. `CompiledKernels` does too, but takes each launch
before it runs, and runs the PTX that nvcc gives for sm_80 in its place, on `ptxemu`, a folder of
tools that may lie beside the repository; it also counts memory traffic. Both have the functions of
a backend, so that every test of a backend can run them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salkernels import schema
from salkernels.reference import Outputs

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulator"
SOURCES = (EMULATOR / "emulator.cpp", EMULATOR / "library.cpp", ROOT / "csrc" / "register_cuda.cpp")
PTXEMU = ROOT / "tools" / "ptxemu"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SANITIZE = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
LINE = 64  # bytes; torch aligns what it allocates to that, so no two tensors share one
_I64 = ctypes.c_int64
TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[_I64] * 4, ctypes.c_void_p)


class _Pointer(ctypes.Structure):
    """As in csrc/emulator/library.cpp: a pointer's place in a Problem, and what it points to."""

    _fields_ = (("place", _I64), ("begin", ctypes.c_void_p), ("bytes", _I64))


def obstacle() -> str | None:
    """Why the kernels cannot be compiled for the host, or None."""
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    if os.uname().machine != "x86_64":
        return "the emulator switches stacks on x86-64 only"
    return None if EMULATOR.is_dir() else "needs a source tree"


def ptx_obstacle() -> str | None:
    """Why PTX cannot be compiled and run, or None."""
    if not PTXEMU.is_dir():
        return "../shared/tools/ptxemu is not here"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return obstacle()


def build(sanitize: bool = False) -> Path:
    """The host library, built if its sources or torch have changed."""
    home = Path(torch.__file__).parent
    flags = ["-std=c++17", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += SANITIZE if sanitize else ("-O2",)
    flags += ["-DSALKERNELS_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}", "-isystem", str(home / "include")]
    digest = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    for source in sorted((ROOT / "csrc").rglob("*")):
        if source.is_file() and "cpu" not in source.parts:
            digest.update(source.read_bytes())
    target = ROOT / "build" / "emulator" / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = ["g++", *flags, *map(str, SOURCES), "-o", str(partial)]
        command += [f"-L{home / 'lib'}", "-ltorch_cpu"]
        # A preloaded sanitizer is meant for what is built, not for the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        partial.replace(target)
    return target


@cache
def load() -> tuple[Any, torch.library.Library]:
    """The host library as ctypes sees it, and its operators, there as long as they are kept."""
    operators = torch.library.Library("salkernels_emulator", "DEF")
    schema.define(operators, schema.NATIVE)
    path = str(build(os.environ.get("SALKERNELS_EMULATOR_SANITIZE") == "1"))
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.emulator_problem_bytes.restype = _I64
    return library, operators


class HostKernels:
    """The kernels as host code. `order`: of threads; 0 ascending, -1 descending, else a seed."""

    _take: Any = TAKE()  # a launch is not taken, but runs

    def __init__(
        self, architecture: int = 80, allow_tf32: bool = False, order: int | None = None
    ) -> None:
        self.shared_limit = SHARED_BYTES[architecture]
        self.allow_tf32 = allow_tf32
        self.order = (
            int(os.environ.get("SALKERNELS_EMULATOR_ORDER", "0")) if order is None else order
        )
        self.library, _ = load()

    def status(self) -> str | None:
        return None

    def why_not(self, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
        return None if query.device.type == "cpu" else "emulated kernels take tensors of the CPU"

    def match(
        self,
        query: Tensor,
        key: Tensor | None,
        pairs: Tensor | None,
        valid: Tensor | None,
        window: tuple[int, int],
        eps: float,
    ) -> Outputs:
        """As `salkernels.reference.match`."""
        return Outputs(*self._call("native_match", query, key, pairs, valid, window, eps))

    def match_backward(
        self,
        grad_sim: Tensor,
        query: Tensor,
        key: Tensor | None,
        pairs: Tensor | None,
        valid: Tensor | None,
        max_sim: Tensor,
        argmax: Tensor,
        norm: Tensor,
        window: tuple[int, int],
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        """As `salkernels.reference.match_backward`."""
        rest = (query, key, pairs, valid, max_sim, argmax, norm, window, eps)
        grads: tuple[Tensor, Tensor | None] = self._call("native_match_backward", grad_sim, *rest)
        return grads

    def _call(self, name: str, *arguments: Any) -> Any:
        self.library.emulator_set(_I64(self.shared_limit), _I64(self.order), self._take)
        operator = getattr(torch.ops.salkernels_emulator, name).default
        return operator(*arguments, self.allow_tf32)


class CompiledKernels(HostKernels):
    """The PTX for sm_80 on `ptxemu`; `stats` holds the counters of the launches since `clear`."""

    def __init__(self, allow_tf32: bool = False, modules: list[Any] | None = None) -> None:
        super().__init__(80, allow_tf32)
        if str(PTXEMU) not in sys.path:
            sys.path.insert(0, str(PTXEMU))
        import ptxemu  # type: ignore[import-not-found]

        self.emulator = ptxemu
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
            argument = self.emulator.Struct(*self._words(problem))
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
            fields[pointer.place // 8] = ("Q", self.emulator.DevPtr(owned, 0))
        known = {pointer.begin for pointer in pointers[:number]}
        forgotten = [i for i, field in enumerate(fields) if field[0] == "q" and field[1] in known]
        assert not forgotten, f"words {forgotten} of a Problem are pointers, but not in the table"
        return fields
