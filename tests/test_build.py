"""The build: switches, machines without a compiler, editable installs, the sdist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "buildtools" / "salkernels_build.py"
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
pytestmark = pytest.mark.skipif(
    not TOOLS.is_file() or importlib.util.find_spec("setuptools") is None,
    reason="needs a source tree and setuptools",
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a build reads."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(
        "*.so", "_build_info.json", "__pycache__", "build", "*.egg-info"
    )
    for name in ("salkernels", "training", "csrc", "buildtools"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("data", "methods", "models"):
        (tree / "training" / name).mkdir(exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or not HAS_COMPILER, reason="nvcc is not on the PATH of this machine"
)


def _backend(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend as pip does, in this environment; the result on stdout."""
    call = "'dist'" if hook.startswith("build") else ""
    code = (
        "import sys; sys.path.insert(0, 'buildtools'); import salkernels_build as b\n"
        f"print('RESULT', b.{hook}({call}))"
    )
    (tree / "dist").mkdir(exist_ok=True)
    ours = ("SALKERNELS_", "CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    # The CUDA library takes a minute; the tests that mean it ask for it.
    clean["SALKERNELS_BUILD_CUDA"] = "0"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _wheel(tree: Path, library: str = "cpu", **environment: str) -> tuple[str, list[str], dict]:
    """Name, files and what was recorded of a library, of the wheel that a build gives."""
    run = _backend(tree, "build_wheel", **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("salkernels/_build_info.json"))[library]
        return wheel.name, archive.namelist(), info


def _use(wheel: Path, code: str, folder: Path) -> None:
    """Runs code that prints the path of a module, which must be the one that the wheel brought."""
    shutil.unpack_archive(wheel, folder, "zip")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert str(folder) in run.stdout


def _has_library(files: list[str]) -> bool:
    return any(name.startswith("salkernels/_C_cpu") for name in files)


def test_left_out_on_request(tree):
    name, files, info = _wheel(tree, SALKERNELS_BUILD_CPU="0")
    assert name.endswith("py3-none-any.whl")
    assert not _has_library(files)
    assert info["reason"] == "it was left out of this installation (SALKERNELS_BUILD_CPU=0)"


def test_without_a_compiler_it_installs_and_says_so(tree):
    name, files, info = _wheel(tree, CXX="/no/such/compiler")
    assert name.endswith("py3-none-any.whl")
    assert not _has_library(files)
    assert "the compiler CXX=/no/such/compiler was not found" in info["reason"]


def test_without_a_compiler_no_torch_is_asked_for(tree):
    run = _backend(
        tree, "get_requires_for_build_wheel", CXX="/no/such/compiler", SALKERNELS_TORCH_DIR="/none"
    )
    assert "RESULT []" in run.stdout, run.stderr


@needs_compiler
def test_torch_is_a_build_requirement_only_where_no_headers_are_found(tree):
    found = _backend(tree, "get_requires_for_build_wheel")
    assert "RESULT []" in found.stdout, found.stderr
    missing = _backend(tree, "get_requires_for_build_wheel", SALKERNELS_TORCH_DIR="/none")
    assert "RESULT ['torch>=2.10']" in missing.stdout, missing.stderr


def test_a_torch_that_is_too_old_is_not_used(tree, tmp_path):
    headers = tmp_path / "torch" / "include/torch/csrc/stable"
    headers.mkdir(parents=True)
    (headers / "library.h").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    _, files, info = _wheel(tree, SALKERNELS_TORCH_DIR=str(tmp_path / "torch"))
    assert not _has_library(files)
    assert info["reason"].startswith("no headers of torch 2.10 or later" if HAS_COMPILER else "no")


def _failing_compiler(tmp_path: Path) -> str:
    script = tmp_path / "broken-c++"
    script.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def test_a_build_that_fails_still_installs_and_keeps_the_message(tree, tmp_path):
    _, files, info = _wheel(tree, CXX=_failing_compiler(tmp_path))
    assert not _has_library(files)
    assert info["reason"].endswith("x.cpp:1: fatal error: out of luck")


@pytest.mark.parametrize("cxx", ["/no/such/compiler", "broken"])
def test_a_build_on_demand_fails_with_the_reason(tree, tmp_path, cxx):
    cxx = _failing_compiler(tmp_path) if cxx == "broken" else cxx
    run = _backend(tree, "build_wheel", CXX=cxx, SALKERNELS_BUILD_CPU="1")
    assert run.returncode != 0
    assert "SALKERNELS_BUILD_CPU=1, but " in run.stderr + run.stdout


@pytest.mark.parametrize("variable", ["SALKERNELS_BUILD_CPU", "SALKERNELS_BUILD_CUDA"])
def test_a_switch_that_is_none_of_the_three_is_an_error(tree, variable):
    run = _backend(tree, "build_wheel", **{variable: "yes"})
    assert run.returncode != 0
    assert f"{variable} must be auto, 1 or 0, got 'yes'" in run.stderr + run.stdout


def test_without_nvcc_there_is_no_cuda_library_and_the_reason_is_kept(tree, tmp_path):
    missing = {"CUDA_HOME": str(tmp_path), "SALKERNELS_BUILD_CPU": "0"}
    name, files, info = _wheel(tree, "cuda", SALKERNELS_BUILD_CUDA="auto", **missing)
    assert name.endswith("py3-none-any.whl")
    assert not [f for f in files if f.endswith(".so")]
    assert info["reason"].startswith(f"no nvcc was found in CUDA_HOME={tmp_path}")
    run = _backend(tree, "build_wheel", SALKERNELS_BUILD_CUDA="1", **missing)
    assert run.returncode != 0
    assert "SALKERNELS_BUILD_CUDA=1, but no nvcc was found" in run.stdout + run.stderr


def test_the_cuda_library_is_left_out_on_request(tree):
    _, _, info = _wheel(tree, "cuda", SALKERNELS_BUILD_CPU="0", SALKERNELS_BUILD_CUDA="0")
    assert info["reason"] == "it was left out of this installation (SALKERNELS_BUILD_CUDA=0)"


def _architectures(**environment: str) -> list[str] | str:
    """Those that a build would compile for, or the message where that is none."""
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS.parent)!r})\n"
        "import salkernels_nvcc as n\n"
        "try: print(*(f'{a}+PTX' if a.ptx else a for a in n.architectures()))\n"
        "except ValueError as error: print('error:', error)"
    )
    return _status(code, **environment).strip()


