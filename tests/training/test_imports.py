"""No package imports itself in a circle, not even by imports within functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "salkernels": "salkernels",
    "training": "salkernels.training",
    "benchmarks": "benchmarks",
}


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file, of all modules of a package."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((package, *parts)).removesuffix(".__init__")
        found[name] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among those known that a module imports, wherever in its text.

    Not those for types alone, which nothing runs.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(above) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            # `from .package import name` runs the package, unless all names are its modules.
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {inner if inner in known else base for inner in names}
    return {module for module in found if module in known and module != name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other (strongly connected components; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(folder):
    known = modules(ROOT / folder, PACKAGES[folder])
    assert len(known) > 10
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert circles(graph) == []


def test_circles_are_found(tmp_path):
    files = {
        "__init__": "from .a import f",
        "a": "def f():\n    from .b import g",
        "b": "from . import c",
        "c": "import pack.a",
        "d": "from .a import f",
        "e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import f",
        "f": "from .e import x",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    known = modules(tmp_path, "pack")
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert circles(graph) == [{"pack.a", "pack.b", "pack.c"}]
