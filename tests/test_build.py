"""The build: switches, machines without a compiler, editable installs, the sdist."""

from __future__ import annotations

import importlib.util
import json
import os
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


def _backend(tree: Path, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the build backend as pip does, in this environment; the result on stdout."""
    call = "'dist'" if hook.startswith("build") else ""
    code = (
        "import sys; sys.path.insert(0, 'buildtools'); import salkernels_build as b\n"
        f"print('RESULT', b.{hook}({call}))"
    )
    (tree / "dist").mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SALKERNELS_") and k != "CXX"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _wheel(tree: Path, **environment: str) -> tuple[str, list[str], dict]:
    """Name, files and recorded result of the wheel that a build gives."""
    run = _backend(tree, "build_wheel", **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("salkernels/_build_info.json"))["cpu"]
        return wheel.name, archive.namelist(), info


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


def test_the_cuda_library_is_reserved(tree):
    run = _backend(tree, "build_wheel", SALKERNELS_BUILD_CUDA="1")
    assert run.returncode != 0
    assert "has no CUDA library" in run.stderr + run.stdout


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
    _, files, info = _wheel(source, SALKERNELS_BUILD_CPU="1")
    assert _has_library(files)
    (wheel,) = (source / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    code = (
        "import salkernels, torch; from salkernels.backends import cpu\n"
        "assert cpu.status() is None, cpu.status()\n"
        "x = torch.randn(2, 2, 8, 4, 4)\n"
        "ours, theirs = (salkernels.wla_loss(*x, 2, backend=b) for b in ('cpu', 'reference'))\n"
        "torch.testing.assert_close(ours, theirs)\n"
        "print(salkernels.__file__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


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