@needs_nvcc
@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("8.0", "8.0"),
        ("8.0;9.0+PTX", "8.0 9.0+PTX"),
        ("8.6, 8.0 8.6+PTX", "8.6+PTX 8.0"),
        ("7.5;8.9", "8.9"),  # the kernels need 8.0
        ("9.0a", "9.0"),
        ("8.0;9.0;", "8.0 9.0"),
    ],
)
def test_architectures_are_those_that_are_named(named, expected):
    assert _architectures(TORCH_CUDA_ARCH_LIST=named) == expected


@needs_nvcc
def test_an_architecture_that_cannot_be_is_an_answer():
    assert "of which nvcc" in _architectures(TORCH_CUDA_ARCH_LIST="7.5")
    assert "must be such as" in _architectures(TORCH_CUDA_ARCH_LIST="Hopper")


@pytest.mark.parametrize(
    ("named", "known", "expected"),
    [
        ("", "70 75 80 86 87", "8.0 8.6+PTX"),  # the default list: PTX serves what comes later
        ("", "80 86 89 90 100 103", "8.0 8.6 9.0 10.0+PTX"),
        ("8.9", "75 80 86", "8.6"),  # its code runs on a later minor version
        ("8.0;8.9;9.0", "80 86", "8.0 8.6"),
        ("9.0", "75 80 86", "error: TORCH_CUDA_ARCH_LIST names 9.0, of which nvcc 11.1"),
    ],
)
def test_in_place_of_what_nvcc_is_too_old_for_stands_what_runs_there(
    named, known, expected, tmp_path
):
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    lines = "".join(f"echo compute_{a}\n" for a in known.split())
    script.write_text(f"#!/bin/sh\necho 'release 11.1,'\n{lines}")
    script.chmod(0o755)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = _architectures(TORCH_CUDA_ARCH_LIST=named, CUDA_HOME=str(tmp_path), PATH=path)
    assert found[: len(expected)] == expected
    assert found.startswith("error") or found == expected


