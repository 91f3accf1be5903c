"""The CUDA kernels without a GPU: their source compiled for the host, or their PTX on an emulator.

`HostKernels` compiles `csrc/cuda` with the C++ compiler and `csrc/emulator`, and calls it through
ctypes. `CompiledKernels` compiles it with nvcc for sm_80 and runs the PTX on `ptxemu`, a folder of
tools that may lie beside the repository; it also counts memory traffic. Both take CPU tensors and
have the two functions of a backend, so that every test of a backend can run them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salkernels.reference import accumulate_dtype, index_dtype

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulator" / "emulator.cpp"
PTXEMU = ROOT.parent / "shared" / "tools" / "ptxemu"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SANITIZE = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
_I64 = ctypes.c_int64
_POINTER = ctypes.c_void_p


class Maps(ctypes.Structure):
    """As in csrc/cuda/problem.h; so are the two below."""

    _fields_ = (
        ("data", _POINTER),
        ("grad", _POINTER),
        ("norms", _POINTER),
        ("strides", _I64 * 5),
        ("grad_strides", _I64 * 5),
        ("samples", _I64),
        ("vector", _I64),
        ("grad_vector", _I64),
    )


class Tiling(ctypes.Structure):
    _fields_ = (
        ("streamed", _I64),
        ("units", _I64),
        ("samples", _I64 * 2),
        ("tiles", _I64 * 2),
        ("pixels", _I64),
        ("chunks", _I64),
        ("stages", _I64),
    )


class Problem(ctypes.Structure):
    _fields_ = (
        ("maps", Maps * 2),
        ("mask", _POINTER),
        ("grad_loss", _POINTER),
        ("slots", _POINTER),
        ("argmax", _POINTER),
        ("max_sim", _POINTER),
        ("loss", _POINTER),
        ("chosen_end", _POINTER),
        ("chosen_by", _POINTER),
        ("mask_strides", _I64 * 3),
        ("grad_loss_strides", _I64 * 3),
        ("set_form", _I64),
        ("wide_index", _I64),
        ("groups", _I64),
        ("channels", _I64),
        ("capacity", _I64),
        ("dtype", _I64),
        ("allow_tf32", _I64),
        ("eps", ctypes.c_double),
        ("height", _I64),
        ("width", _I64),
        ("window_rows", _I64),
        ("window_columns", _I64),
        ("tiling", Tiling),
    )


class _Recorded(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("blocks", _I64),
        ("rows", _I64),
        ("threads", _I64),
        ("shared_bytes", _I64),
    )


class Launch(NamedTuple):
    """One kernel of a plan."""

    name: str
    blocks: int
    rows: int
    threads: int
    shared_bytes: int


def obstacle() -> str | None:
    """Why the kernels cannot be compiled for the host, or None."""
    if _compiler() is None:
        return "no g++ on this machine"
    if os.uname().machine != "x86_64":
        return "the emulator switches stacks on x86-64 only"
    return None if EMULATOR.is_file() else "needs a source tree"


def ptx_obstacle() -> str | None:
    """Why PTX cannot be compiled and run, or None."""
    if not PTXEMU.is_dir():
        return "../shared/tools/ptxemu is not here"
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return obstacle()


def _compiler() -> str | None:
    return shutil.which("g++")


def build(sanitize: bool = False) -> Path:
    """The host library, built if its sources have changed."""
    flags = ["-std=c++17", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += SANITIZE if sanitize else ("-O2",)
    flags += [f"-I{ROOT / 'csrc'}", f"-I{EMULATOR.parent}"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted((ROOT / "csrc").rglob("*")):
        if source.is_file() and "cpu" not in source.parts:
            digest.update(source.read_bytes())
    target = ROOT / "build" / "emulator" / f"{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [str(_compiler()), *flags, str(EMULATOR), "-o", str(partial)]
        # A preloaded sanitizer is meant for what is built, not for the compiler.
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        partial.replace(target)
    return target


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _vector(x: Tensor) -> bool:
    """Whether rows of channels can be copied in pieces of 16 bytes."""
    size = x.element_size()
    others = [x.stride(i) for i in (0, 1, 3, 4) if x.shape[i] > 1]
    return (
        x.stride(2) == 1
        and x.data_ptr() % 16 == 0
        and x.shape[2] * size % 16 == 0
        and all(stride * size % 16 == 0 for stride in others)
    )


class _Call:
    """A Problem and the tensors that it points to."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        window: tuple[int, int],
        eps: float,
        capacity: int,
        allow_tf32: bool,
    ) -> None:
        groups, _, channels, height, width = query.shape
        keys = query if key is None else key
        self.tensors: list[Tensor] = []
        problem = self.problem = Problem()
        self.shape = (groups, query.shape[1], keys.shape[1])
        for side, x in enumerate((query, keys)):
            maps = problem.maps[side]
            maps.data, maps.samples, maps.vector = self.keep(x), x.shape[1], _vector(x)
            maps.strides = (_I64 * 5)(*x.stride())
        if mask is not None:
            problem.mask = self.keep(mask)
            problem.mask_strides = (_I64 * 3)(*mask.stride())
            table = groups * query.shape[1] * keys.shape[1]
            problem.slots = self.keep(torch.empty(table + 1, dtype=torch.int32))
        problem.set_form, problem.wide_index = key is None, window[0] * window[1] > 256
        problem.groups, problem.channels, problem.capacity = groups, channels, capacity
        problem.dtype, problem.allow_tf32 = DTYPES.index(query.dtype), allow_tf32
        problem.eps, problem.height, problem.width = eps, height, width
        problem.window_rows, problem.window_columns = window

    def keep(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def add_norms(self, dtype: torch.dtype) -> None:
        for maps in self.problem.maps:
            rows = self.problem.groups * maps.samples * self.problem.height * self.problem.width
            maps.norms = self.keep(torch.empty(rows, dtype=dtype))
            if self.problem.set_form:
                self.problem.maps[1].norms = maps.norms
                return


class Kernels:
    """The two functions of a backend, in terms of `_launch`; mirrors csrc/register_cuda.cpp."""

    def __init__(self, architecture: int = 80, allow_tf32: bool = False) -> None:
        self.shared_limit = SHARED_BYTES[architecture]
        self.allow_tf32 = allow_tf32
        self.library = load()

    def status(self) -> str | None:
        return None

    def can_run(self, query: Tensor, key: Tensor | None, window: tuple[int, int]) -> str | None:
        return None if query.device.type == "cpu" else "emulated kernels take tensors of the CPU"

    def pair_losses_forward(
        self,
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        window: tuple[int, int],
        eps: float,
        capacity: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = _Call(query, key, mask, window, eps, capacity, self.allow_tf32)
        wide = accumulate_dtype(query.dtype)
        plane = (capacity, *query.shape[3:])
        if 0 in call.shape:
            outputs = (torch.zeros(call.shape, dtype=wide), torch.zeros(plane), torch.zeros(plane))
            return outputs[0], outputs[1].to(index_dtype(window)), outputs[2].to(wide)
        loss = torch.empty(call.shape, dtype=wide)
        argmax = torch.empty(plane, dtype=index_dtype(window))
        max_sim = torch.empty(plane, dtype=wide)
        call.problem.loss, call.problem.argmax = call.keep(loss), call.keep(argmax)
        call.problem.max_sim = call.keep(max_sim)
        if query.dtype == torch.float64:
            call.add_norms(wide)
        self._launch(call, backward=False)
        return loss, argmax, max_sim

    def pair_losses_backward(
        self,
        grad_loss: Tensor,
        query: Tensor,
        key: Tensor | None,
        mask: Tensor | None,
        argmax: Tensor,
        max_sim: Tensor,
        window: tuple[int, int],
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        call = _Call(query, key, mask, window, eps, argmax.shape[0], self.allow_tf32)
        grads = [torch.empty_like(x) for x in (query, key) if x is not None]
        if 0 not in call.shape:
            problem = call.problem
            for side, maps in enumerate(problem.maps):
                grad = grads[min(side, len(grads) - 1)]
                maps.grad, maps.grad_vector = call.keep(grad), _vector(grad)
                maps.grad_strides = (_I64 * 5)(*grad.stride())
            grad_loss = grad_loss.to(max_sim.dtype)
            problem.grad_loss = call.keep(grad_loss)
            problem.grad_loss_strides = (_I64 * 3)(*grad_loss.stride())
            problem.argmax, problem.max_sim = call.keep(argmax), call.keep(max_sim)
            if self.library.emulator_needs_lists(ctypes.byref(problem), _I64(self.shared_limit)):
                call.add_norms(max_sim.dtype)
                for name in ("chosen_end", "chosen_by"):
                    lists = torch.empty(argmax.numel(), dtype=torch.int32)
                    setattr(problem, name, call.keep(lists))
            self._launch(call, backward=True)
        return grads[0], grads[1] if key is not None else None

    def plan(self, call: _Call, backward: bool) -> list[Launch]:
        """The launches; fills in the tiling of the problem."""
        recorded, count = (_Recorded * 5)(), ctypes.c_int()
        error = self.library.emulator_plan(
            ctypes.byref(call.problem),
            int(backward),
            _I64(self.shared_limit),
            recorded,
            ctypes.byref(count),
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return [
            Launch(r.name.decode(), r.blocks, r.rows, r.threads, r.shared_bytes)
            for r in recorded[: count.value]
        ]

    def _launch(self, call: _Call, backward: bool) -> None:
        raise NotImplementedError


def load() -> Any:
    sanitize = os.environ.get("SALKERNELS_EMULATOR_SANITIZE") == "1"
    library = ctypes.CDLL(str(build(sanitize)))
    library.emulator_plan.restype = library.emulator_run.restype = ctypes.c_char_p
    library.emulator_problem_bytes.restype = _I64
    if library.emulator_problem_bytes() != ctypes.sizeof(Problem):
        raise RuntimeError("Problem of cuda_emulation.py is not that of csrc/cuda/problem.h")
    return library


class HostKernels(Kernels):
    """The kernels as host code. `order`: of threads; 0 ascending, -1 descending, else a seed."""

    def __init__(
        self, architecture: int = 80, allow_tf32: bool = False, order: int | None = None
    ) -> None:
        super().__init__(architecture, allow_tf32)
        self.order = (
            int(os.environ.get("SALKERNELS_EMULATOR_ORDER", "0")) if order is None else order
        )

    def _launch(self, call: _Call, backward: bool) -> None:
        error = self.library.emulator_run(
            ctypes.byref(call.problem), int(backward), _I64(self.shared_limit), _I64(self.order)
        )
        if error is not None:
            raise RuntimeError(error.decode())


class CompiledKernels(Kernels):
    """The PTX for sm_80 on `ptxemu`; `stats` holds the counters of the launches since `clear`."""

    def __init__(self, allow_tf32: bool = False) -> None:
        super().__init__(80, allow_tf32)
        if str(PTXEMU) not in sys.path:
            sys.path.insert(0, str(PTXEMU))
        import ptxemu  # type: ignore[import-not-found]

        self.emulator = ptxemu
        cuda = ROOT / "csrc" / "cuda"
        self.modules = [
            ptxemu.from_nvcc(str(cuda / f"{name}.cu"), arch="sm_80")
            for name in ("forward", "backward")
        ]
        self.stats: list[Any] = []

    def _launch(self, call: _Call, backward: bool) -> None:
        launches = self.plan(call, backward)
        owners = {t.data_ptr(): t for t in call.tensors if t.numel() > 0}
        fields = list(self._fields(call.problem, owners))
        for launch in launches:
            stats = self.modules[backward].launch(
                launch.name,
                (launch.blocks, launch.rows),
                launch.threads,
                [self.emulator.Struct(*fields)],
                launch.shared_bytes,
            )
            self.stats.append(stats)

    def _fields(self, structure: Any, owners: dict[int, Tensor]) -> Any:
        """The bytes of a Problem, with each pointer replaced by the tensor that it points to."""
        for name, kind, *_ in structure._fields_:
            value = getattr(structure, name)
            if isinstance(value, ctypes.Structure):
                yield from self._fields(value, owners)
            elif isinstance(value, ctypes.Array):
                for item in value:
                    if isinstance(item, ctypes.Structure):
                        yield from self._fields(item, owners)
                    else:
                        yield ("q", item)
            elif kind is _POINTER:
                owner = owners.get(value)
                yield ("Q", 0 if owner is None else self.emulator.DevPtr(owner, 0))
            else:
                yield ("d" if kind is ctypes.c_double else "q", value)
