"""The CUDA kernels as host code: the source that a GPU gets, compiled for the CPU.

The host library is `csrc/register_cuda.cpp`, the registration that a GPU runs, with `csrc/cuda`
compiled against `emulator.h`: the operators of `salkernels.schema` in a library of their own, for
tensors on the CPU. `HostKernels` calls them. It has the functions of a backend, so that every test
of a backend can run on it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salkernels import schema
from salkernels.reference import Outputs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = (HERE / "emulator.cpp", HERE / "library.cpp", ROOT / "csrc" / "register_cuda.cpp")
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SANITIZE = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
_I64 = ctypes.c_int64
TAKE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[_I64] * 4, ctypes.c_void_p)


def obstacle() -> str | None:
    """Why the kernels cannot be compiled for the host, or None."""
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    if os.uname().machine != "x86_64":
        return "the emulator switches stacks on x86-64 only"
    return None if (ROOT / "csrc").is_dir() else "needs a source tree"


def build(sanitize: bool = False) -> Path:
    """The host library, built if its sources or torch have changed."""
    home = Path(torch.__file__).parent
    flags = ["-std=c++17", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += SANITIZE if sanitize else ("-O2",)
    flags += ["-DSALKERNELS_EMULATOR", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", str(home / "include")]
    digest = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    for source in sorted([*(ROOT / "csrc").rglob("*"), *HERE.iterdir()]):
        if source.suffix in {".cpp", ".cu", ".cuh", ".h"} and "cpu" not in source.parts:
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

    def mean_match(
        self,
        x: Tensor,
        y: Tensor | None,
        pairs: Tensor | None,
        groups: int,
        window: tuple[int, int],
        eps: float,
    ) -> Outputs:
        """As in `salkernels.backends.cuda`."""
        return Outputs(*self._call("native_mean_match", x, y, pairs, groups, window, eps))

    def mean_match_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        pairs: Tensor | None,
        groups: int,
        max_sim: Tensor,
        argmax: Tensor,
        norm: Tensor,
        window: tuple[int, int],
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        """As in `salkernels.backends.cuda`."""
        rest = (x, y, pairs, groups, max_sim, argmax, norm, window, eps)
        grads: tuple[Tensor, Tensor | None] = self._call("native_mean_match_backward", grad, *rest)
        return grads

    def _call(self, name: str, *arguments: Any) -> Any:
        self.library.emulator_set(_I64(self.shared_limit), _I64(self.order), self._take)
        operator = getattr(torch.ops.salkernels_emulator, name).default
        return operator(*arguments, self.allow_tf32)
