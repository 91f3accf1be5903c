"""Loads the compiled libraries and keeps the real cause if one cannot be loaded.

The libraries contain no Python symbols and use only PyTorch's stable ABI, so that
`torch.ops.load_library` loads them under any Python and any later torch.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import schema  # noqa: F401  (the operators must be there before their implementations)

HERE = Path(__file__).parent
BUILD_INFO = "_build_info.json"  # written by the build: what was built, and why the rest was not


def load(name: str) -> str | None:
    """Loads `_C_<name>`; None if that worked, else the reason."""
    path = _path(name)
    if path is None:
        reason = build_info().get(name, {}).get("reason")
        unbuilt = f"this copy of salkernels was not built; run `pip install -e .` in {HERE.parent}"
        return reason or f"its compiled library is missing: {unbuilt}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # whatever it is, it is the answer to "why not?"
        # load_library wraps the loader's message, which names the missing symbol or file.
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    return None


def rebuild_hint() -> str | None:
    """What to do where the C++ kernels are missing for want of a compiler that is there now."""
    if _path("cpu") is not None or "compiler" not in str(build_info().get("cpu", {}).get("reason")):
        return None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        return None
    return (
        f"{found} is here now: reinstall what you installed with `pip install --no-cache-dir "
        f"--force-reinstall --no-deps ...`; without --no-cache-dir pip brings this build back"
    )


def number(name: str, function: str, kind: type[ctypes._SimpleCData[int]] = ctypes.c_int) -> int:
    """The number that `salkernels_<function>()` of a loaded library returns, of that C type.

    It is not an operator, because modes that intercept every operator (fake tensors) would answer
    in its place.
    """
    call = getattr(ctypes.CDLL(str(_path(name))), f"salkernels_{function}")
    call.restype = kind
    return int(call())


def _path(name: str) -> Path | None:
    return next(iter(sorted(HERE.glob(f"_C_{name}.*"))), None)


@cache
def build_info() -> dict[str, dict[str, Any]]:
    """What the build recorded, by library: `built`, and `reason` where it was not."""
    try:
        info: dict[str, dict[str, Any]] = json.loads((HERE / BUILD_INFO).read_text("utf-8"))
    except (OSError, ValueError):  # not there, or cut off: nothing is known
        return {}
    return info
