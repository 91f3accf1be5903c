"""Build backend: setuptools, plus C++ libraries that are built where they can be.

The libraries use PyTorch's stable ABI: only the headers and libtorch of any torch >= 2.10 are
needed to build them, torch is never imported, and the torch that runs them may be a later one.
Without a compiler, or where the build fails, the package is installed without them, and the reason
goes to `_build_info.json`, which `python -m salkernels` reports.

Environment (`auto` builds what can be built, `1` fails where it cannot, `0` does not try):

    SALKERNELS_BUILD_CPU    auto | 1 | 0
    SALKERNELS_BUILD_CUDA   auto | 1 | 0; this version holds no CUDA library, so 1 fails
    SALKERNELS_TORCH_DIR    the torch package to build against, instead of the one found
    CXX                     the C++ compiler
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
INFO = "_build_info.json"
TORCH_MINIMUM = (2, 10)
# No -ffast-math: a NaN must stay one. -g0, since Python's own flags may ask for debug data.
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
CPU_SOURCES = (
    "csrc/register_cpu.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/isa_baseline.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
)

# ---- What can be built ---------------------------------------------------------------------------


def switch(name: str) -> str:
    """The value of SALKERNELS_BUILD_<name>."""
    variable = f"SALKERNELS_BUILD_{name}"
    value = os.environ.get(variable, "auto").strip().lower() or "auto"
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{variable} must be auto, 1 or 0, got {value!r}")
    return value


def compiler() -> list[str] | None:
    """The command of the C++ compiler, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def torch_dir() -> Path | None:
    """A torch package with headers that are new enough.

    Build isolation hides the packages of the environment that is installed into, but does not move
    them: its site-packages are looked at too, so that torch is not downloaded twice.
    """
    candidates = []
    if named := os.environ.get("SALKERNELS_TORCH_DIR"):
        candidates.append(Path(named))
    else:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            candidates.append(Path(spec.origin).parent)
        candidates += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    return next(filter(_is_usable, candidates), None)


def _is_usable(directory: Path) -> bool:
    try:
        version = (directory / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < TORCH_MINIMUM:
        return False
    return (directory / "include/torch/csrc/stable/library.h").is_file()


def obstacle() -> str | None:
    """Why the CPU library cannot even be tried, or None."""
    if switch("CPU") == "0":
        return "it was left out of this installation (SALKERNELS_BUILD_CPU=0)"
    if os.name != "posix":
        return "it is built on Linux and macOS only"
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the compiler CXX={named} was" if named else "no C++ compiler was"
        return f"{what} not found when salkernels was installed; install one and reinstall"
    return None


def missing_torch() -> str:
    version = ".".join(map(str, TORCH_MINIMUM))
    return f"no headers of torch {version} or later were found when salkernels was installed"


# ---- setuptools commands -------------------------------------------------------------------------


def setup_arguments() -> dict[str, Any]:
    """What setup.py adds to pyproject.toml."""
    if switch("CUDA") == "1":
        raise SystemExit("SALKERNELS_BUILD_CUDA=1: this version of salkernels has no CUDA library")
    reason = obstacle() or (missing_torch() if torch_dir() is None else None)
    arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPy, "build_ext": BuildExt}}
    if reason is None:
        sources = [*CPU_SOURCES]
        # "abi3" in the name and tag: the library has no Python symbol, so it fits every Python.
        library = Extension("salkernels._C_cpu", sources, py_limited_api=True, optional=True)
        arguments["ext_modules"] = [library]
        arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    elif switch("CPU") == "1" and not _only_metadata():
        raise SystemExit(f"SALKERNELS_BUILD_CPU=1, but {reason}")
    return arguments


def _only_metadata() -> bool:
    """Whether setup.py was run for the name and version only, or for the sdist."""
    return any(word in sys.argv for word in ("egg_info", "dist_info", "sdist"))


def write_info(package: Path, built: bool, reason: str | None) -> None:
    package.mkdir(parents=True, exist_ok=True)
    info = {"cpu": {"built": built, "reason": reason, "torch": str(torch_version())}}
    (package / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if reason is not None:
        print(f"salkernels: the cpu backend will be missing: {reason}", file=sys.stderr)


def torch_version() -> str | None:
    directory = torch_dir()
    if directory is None:
        return None
    text = (directory / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return found[1] if found else None


class BuildPy(build_py):
    """Copies the package, and says why there is no library where none is even tried."""

    def run(self) -> None:
        if not self.editable_mode:
            # What an earlier build left there would be packed too.
            shutil.rmtree(Path(self.build_lib) / "salkernels", ignore_errors=True)
        super().run()
        if not self.distribution.has_ext_modules():
            source = ROOT / "salkernels"
            package = source if self.editable_mode else Path(self.build_lib) / "salkernels"
            if self.editable_mode:
                for stale in source.glob("_C_*.so"):
                    stale.unlink()
            write_info(package, False, obstacle() or missing_torch())


class BuildExt(build_ext):
    """Compiles with the C++ compiler itself: distutils would take Python's own C flags."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds, and copies the library afterwards.
        self.into_source = bool(self.inplace)
        if self.into_source:
            for stale in (ROOT / "salkernels").glob("_C_*.so"):
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        reason = None
        try:
            self._compile(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            lines = [line for line in output.splitlines() if "error" in line.lower()]
            first = (lines or output.splitlines() or ["no message"])[0].strip()
            reason = f"the C++ build failed when salkernels was installed: {first}"
            if switch("CPU") == "1":
                print(output, file=sys.stderr)
                raise SystemExit(f"SALKERNELS_BUILD_CPU=1, but {reason}") from None
        package = ROOT / "salkernels" if self.into_source else Path(self.build_lib) / "salkernels"
        write_info(package, reason is None, reason)

    def _compile(self, ext: Extension) -> None:
        command, torch = compiler(), torch_dir()
        assert command is not None, "setup_arguments has checked"
        assert torch is not None, "setup_arguments has checked"
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_one(source: str) -> str:
            target = objects / (source.replace("/", "_") + ".o")
            arguments = [*COMPILE_FLAGS, *extra, "-isystem", str(torch / "include")]
            self._run([*command, *arguments, "-c", str(ROOT / source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(min(len(ext.sources), os.cpu_count() or 1)) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        # No run path: torch is imported, and with it libtorch_cpu loaded, before the library is.
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        linker = shlex.split(os.environ.get("LDFLAGS", ""))
        self._run([*command, "-shared", *extra, *compiled, *libraries, *linker, "-o", str(library)])

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command))
        subprocess.run(command, check=True, capture_output=True, text=True)


# ---- PEP 517 and 660 -----------------------------------------------------------------------------

build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def _with_torch(requirements: list[str]) -> list[str]:
    if obstacle() is None and torch_dir() is None:
        requirements = [*requirements, f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"]
    return requirements


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
