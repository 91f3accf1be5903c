"""What strangers wrote runs nothing: settings that name classes, repositories with programs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from salkernels._shared.revision import commit
from salkernels.training.cli import main

EVIL = {
    "nested": "optim:\n  class_path: trap.Thing\n",
    "init": "optim:\n  class_path: trap.Thing\n  init_args: {lr: 1}\n",
    "top": "class_path: trap.Thing\n",
    "deep": "model:\n  width:\n    class_path: trap.Thing\n",
    "string": "optim: trap.Thing\n",
}


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_settings_import_no_module(kind, command, tmp_path, monkeypatch, capsys):
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = tmp_path / "settings.yaml"
    settings.write_text(EVIL[kind])
    words = [command, "--config", str(settings), "--data", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= 6
    assert not (tmp_path / "trace").exists()
    with pytest.raises(SystemExit):
        main([command, "--optim", "trap.Thing"])
    with pytest.raises(SystemExit):
        main([command, "--optim", '{"class_path": "trap.Thing"}'])
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def repository(tmp_path):
    """A repository whose configuration runs a program whenever git looks at its files."""
    root = tmp_path / "repository"
    root.mkdir()
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    hook.chmod(0o755)
    (root / "file").write_text("x")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "config", "core.fsmonitor", str(hook)], check=True)
    return root


def test_the_commit_is_that_of_the_package_or_none(repository, tmp_path):
    """A virtual environment within a repository says nothing about what is installed in it."""
    installed = repository / ".venv" / "lib" / "site-packages" / "salkernels"
    vendored = repository / "salkernels"
    for package in (installed, vendored):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        assert commit(package) is None
    assert not (tmp_path / "ran").exists()
    (repository / "pyproject.toml").write_text('[project]\nname = "salkernels"\n')
    found = commit(vendored)
    assert found is not None
    assert commit(installed) is None
    assert not (tmp_path / "ran").exists()
    environment = {"GIT_DIR": str(tmp_path / "nowhere"), **os.environ}
    said = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "from salkernels._shared.revision import commit; print(commit(Path(sys.argv[1])))",
         str(vendored)], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.strip() == found


def test_a_commit_is_marked_where_code_differs_from_it(repository):
    """Results, which are written while the code runs, are no such difference."""
    results = repository / "benchmarks" / "results"
    package = repository / "salkernels"
    for folder in (results, package):
        folder.mkdir(parents=True)
    (repository / "pyproject.toml").write_text('[project]\nname = "salkernels"\n')
    (package / "__init__.py").write_text("")
    (results / "cpu.csv").write_text("old")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    git += ["-c", "core.fsmonitor=false"]
    for words in (["add", "."], ["commit", "-q", "-m", "two"], ["rev-parse", "--short=10", "HEAD"]):
        done = subprocess.run([*git, *words], check=True, capture_output=True, text=True)
    clean = done.stdout.strip()
    assert commit(package) == clean
    (results / "cpu.csv").write_text("new")
    assert commit(package) == clean
    (package / "__init__.py").write_text("changed = True")
    assert commit(package) == f"{clean}+"
