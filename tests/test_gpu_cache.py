"""Triton's cache of a pack: it holds where it is unpacked, and says where it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu import triton_cache

ROOT = Path(__file__).resolve().parent.parent


def a_cache(folder):
    """Two kernels as Triton keeps them."""
    for key in ("AAA", "BBB"):
        (folder / key).mkdir(parents=True)
        names = ("kernel.cubin", "kernel.json")
        for name in names:
            (folder / key / name).write_text(key)
        paths = {name: str(folder / key / name) for name in names}
        text = json.dumps({"child_paths": paths})
        (folder / key / "__grp__kernel.json").write_text(text)
    return folder


def listed(folder):
    return [
        path
        for group in folder.glob("*/__grp__*.json")
        for path in json.loads(group.read_text())["child_paths"].values()
    ]


def test_a_cache_that_was_moved_names_its_new_place(tmp_path, capsys):
    a_cache(tmp_path / "old").rename(tmp_path / "new")
    assert not any(Path(path).exists() for path in listed(tmp_path / "new"))
    assert triton_cache.main(["settle", str(tmp_path / "new")]) == 0
    found = listed(tmp_path / "new")
    assert len(found) == 4
    assert all(Path(path).parent.parent == tmp_path / "new" for path in found)
    assert all(Path(path).exists() for path in found)
    assert "2 Triton kernels" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")}
    assert triton_cache.settle(tmp_path / "new") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "new").rglob("*")}


def test_triton_finds_a_moved_kernel_only_once_it_is_settled(tmp_path):
    """A kernel of one line, compiled without a GPU."""
    pytest.importorskip("triton")
    program = tmp_path / "program.py"
    program.write_text(
        "import triton\nimport triton.language as tl\n"
        "from triton import knobs\nfrom triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "@triton.jit\ndef kernel(x):\n    tl.store(x, 1.0)\n"
        "hits = []\n"
        "knobs.compilation.listener = lambda **told: hits.append(told['cache_hit'])\n"
        "source = ASTSource(kernel, signature={'x': '*fp32'}, constexprs={})\n"
        "triton.compile(source, target=GPUTarget('cuda', 90, 32))\nprint(set(hits))\n"
    )

    def hits(folder):
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables["TRITON_CACHE_DIR"] = str(folder)
        words = [sys.executable, str(program)]
        done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    assert hits(tmp_path / "old") == "{False}"
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "other")
    triton_cache.settle(tmp_path / "other")
    assert hits(tmp_path / "other") == "{True}"
    assert hits(tmp_path / "new") == "{False}"


def test_a_pack_of_another_triton_is_told(tmp_path):
    pytest.importorskip("triton")
    here = triton_cache.facts()
    assert "triton_error" not in here, here
    packed = tmp_path / "triton.json"
    assert triton_cache.compared(here, packed) is None
    packed.write_text(json.dumps(here | {"folder": "/elsewhere", "entries": 7}))
    assert "hold here" in triton_cache.compared(here, packed)
    packed.write_text(json.dumps(here | {"triton_key": "0123", "ptxas_version": "V1"}))
    line = triton_cache.compared(here, packed)
    assert "do not hold here: triton_key: 0123 packed" in line
    assert "ptxas_version: V1 packed" in line


def test_facts_name_the_folder_and_the_variables(tmp_path, monkeypatch):
    a_cache(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = triton_cache.facts()
    assert found["folder"] == str(tmp_path)
    assert found["entries"] == 2
    assert found["variables"]["TRITON_CACHE_DIR"] == str(tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert triton_cache.folder_in_use() == tmp_path / ".triton" / "cache"
