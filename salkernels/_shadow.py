"""Whether this copy of the package hides a better one: a clone whose folder is found first.

Python puts the current folder first on its path, so that in a clone `import salkernels` finds the
sources there. After `pip install .` (not `pip install -e .`) the compiled libraries and
`salkernels.training` are in the environment's copy only, which the sources hide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = "_build_info.json"  # every installation writes it, with or without a compiler


def hidden() -> Path | None:
    """The installed copy that this one hides, or None where this one is whole."""
    if (HERE / BUILT).is_file() and _has_training():
        return None
    for package in _packages():
        if (package / BUILT).is_file() and package.resolve() != HERE:
            return package.resolve()
    return None


def explanation(installed: Path) -> str:
    """What is wrong, and what to do about it."""
    lacks = [
        *(["compiled kernels"] if not any(HERE.glob("_C_*.*")) else []),
        *(["salkernels.training"] if not _has_training() else []),
    ]
    what = f" has no {' and no '.join(lacks)}, and" if lacks else ""
    return (
        f"the source folder {HERE}{what} hides the salkernels that is installed in {installed}: "
        f"run `pip install -e .` in {HERE.parent}, or start Python in another folder"
    )


def _packages() -> Iterator[Path]:
    """Where salkernels may lie: on the path, and where editable installations point to."""
    for entry in dict.fromkeys(sys.path):
        yield Path(entry or ".") / "salkernels"
    for spec in _editable("salkernels"):
        if spec.origin:
            yield Path(spec.origin).parent


def _has_training() -> bool:
    """Whether `import salkernels.training` finds something; nothing is imported."""
    return (HERE / "training").is_dir() or any(_editable("salkernels.training"))


def _editable(name: str) -> Iterator[ModuleSpec]:
    """What the finders of editable installations, which setuptools writes, say of a module."""
    for finder in sys.meta_path:
        if getattr(finder, "__module__", "").startswith("__editable__"):
            spec = finder.find_spec(name, None)
            if spec is not None:
                yield spec
