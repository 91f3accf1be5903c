"""What an installation that came out less than whole says, where one looks: at import, at the first
large call, in `python -m salkernels`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import salkernels
from salkernels.backends import BACKENDS, slow

SOURCES = Path(salkernels.__file__).parent


@pytest.fixture
def places(tmp_path) -> tuple[Path, Path]:
    """A clone's folder that was never built, and an installation that was: its site-packages."""
    ignore = shutil.ignore_patterns("_C_*", "_build_info.json", "__pycache__", "training")
    clone, site = tmp_path / "clone", tmp_path / "site"
    shutil.copytree(SOURCES, clone / "salkernels", ignore=ignore)
    shutil.copytree(SOURCES, site / "salkernels", ignore=ignore)
    (site / "salkernels" / "training").mkdir()
    (site / "salkernels" / "training" / "__init__.py").touch()
    (site / "salkernels" / "_build_info.json").write_text(json.dumps({"cpu": {"built": True}}))
    return clone, site


def _shadow(clone: Path, monkeypatch, *path: Path) -> ModuleType:
    """The module that looks, as the clone has it, with these folders on the module path."""
    spec = importlib.util.spec_from_file_location("shadow", clone / "salkernels" / "_shadow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    editable = "__editable__"  # what this environment has of its own is not looked at
    kept = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith(editable)]
    monkeypatch.setattr(sys, "meta_path", kept)
    monkeypatch.setattr(sys, "path", [str(clone), *map(str, path)])
    return module


def test_sources_that_hide_an_installation_name_it_at_import_and_in_the_report(places):
    clone, site = places
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if "
        "not getattr(f, '__module__', '').startswith('__editable__')]\n"
        f"sys.path[:0] = ['', {str(site)!r}]\n"
        "import salkernels.__main__ as m; print(m.report())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert f"hides the salkernels that is installed in {site / 'salkernels'}" in text
        assert f"run `pip install -e .` in {clone}" in text
        assert "has no compiled kernels and no salkernels.training" in text
    assert f"this copy of salkernels was not built; run `pip install -e .` in {clone}" in (
        done.stdout
    ), "the backend says what to do"


def test_an_installation_hides_nothing(places, monkeypatch):
    clone, site = places
    shadow = _shadow(site, monkeypatch, clone)
    assert shadow.hidden() is None


def test_a_clone_that_was_built_hides_nothing_unless_it_lacks_the_training(places, monkeypatch):
    clone, site = places
    shadow = _shadow(clone, monkeypatch, site)
    (clone / "salkernels" / "_build_info.json").write_text("{}")
    assert shadow.hidden() == site / "salkernels"
    (clone / "salkernels" / "training").mkdir()
    assert shadow.hidden() is None


def test_sources_without_an_installation_anywhere_hide_nothing(places, tmp_path, monkeypatch):
    clone, _ = places
    assert _shadow(clone, monkeypatch, tmp_path / "empty").hidden() is None


def test_sources_that_hide_an_editable_installation_name_it(places, monkeypatch):
    clone, site = places
    shadow = _shadow(clone, monkeypatch)
    assert shadow.hidden() is None

    class Finder:
        """As setuptools writes it."""

        __module__ = "__editable___salkernels_finder"

        @staticmethod
        def find_spec(name, path=None, target=None):
            file = site.joinpath(*name.split("."), "__init__.py")
            return importlib.util.spec_from_file_location(name, file)

    sys.meta_path.append(Finder)
    assert shadow.hidden() == site / "salkernels"


class Missing:
    def status(self):
        return "it was not built"


class Works:
    def status(self):
        return None


@pytest.fixture
def forgetful(monkeypatch):
    monkeypatch.setattr(slow, "_said", set())


def test_a_large_call_on_the_reference_says_why_once(forgetful):
    large = torch.empty(slow.LARGE)
    with pytest.warns(RuntimeWarning, match=r"many times slower.*\(cpu: it was not built\)"):
        slow.tell(large, {"cpu": Missing()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slow.tell(large, {"cpu": Missing()})


def test_small_calls_other_devices_and_backends_that_work_are_no_reason(forgetful):
    meta = torch.empty(slow.LARGE, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slow.tell(torch.empty(slow.LARGE - 1), {"cpu": Missing()})
        slow.tell(meta, {"cpu": Missing()})
        slow.tell(torch.empty(slow.LARGE), {"cpu": Works()})


def test_the_loss_itself_says_it_and_a_named_backend_does_not(forgetful, monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "_MISSING", "no C++ compiler was found")
    features = torch.randn(2, 2**13, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        salkernels.wla_loss(features, features, 2, backend="reference")
    with pytest.warns(RuntimeWarning, match="cpu: no C\\+\\+ compiler was found"):
        salkernels.wla_loss(features, features, 2)


def test_a_traced_call_says_nothing_and_breaks_nothing(forgetful, monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "_MISSING", "no C++ compiler was found")
    features = torch.randn(2, 2**13, 8, 8)
    call = torch.compile(salkernels.wla_loss, fullgraph=True, backend="eager")
    call(features, features, 2)


@pytest.mark.skipif(os.name != "posix", reason="the C++ kernels are built on Linux and macOS only")
def test_a_compiler_that_came_later_is_pointed_at(monkeypatch, tmp_path):
    from salkernels import _native

    info = {"cpu": {"built": False, "reason": "no C++ compiler was found when it was built"}}
    monkeypatch.setattr(_native, "HERE", tmp_path)
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _native.rebuild_hint() is None
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    assert "pip install --no-cache-dir --force-reinstall" in str(_native.rebuild_hint())
    info["cpu"]["reason"] = "it was left out of this installation (SALKERNELS_BUILD_CPU=0)"
    assert _native.rebuild_hint() is None
    (tmp_path / "_C_cpu.abi3.so").touch()
    assert _native.rebuild_hint() is None
