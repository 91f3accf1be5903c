"""Which revision of the package runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Results are written while the code that they belong to runs: they are no change of it.
_RESULTS = ("benchmarks/results", "training/results")


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the clone that this package is part of, "+" if its code was changed.

    None for an installed wheel: a repository that happens to lie around a virtual environment says
    nothing about the package, and git would run the programs that it is configured with.
    """
    root = package.parent
    if not (root / ".git").exists() or not _is_ours(root):
        return None
    code = [":/", *(f":(exclude,top){folder}" for folder in _RESULTS)]
    try:
        head = _git(root, "rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "-uno", "--", *code) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _is_ours(root: Path) -> bool:
    try:
        lines = (root / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return 'name = "salkernels"' in lines and (root / "salkernels" / "__init__.py").is_file()


def _git(root: Path, *arguments: str) -> str:
    # Variables such as GIT_DIR, which are set within a hook, name another repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "--no-optional-locks"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=True, timeout=10, env=clean
    )
    return done.stdout.strip()
