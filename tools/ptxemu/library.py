"""The emulator's C++ core: built by g++ at its first use, kept until a source changes."""

from __future__ import annotations

import ctypes as C
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

CORE = Path(__file__).resolve().parent / "core"
BUILD = Path(__file__).resolve().parents[2] / "build" / "ptxemu"
# No fused or reordered floating point: results are those that the PTX asks for.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-w"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
)
CPU_INFO = Path("/proc/cpuinfo")


def obstacle() -> str | None:
    """Why the emulator cannot be built and run on this machine, or None."""
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the PTX emulator runs on x86-64 Linux only"
    if not {"avx2", "f16c", "fma"} <= set(_flags_of_cpu()):
        return "the PTX emulator needs AVX2, F16C and FMA, which this CPU lacks"
    return None


def _flags_of_cpu() -> list[str]:
    for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return line.split()
    return []


class Region(C.Structure):
    """As in core/api.cpp: a buffer, where it lies, and which parts of it may be touched."""

    _fields_ = (
        ("va", C.c_uint64),
        ("size", C.c_uint64),
        ("host", C.c_void_p),
        ("name", C.c_char_p),
        ("number_of_intervals", C.c_uint64),
        ("intervals", C.POINTER(C.c_uint64)),
        ("flags", C.c_uint64),
    )


@cache
def load() -> Any:
    """The library with the types of its functions."""
    library = C.CDLL(str(_build()))
    u32s = C.POINTER(C.c_uint32)
    library.pe_create.restype = C.c_void_p
    library.pe_create.argtypes = [C.c_char_p, C.POINTER(C.c_void_p)]
    library.pe_destroy.argtypes = [C.c_void_p]
    library.pe_free.argtypes = [C.c_void_p]
    library.pe_info.restype = C.c_void_p
    library.pe_info.argtypes = [C.c_void_p]
    library.pe_global_host.restype = C.c_void_p
    library.pe_global_host.argtypes = [C.c_void_p, C.c_uint64]
    library.pe_launch.restype = C.c_void_p
    library.pe_launch.argtypes = [
        *(C.c_void_p, C.c_char_p, u32s, u32s, C.c_uint32),  # module, kernel, grid, block, shared
        *(C.c_char_p, C.c_uint32, C.POINTER(Region), C.c_uint32),  # parameters, regions
        *(C.POINTER(C.c_int64), C.c_uint32),  # options
    ]
    return library


def take(text: int) -> str:
    """A string that the library allocated; frees it."""
    found = C.string_at(text).decode("utf-8", "replace")
    load().pe_free(text)
    return found


def _build() -> Path:
    digest = hashlib.sha256(" ".join([*FLAGS, *_flags_of_cpu()]).encode())
    for source in sorted(CORE.iterdir()):
        digest.update(source.read_bytes())
    target = BUILD / f"{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    command = ["g++", *FLAGS, str(CORE / "api.cpp"), "-o", str(partial)]
    # A preloaded sanitizer is meant for what is tested, not for the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"the PTX emulator did not build:\n{run.stderr[-4000:]}")
    partial.replace(target)
    return target
