"""Build backend: setuptools, plus C++ libraries that are built where they can be.

The libraries use PyTorch's stable ABI: only the headers and libtorch of any torch >= 2.10 are
needed to build them, torch is never imported, and the torch that runs them may be a later one.
Without a compiler, or where the build fails, the package is installed without them, and the reason
goes to `_build_info.json`, which `python -m salkernels` reports.

Environment (`auto` builds what can be built, `1` fails where it cannot, `0` does not try):

    SALKERNELS_BUILD_CPU    auto | 1 | 0
    SALKERNELS_BUILD_CUDA   auto | 1 | 0; needs nvcc, and see salkernels_nvcc.py for architectures
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

import salkernels_nvcc as nvcc
from setuptools import Extension, build_meta
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent.parent
INFO = "_build_info.json"
TORCH_MINIMUM = (2, 10)
# pip keeps the wheels that it builds from a source archive or a commit, by their address alone: it
# neither runs this file again nor looks at its variables. Wheels of a folder are not kept.
REINSTALL = "run `pip install --no-cache-dir --force-reinstall --no-deps` on what you installed"
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
    f"-ffile-prefix-map={ROOT}/=",  # messages name files of the package, not of this machine
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
CPU_SOURCES = (
    "csrc/register_cpu.cpp",
    "csrc/register_cpu_lse.cpp",
    "csrc/cpu/plan.cpp",
    "csrc/cpu/lse_plan.cpp",
    "csrc/cpu/kept_memory.cpp",
    "csrc/cpu/isa_baseline.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
)
CUDA_SOURCES = ("csrc/register_cuda.cpp", *nvcc.SOURCES)
LIBRARIES = {"cpu": CPU_SOURCES, "cuda": CUDA_SOURCES}

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


def program_of(command: list[str]) -> str:
    """The compiler itself: "g++" of `ccache g++ -m64`."""
    words = [word for word in command if not word.startswith("-") and shutil.which(word)]
    return words[-1] if words else command[0]


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


def obstacle(library: str) -> str | None:
    """Why a library cannot even be tried, or None."""
    variable = f"SALKERNELS_BUILD_{library.upper()}"
    if switch(library.upper()) == "0":
        return f"it was left out of this installation ({variable}=0)"
    if os.name != "posix":
        return "it is built on Linux and macOS only"
    if library == "cuda" and (reason := nvcc.obstacle()):
        return reason
    if compiler() is None:
        named = os.environ.get("CXX")
        what = f"the compiler CXX={named} was not" if named else "no C++ compiler was"
        return f"{what} found when salkernels was built; install one, then {REINSTALL}"
    return None


def missing_torch() -> str:
    version = ".".join(map(str, TORCH_MINIMUM))
    return f"no headers of torch {version} or later were found when salkernels was built"


# ---- setuptools commands -------------------------------------------------------------------------


def setup_arguments() -> dict[str, Any]:
    """What setup.py adds to pyproject.toml."""
    arguments: dict[str, Any] = {"cmdclass": {"build_py": BuildPy, "build_ext": BuildExt}}
    extensions = []
    # "abi3" in the name and tag: the library has no Python symbol, so it fits every Python but the
    # free-threaded ones, which do not take that name.
    abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
    for library, sources in LIBRARIES.items():
        reason = obstacle(library) or (missing_torch() if torch_dir() is None else None)
        if reason is None:
            name = f"salkernels._C_{library}"
            extensions.append(Extension(name, [*sources], py_limited_api=abi3, optional=True))
        elif switch(library.upper()) == "1" and not _only_metadata():
            raise SystemExit(f"SALKERNELS_BUILD_{library.upper()}=1, but {reason}")
    if extensions:
        arguments["ext_modules"] = extensions
        if abi3:
            arguments["options"] = {"bdist_wheel": {"py_limited_api": "cp310"}}
    return arguments


def _only_metadata() -> bool:
    """Whether setup.py was run for the name and version only, or for the sdist."""
    return any(word in sys.argv for word in ("egg_info", "dist_info", "sdist"))


def write_info(package: Path, failures: dict[str, str | None]) -> None:
    """Records each library: built, or the reason why not. `failures`: of those that were tried."""
    info: dict[str, dict[str, Any]] = {}
    for library in LIBRARIES:
        tried = library in failures
        reason = failures[library] if tried else obstacle(library) or missing_torch()
        info[library] = {"built": reason is None, "reason": reason, "torch": str(torch_version())}
        if library == "cuda" and reason is None:
            built = nvcc.architectures()
            info[library]["architectures"] = [str(a) for a in built]
            info[library]["ptx"] = [str(a) for a in built if a.ptx]
            info[library]["nvcc"] = nvcc.version()
        if reason is not None:
            print(f"salkernels: the {library} backend will be missing: {reason}", file=sys.stderr)
    package.mkdir(parents=True, exist_ok=True)
    (package / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


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
            write_info(package, {})


class BuildExt(build_ext):
    """Compiles with the compilers themselves: distutils would take Python's own C flags."""

    def run(self) -> None:
        # setuptools clears `inplace` while it builds, and copies the library afterwards.
        self.into_source = bool(self.inplace)
        self.failures: dict[str, str | None] = {}
        if self.into_source:
            for stale in (ROOT / "salkernels").glob("_C_*.so"):
                stale.unlink()
        super().run()
        package = ROOT / "salkernels" if self.into_source else Path(self.build_lib) / "salkernels"
        write_info(package, self.failures)

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition("_")[2]
        reason = None
        try:
            self._compile(ext, library)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            lines = [line for line in output.splitlines() if "error" in line.lower()]
            first = (lines or output.splitlines() or ["no message"])[0].strip()
            language = "CUDA" if library == "cuda" else "C++"
            reason = f"the {language} build failed when salkernels was built: {first}"
            if switch(library.upper()) == "1":
                print(output, file=sys.stderr)
                raise SystemExit(f"SALKERNELS_BUILD_{library.upper()}=1, but {reason}") from None
        self.failures[library] = reason

    def _compile(self, ext: Extension, library: str) -> None:
        command, torch = compiler(), torch_dir()
        assert command is not None, "setup_arguments has checked"
        assert torch is not None, "setup_arguments has checked"
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_one(source: str) -> str:
            target = objects / (source.replace("/", "_") + ".o")
            output = ["-c", str(ROOT / source), "-o", str(target)]
            if source.endswith(".cu"):
                said = self._run([*nvcc_command(command), "-Xptxas=-v", *output])
                log = nvcc.resource_log(ROOT, source, nvcc.architectures())
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(said, encoding="utf-8")
                return str(target)
            arguments = [*COMPILE_FLAGS, *extra, "-isystem", str(torch / "include")]
            # Without it torch's headers do not declare what gives the current stream.
            arguments += ["-DUSE_CUDA"] if library == "cuda" else []
            self._run([*command, *arguments, *output])
            return str(target)

        with ThreadPoolExecutor(min(len(ext.sources), os.cpu_count() or 1)) as pool:
            compiled = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # No run path: torch is imported, and with it its own libraries, before this one is loaded.
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if library == "cuda":
            libraries += self._cuda_libraries(command, objects)
        linker = shlex.split(os.environ.get("LDFLAGS", ""))
        self._run([*command, "-shared", *extra, *compiled, *libraries, *linker, "-o", str(target)])

    def _cuda_libraries(self, command: list[str], objects: Path) -> list[str]:
        """The CUDA runtime, inside the library, and libtorch_cuda by its name alone."""
        stub = objects / "stub"
        stub.mkdir(exist_ok=True)
        (stub / "stub.cpp").write_text(nvcc.STUB, encoding="utf-8")
        name = "libtorch_cuda.so"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}"]
        self._run([*command, *flags, str(stub / "stub.cpp"), "-o", str(stub / name)])
        directories = [f"-L{d}" for d in nvcc.library_directories()]
        runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        return [f"-L{stub}", "-ltorch_cuda", *directories, *runtime]

    @staticmethod
    def _run(command: list[str]) -> str:
        """Runs a command; what it says on stderr."""
        print(shlex.join(command))
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def nvcc_command(host_compiler: list[str]) -> list[str]:
    """nvcc with all flags but source and output."""
    targets = [flag for a in nvcc.architectures() for flag in a.flags()]
    return [str(nvcc.nvcc()), *nvcc.FLAGS, *targets, "-ccbin", program_of(host_compiler)]


# ---- PEP 517 and 660 -----------------------------------------------------------------------------

build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def _with_torch(requirements: list[str]) -> list[str]:
    if torch_dir() is None and any(obstacle(library) is None for library in LIBRARIES):
        requirements = [*requirements, f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"]
    return requirements


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