@pytest.mark.parametrize(
    ("command", "program"),
    [("g++", "g++"), ("env g++", "g++"), ("env g++ -m64", "g++"), ("g++ -arch nonsense", "g++")],
)
@needs_compiler
def test_nvcc_is_given_the_compiler_and_not_what_launches_it(command, program, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS.parent)
    build = importlib.import_module("salkernels_build")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", command)
    assert build.program_of(build.compiler()) == program


@pytest.mark.parametrize("free_threaded", [0, 1])
@needs_compiler
def test_a_free_threaded_python_gets_a_library_of_its_own(free_threaded, monkeypatch):
    """setuptools refuses the limited API there."""
    monkeypatch.syspath_prepend(TOOLS.parent)
    build = importlib.import_module("salkernels_build")
    ask = build.sysconfig.get_config_var
    monkeypatch.setattr(
        build.sysconfig,
        "get_config_var",
        lambda name: free_threaded if name == "Py_GIL_DISABLED" else ask(name),
    )
    monkeypatch.setenv("SALKERNELS_BUILD_CUDA", "0")
    arguments = build.setup_arguments()
    assert [e.py_limited_api for e in arguments["ext_modules"]] == [not free_threaded]
    assert ("options" in arguments) == (not free_threaded)


def test_a_library_is_called_missing_only_after_all_were_tried(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(TOOLS.parent)
    build, setuptools = map(importlib.import_module, ("salkernels_build", "setuptools"))
    for name in ("obstacle", "_only_metadata"):
        monkeypatch.setattr(build, name, lambda *_: None)
    monkeypatch.setattr(build, "torch_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "torch_version", lambda: "2.14")
    monkeypatch.setattr(build.nvcc, "architectures", lambda: [build.nvcc.Architecture(8, 0)])
    monkeypatch.setattr(build.nvcc, "version", lambda: "13.0")
    command = build.BuildExt(setuptools.Distribution(build.setup_arguments()))
    monkeypatch.setattr(command, "_compile", lambda ext, library: None)
    command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    command.ensure_finalized()
    command.run()
    assert "will be missing" not in capsys.readouterr().err
    info = json.loads((tmp_path / "lib" / "salkernels" / "_build_info.json").read_text())
    assert info["cpu"]["built"]
    assert info["cuda"]["built"]


@needs_nvcc
def test_the_visible_gpu_is_built_for_where_nothing_is_named(tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '8.9\\n9.0\\n8.9\\n'\n")
    script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert _architectures(TORCH_CUDA_ARCH_LIST="", PATH=path) == "8.9 9.0"
    script.write_text("#!/bin/sh\nexit 9\n")
    assert _architectures(TORCH_CUDA_ARCH_LIST="", PATH=path) == "8.0 8.6 9.0 10.0 12.0+PTX"


@needs_nvcc
@pytest.mark.slow
def test_a_wheel_with_the_cuda_library_loads_without_a_gpu(tree, tmp_path):
    """Built against a torch without CUDA, as far as the linker can tell: only headers are taken."""
    name, files, info = _wheel(
        tree,
        "cuda",
        SALKERNELS_BUILD_CPU="0",
        SALKERNELS_BUILD_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.0+PTX",
        NVCC_APPEND_FLAGS="-Xcicc=-O1 -Xptxas=-O0",  # 23 s of compilation instead of 84
    )
    assert "-cp310-abi3-" in name
    assert [f for f in files if f.endswith(".so")] == ["salkernels/_C_cuda.abi3.so"]
    assert info["built"]
    assert (info["architectures"], info["ptx"]) == (["8.0"], ["8.0"])
    for source in ("forward", "backward"):  # what the test of registers and spills reads
        (log,) = (tree / "build" / "ptxas").glob(f"{source}-*.txt")
        assert re.search(r"'salkernels_\w+' for 'sm_80'", log.read_text())
    (wheel,) = (tree / "dist").glob("*.whl")
    code = (
        "import torch, salkernels.__main__ as m; from salkernels.backends import cuda\n"
        "assert 'compute capability 8.0, PTX 8.0 (nvcc' in m.report(), m.report()\n"
        "expected = 'is a build without CUDA' if torch.version.cuda is None else None\n"
        "assert (cuda._MISSING is None) == (expected is None), cuda._MISSING\n"
        "if torch.version.cuda is not None:\n"
        "    kernels = torch._C._dispatch_dump('salkernels::native_match')\n"
        "    assert 'CUDA' in kernels, kernels\n"
        "print(m.__file__)"
    )
    _use(wheel, code, tmp_path / "installed")


@needs_compiler
@pytest.mark.slow
def test_the_library_is_built_for_every_python_and_replaces_a_stale_one(tree):
    stale = tree / "build" / "lib" / "salkernels"
    stale.mkdir(parents=True)
    (stale / "_C_cpu.old.so").touch()
    name, files, info = _wheel(tree, SALKERNELS_BUILD_CPU="1", CXXFLAGS="-O0")
    assert "-cp310-abi3-" in name
    assert [f for f in files if f.endswith(".so")] == ["salkernels/_C_cpu.abi3.so"]
    assert info["built"]
    assert info["reason"] is None


@needs_compiler
@pytest.mark.slow
def test_an_sdist_builds_and_its_wheel_runs(tree, tmp_path):
    assert _backend(tree, "build_sdist").returncode == 0
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not list(source.rglob("*.so"))
    for name in ("data", "methods", "models"):  # empty directories are not packed
        (source / "training" / name).mkdir(exist_ok=True)
    _, files, info = _wheel(source, SALKERNELS_BUILD_CPU="1", CXXFLAGS="-O0")
    assert _has_library(files)
    (wheel,) = (source / "dist").glob("*.whl")
    code = (
        "import salkernels, torch; from salkernels.backends import cpu\n"
        "assert cpu.status() is None, cpu.status()\n"
        "x = torch.randn(2, 2, 8, 4, 4)\n"
        "ours, theirs = (salkernels.wla_loss(*x, 2, backend=b) for b in ('cpu', 'reference'))\n"
        "torch.testing.assert_close(ours, theirs)\n"
        "print(salkernels.__file__)"
    )
    _use(wheel, code, tmp_path / "installed")


def _status(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_report_says_why_the_library_is_missing(tree):
    """In a tree that was never built, after a build without a compiler, and with a broken file."""
    code = f"import sys; sys.path.insert(0, {str(tree)!r}); import salkernels.__main__ as m; "
    code += "print(m.report())"
    assert "cpu        no: its compiled library is missing" in _status(code)
    run = _backend(tree, "build_editable", CXX="/no/such/compiler")
    assert run.returncode == 0, run.stderr
    assert "CXX=/no/such/compiler was not found" in _status(code)
    (tree / "salkernels" / "_C_cpu.abi3.so").write_bytes(b"not a library")
    report = _status(code)
    assert "cpu        no: _C_cpu.abi3.so cannot be loaded: " in report
    assert "file too short" in report or "invalid ELF header" in report
