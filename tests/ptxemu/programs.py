"""CUDA sources as PTX, for the tests of the emulator, and the rounding of their inputs."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tools import ptxemu

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "build" / "ptx"


@cache
def ptx_of(source: str | Path, arch: str = "sm_80") -> str:
    """The PTX of a file or of source text, kept until it changes; skips where there is no nvcc."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    digest = hashlib.sha256(f"{arch} {shutil.which('nvcc')} {text}".encode()).hexdigest()
    kept = KEPT / f"test-{digest[:16]}.ptx"
    if not kept.is_file():
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(ptxemu.nvcc_ptx(source, arch), encoding="utf-8")
        partial.replace(kept)
    return kept.read_text(encoding="utf-8")


def compiled(source: str | Path, arch: str = "sm_80") -> ptxemu.Module:
    """A file or source text in the emulator; skips where either tool cannot run."""
    if (reason := ptxemu.obstacle()) is not None:
        pytest.skip(reason)
    return ptxemu.Module(ptx_of(source, arch))


def bf16(x):
    """As the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    """The numbers of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def tf32(x):
    """Rounded to the 10 bits of a tf32, half away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
