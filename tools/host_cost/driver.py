"""A driver of CUDA whose every function does nothing and reports success.

With it Triton's own code for launches runs to its end on a machine without a GPU: what is measured
is all that a launch costs this side of the driver.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def _load_driver(calls: set[str]) -> None:
    """A library in place of libcuda.so.1, for those who link to it and those who look it up."""
    text = "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(calls))
    folder = Path(tempfile.mkdtemp(prefix="salkernels-"))
    library, source = folder / "libcuda.so.1", folder / "driver.c"
    source.write_text(text)
    command = ["gcc", "-shared", "-fPIC", "-O2", "-fno-builtin", str(source), "-o", str(library)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def triton_utilities() -> Any:
    """Triton's C functions for CUDA, built as Triton builds them, over that driver."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_file

    source = Path(driver.dirname) / "driver.c"
    _load_driver(set(re.findall(r"\bcu[A-Z]\w+", source.read_text())))
    utilities = compile_module_from_file(
        src_path=str(source),
        name="cuda_utils",
        library_dirs=[],
        include_dirs=driver.include_dirs,
        libraries=[],
    )
    for name in ("PyCUtensorMap", "PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        setattr(driver, name, getattr(utilities, name))
    return utilities
