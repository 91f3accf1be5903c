"""The documentation against the code: names, variables, pictures, figures of the benchmarks."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import pytest

import salkernels

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = (
    "salkernels",
    "training",
    "benchmarks",
    "buildtools",
    "csrc",
    "scripts",
    "tools",
    "tests",
)
# An environment variable as a string: macros of the C++ code stand without quotes.
VARIABLE = re.compile(r"""(?<=["'`])SALKERNELS_[A-Z_]*[A-Z](?==?["'`\s])""")
# The build composes these, from the name of a library: SALKERNELS_BUILD_{library}.
COMPOSED = {"SALKERNELS_BUILD_CPU", "SALKERNELS_BUILD_CUDA"}


def test_every_environment_variable_is_documented():
    read = {
        name
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
        for name in VARIABLE.findall(path.read_text())
    }
    assert {"SALKERNELS_CPU_ISA", "SALKERNELS_TORCH_DIR", "SALKERNELS_TRITON_TILES"} <= read
    documented = set(re.findall(r"`(SALKERNELS_\w+)`", (DOCS / "environment.md").read_text()))
    assert read | COMPOSED == documented


def test_every_public_name_is_in_the_reference():
    # `backends` goes by its module: the package beside it has the same name.
    entry = re.compile(r"^::: salkernels\.(?:functional\.)?(\w+)$", re.MULTILINE)
    shown = set(entry.findall((DOCS / "api.md").read_text()))
    assert shown == set(salkernels.__all__) - {"__version__"}


def test_the_citation_is_of_this_version_and_paper():
    page = (DOCS / "cite.md").read_text()
    cff = (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{salkernels.__version__}}}" in page
    assert f"version: {salkernels.__version__}" in cff
    for text in ("Self-supervised Alignment Learning for Medical Image Segmentation", "2406.15699"):
        assert text in page
        assert text in cff
    assert page.count("@") == 2


def test_every_equation_of_a_docstring_can_be_shown():
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    from latex2mathml.converter import convert

    texts = [page.read_text() for page in DOCS.rglob("*.md")]
    equations = [math for text in texts for math in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)]
    assert len(equations) > 5
    for equation in equations:
        assert r"\begin{aligned}" not in equation, "it would be shown as text"
        assert "merror" not in convert(equation.strip())


def test_the_pictures_are_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the training extra is not installed")
    pytest.importorskip("nibabel", reason="the training extra is not installed")
    monkeypatch.syspath_prepend(str(DOCS))
    from draw import main

    drawn = main(tmp_path)
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    for path in drawn:
        assert path.stat().st_size > 10_000
        assert (DOCS / "images" / path.name).is_file(), "run python docs/draw.py and commit"
        assert f"images/{path.name}" in pages


def test_tables_come_from_the_results(monkeypatch):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    monkeypatch.syspath_prepend(str(DOCS / "hooks"))
    sys.modules.pop("results", None)
    import results

    for name in results.TABLES:
        rows = results.on_page_markdown(f"<!-- results: {name} -->").splitlines()
        assert sum(row.startswith("|") for row in rows) >= 4, name  # two rows and their header
    with pytest.raises(KeyError):
        results.on_page_markdown("<!-- results: nothing -->")


def test_every_flag_in_the_pages_exists(capsys):
    pytest.importorskip("jsonargparse", reason="the training extra is not installed")
    from salkernels.training.cli import COMMANDS
    from salkernels.training.cli import main as train
    from salkernels.training.data.manifest import main as manifest

    programs = [(train, [name, option]) for name in COMMANDS for option in ("--help", "--help-all")]
    programs.append((manifest, ["--help"]))
    for program, words in programs:
        with contextlib.suppress(SystemExit):
            program(words)
    known = set(re.findall(r"--[a-z][\w.]*", capsys.readouterr().out))
    assert len(known) > 60
    known |= {"--config_file", "--dataset_dir", "--output_dir"}  # of a MONAI bundle
    known |= {"--nproc", "--max"}  # torchrun's: --nproc-per-node, --max-restarts
    known |= set(re.findall(r'add\("(--[a-z]\w*)"', (ROOT / "benchmarks/__main__.py").read_text()))
    for page in (DOCS / "training").glob("*.md"):
        assert set(re.findall(r"(?<![\w-])--[a-z][\w.]*\b", page.read_text())) <= known, page.name
