"""Installing as a stranger does it: `make demo` and its parts, and what pip keeps of a build."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "install_demo.sh"
pytestmark = pytest.mark.skipif(
    os.name != "posix" or not SCRIPT.is_file(), reason="needs a source tree and a POSIX shell"
)
PYTHON = """#!/bin/sh
case "$1" in
-c) test -e "$LOG.torch" && echo "$TORCH_THERE" ;;
-m)
    echo "cuda=${SALKERNELS_BUILD_CUDA-auto} config=${PIP_CONFIG_FILE-} $*" >>"$LOG"
    case "$*" in
    *pip\\ list*) echo "torch   $TORCH_THERE" ;;
    *--index-url*) [ -z "$NO_CPU_BUILD" ] && touch "$LOG.torch" ;;
    *torch*) touch "$LOG.torch" ;;
    esac ;;
esac
"""


@pytest.fixture
def venv(tmp_path) -> Path:
    """A virtual environment whose Python only writes down what it is asked."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    _program(folder / "bin" / "python", PYTHON)
    _program(folder / "bin" / "salkernels-train", '#!/bin/sh\necho "train $*" >>"$LOG"\n')
    return folder


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _asked(venv: Path, *command: str, gpu: bool = False, **more: str) -> tuple[list[str], str]:
    """What the environment's programs were asked by a command, and what was printed."""
    tools = venv.parent / "tools"
    _program(tools / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    log = venv.parent / "log"
    log.unlink(missing_ok=True)
    unset = ("SALKERNELS_", "TORCH_CPU_INDEX", "PIP_", "MAKE", "MFLAGS")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    given = {"LOG": str(log), "TORCH_THERE": "2.13.0+cpu", "NO_CPU_BUILD": "", "PATH": path}
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, **given, **more}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines(), done.stdout


def test_without_a_gpu_the_demo_takes_the_cpu_build_and_no_cuda_kernels(venv):
    asked, said = _asked(venv, str(SCRIPT), str(venv), "torch>=2.10")
    assert all(line.startswith("cuda=0 ") for line in asked)
    first, second, third = (line.partition("-m pip install ")[2] for line in asked)
    assert first.startswith("--no-deps")
    assert "/whl/cpu torch>=2.10" in first
    assert "config=/dev/null" in asked[0]
    assert second == "torch>=2.10", "what torch needs comes from the usual index"
    assert third == "-e .[training]"
    assert "0.3 GB to download and 1.3 GB on disk, 1 to 5 minutes" in said
    assert "Installed in" in said


def test_with_a_gpu_the_demo_takes_what_it_can_use(venv):
    asked, said = _asked(venv, str(SCRIPT), str(venv), "torch>=2.10", gpu=True)
    assert [line.partition(" config= ")[0] for line in asked] == ["cuda=auto"] * 2
    assert "3 GB to download and 6 GB on disk" in said


def test_where_there_is_no_cpu_build_that_is_said_and_torch_comes_as_usual(venv):
    asked, said = _asked(venv, str(SCRIPT), str(venv), "torch>=2.10", NO_CPU_BUILD="1")
    assert asked[1].endswith("-m pip install torch>=2.10")
    assert "No CPU build there: torch from the usual index" in said


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_demo_installs_once_and_less_than_make_test(venv):
    make = ("make", f"VENV={venv}")
    asked, _ = _asked(venv, *make, "demo")
    assert asked[-1] == "train demo"
    assert not any("[dev]" in line for line in asked)
    assert not (venv / ".installed").exists(), "the tests need more"
    asked, _ = _asked(venv, *make, "demo")
    assert asked == ["train demo"]
    # The tests' torchvision has CUDA's libraries, and needs the torch that has them too.
    asked, _ = _asked(venv, *make, "install")
    assert [line.partition("-m pip ")[2] for line in asked] == [
        "list", "uninstall --quiet --yes torch", "install --quiet torch>=2.10",
        "install --quiet -e .[dev]",
    ]  # fmt: skip
    (venv / ".demo").unlink()
    asked, _ = _asked(venv, *make, "demo")
    assert asked == ["train demo"], "all that the demo needs is there"


@needs_make
def test_a_cpu_build_that_the_user_chose_stays(venv):
    asked, _ = _asked(venv, "make", f"VENV={venv}", "install")
    assert not any("uninstall" in line for line in asked)


needs_setuptools = pytest.mark.skipif(
    # Not find_spec, which runs a hook of setuptools that takes its distutils out of this process.
    not {"setuptools", "pip"} <= {d.metadata["Name"] for d in importlib.metadata.distributions()},
    reason="needs setuptools and pip",
)


@pytest.fixture
def index(tmp_path) -> str:
    """An index with an sdist of this tree."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "results")
    for name in ("salkernels", "training", "csrc", "buildtools"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = "import sys; sys.path.insert(0, 'buildtools'); import salkernels_build as b; "
    code += f"b.build_sdist({str(tmp_path / 'index' / 'salkernels')!r})"
    (tmp_path / "index" / "salkernels").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = (tmp_path / "index" / "salkernels").iterdir()
    page = f'<a href="{sdist.name}">{sdist.name}</a>'
    (sdist.parent / "index.html").write_text(page)
    return (tmp_path / "index").as_uri()


@needs_setuptools
@pytest.mark.slow
def test_what_the_reason_advises_gets_past_the_wheel_that_pip_kept(index, tmp_path):
    """pip keeps a wheel by the address of its source, and then asks nobody again."""
    compiler = tmp_path / "c++"  # that compiles nothing: the file is what is looked for
    _program(compiler, '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')

    def library(cxx: str, *options: str, **variables: str) -> bool:
        target = tmp_path / "target"
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target,
             "--no-build-isolation", "--index-url", index, *options, "salkernels"],
            env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_CACHE_DIR": str(cache),
                 "PIP_FIND_LINKS": "", "SALKERNELS_BUILD_CUDA": "0", "CXX": cxx, **variables},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return any((target / "salkernels").glob("_C_cpu.*"))

    cache = tmp_path / "cache"
    assert not library("/no/such/compiler")
    assert [path.name.rpartition("-")[2] for path in cache.rglob("*.whl")] == ["any.whl"]
    assert not library(str(compiler), SALKERNELS_BUILD_CPU="1"), "pip asks after all: say so less"
    sys.path.insert(0, str(ROOT / "buildtools"))
    try:
        import salkernels_build
    finally:
        sys.path.remove(str(ROOT / "buildtools"))
    advised = salkernels_build.REINSTALL.split("`")[1].split()
    assert advised[:2] == ["pip", "install"]
    assert library(str(compiler), *advised[2:])
