"""What the CUDA library is compiled with: nvcc, and the architectures that it is compiled for.

TORCH_CUDA_ARCH_LIST    as for torch's own extensions: "8.0;9.0+PTX"; else what the visible GPU
                        needs, else DEFAULT
CUDA_HOME               the toolkit, instead of the one on the PATH
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DEFAULT = "8.0;8.6;9.0;10.0;12.0+PTX"
MINIMUM = (8, 0)  # asynchronous copies and the tensor core's bf16
STUB = """
// Stands for libtorch_cuda at link time, which a CPU-only torch does not have: the one symbol that
// the library takes from it. At run time the real one is loaded, with torch.
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
"""
SOURCES = ("csrc/cuda/forward.cu", "csrc/cuda/backward.cu")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DNDEBUG")


class Architecture(NamedTuple):
    major: int
    minor: int
    ptx: bool = False

    @property
    def digits(self) -> str:
        return f"{self.major}{self.minor}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    def flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{self.digits},code=sm_{self.digits}"]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.digits},code=compute_{self.digits}")
        return flags


def nvcc() -> str | None:
    """The compiler's path, or None."""
    home = os.environ.get("CUDA_HOME")
    if home:
        found = Path(home) / "bin" / "nvcc"
        return str(found) if found.is_file() else None
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def obstacle() -> str | None:
    """Why no library can be tried, or None."""
    if nvcc() is None:
        home = os.environ.get("CUDA_HOME")
        where = f" in CUDA_HOME={home}" if home else ""
        return f"no nvcc was found{where} when salkernels was built"
    try:
        architectures()
    except ValueError as error:
        return str(error)
    return None


def version() -> str:
    """Of the toolkit, as "13.0"."""
    text = _output(nvcc() or "nvcc", "--version")
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def architectures() -> list[Architecture]:
    """What is compiled for: of those wanted, what this nvcc knows and the kernels can run on.

    In place of one that this nvcc is too old for stands the latest one whose code runs there:
    machine code of an earlier minor version, or where PTX is wanted, PTX of whatever is earlier.
    """
    wanted, source = _wanted()
    candidates = [key for key in known() if key >= MINIMUM]
    usable: dict[tuple[int, int], Architecture] = {}
    for a in wanted:
        earlier = [key for key in candidates if key <= (a.major, a.minor)]
        fitting = [key for key in earlier if key[0] == a.major]
        if a.ptx and not fitting:
            fitting = [key for key in earlier if key in usable] or earlier
        if fitting:
            best = max(fitting)
            ptx = a.ptx or (best in usable and usable[best].ptx)
            usable[best] = Architecture(*best, ptx)
    if not usable:
        listed = ", ".join(map(str, wanted)) or "nothing"
        raise ValueError(
            f"{source} names {listed}, of which nvcc {version()} and the kernels (compute "
            f"capability {MINIMUM[0]}.{MINIMUM[1]} or later) support none"
        )
    return list(usable.values())


def known() -> list[tuple[int, int]]:
    """The architectures that this nvcc compiles for."""
    listed = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc() or "nvcc", "--list-gpu-arch"))
    return [(int(major), int(minor)) for major, minor in listed]


def _wanted() -> tuple[list[Architecture], str]:
    """The list, and where it comes from."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named:
        return parse(named), "TORCH_CUDA_ARCH_LIST"
    if visible := _visible():
        return parse(";".join(visible)), "the visible GPU"
    return parse(DEFAULT), "the default list"


def parse(text: str) -> list[Architecture]:
    """The architectures of a list as TORCH_CUDA_ARCH_LIST holds it."""
    result: dict[tuple[int, int], Architecture] = {}
    for word in filter(None, re.split(r"[;,\s]+", text)):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if found is None:
            raise ValueError(
                f'TORCH_CUDA_ARCH_LIST must be such as "8.0;9.0+PTX", but holds {word!r}'
            )
        key = int(found[1]), int(found[2])
        ptx = found[3] is not None or (key in result and result[key].ptx)
        result[key] = Architecture(*key, ptx)
    return list(result.values())


def _visible() -> list[str]:
    """Compute capabilities of the GPUs that the driver shows."""
    if shutil.which("nvidia-smi") is None:
        return []
    text = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted(set(re.findall(r"^\d+\.\d$", text, flags=re.MULTILINE)))


def resource_log(root: Path, source: str, compiled_for: Iterable[Architecture]) -> Path:
    """Where what `ptxas -v` says of a source, registers and spills, is kept: the build writes it,
    and the tests read it in place of a second compilation, which takes minutes.

    Its name changes with the sources, the flags, nvcc and the architectures of machine code.
    """
    targets = [flag for a in compiled_for for flag in a._replace(ptx=False).flags()]
    digest = hashlib.sha256(" ".join([version(), *FLAGS, *targets]).encode())
    csrc = root / "csrc"
    for path in [*sorted((csrc / "cuda").iterdir()), csrc / "geometry.h"]:
        digest.update(path.read_bytes())
    name = f"{Path(source).stem}-{digest.hexdigest()[:16]}.txt"
    return root / "build" / "ptxas" / name


def library_directories() -> list[str]:
    """Where libcudart_static is. nvcc may be a wrapper script, whose own place says nothing."""
    text = _output(nvcc() or "nvcc", "--dryrun", "-x", "cu", os.devnull)
    return re.findall(r'"-L([^"]+)"', text)


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout + run.stderr
