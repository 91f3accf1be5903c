"""The rules of docs/contributing.md that ruff has no check for: length of files and functions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "buildtools", "csrc", "docs", "salkernels", "tests", "tools", "training")
KINDS = {".py", ".cpp", ".h", ".cu", ".cuh"}
FILE, FUNCTION = 500, 60
# "Eq. 2 there" makes the reader look for what "there" is.
FILE_NAME = Path(__file__).name
NAMELESS = re.compile(r"\b(?:Eqs?|Sec|Table|Fig)\. *\d[\d. andto]* there\b")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs a source tree")


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return [path for path in found if path.suffix in KINDS and "build" not in path.parts]


def lengths(text: str) -> dict[str, int]:
    """Function -> lines from its `def` to its end, without its docstring."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            found[f"{node.name}, line {node.lineno}"] = lines
    return found


def test_files_are_short():
    long = {
        path.relative_to(ROOT).as_posix(): count
        for path in sources()
        if (count := path.read_text(encoding="utf-8").count("\n")) >= FILE
    }
    assert not long, f"expected files of fewer than {FILE} lines, got {long}; split them by idea"


def test_functions_are_short():
    long = {
        f"{path.relative_to(ROOT).as_posix()}: {name}": count
        for path in sources()
        if path.suffix == ".py"
        for name, count in lengths(path.read_text(encoding="utf-8")).items()
        if count >= FUNCTION
    }
    assert not long, f"expected functions of fewer than {FUNCTION} lines, got {long}"


def test_equations_are_named_with_their_paper():
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.is_file()]
    found = {
        path.relative_to(ROOT).as_posix(): words
        for path in [*sources(), *pages]
        if (words := NAMELESS.findall(path.read_text(encoding="utf-8"))) and path.name != FILE_NAME
    }
    assert not found, "expected such as 'Eq. 2 of Peng et al.'"
    assert NAMELESS.search("the loss (Eq. 1 there) over 2n views")
    assert NAMELESS.search("that of Eqs. 3 to 5 there:")
    assert NAMELESS.search("(Eq. 2 and 3 there)")
    assert not NAMELESS.search("Eq. 1 of Chen et al., and there is more")


def test_lengths_leave_out_docstrings_alone():
    text = '''
def documented(x):
    """One sentence.

    And another.
    """
    return x


class Class:
    async def method(self):
        text = """not
        a docstring"""
        return text
'''
    assert lengths(text) == {"documented, line 2": 2, "method, line 11": 4}
