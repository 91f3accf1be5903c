"""What goes out with a release agrees with itself: version, citation, changelog, settings."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import salkernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").is_file(), reason="needs a source tree")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_written_in_one_place():
    """All else takes it from there; the citation, which cannot, must agree."""
    version = salkernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+|\.dev\d+)?", version)
    assert importlib.metadata.version("salkernels") == version
    assert f'__version__ = "{version}"' in read("salkernels/_version.py")
    assert 'version = { attr = "salkernels._version.__version__" }' in read("pyproject.toml")
    others = [
        path.relative_to(ROOT).as_posix()
        for folder in ("salkernels", "training", "buildtools")
        for path in (ROOT / folder).rglob("*.py")
        if f'"{version}"' in path.read_text(encoding="utf-8")
    ]
    assert others == ["salkernels/_version.py"]
    assert f"\nversion: {version}\n" in read("CITATION.cff")


def test_the_citation_names_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys(), "what the schema needs"
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Li", "Ouyang", "Wan"]
    assert paper["title"] == "Self-supervised Alignment Learning for Medical Image Segmentation"
    assert paper["year"] == 2024
    assert paper["url"].endswith("2406.15699")


def test_the_changelog_keeps_its_form():
    """https://keepachangelog.com: versions with dates, newest first, in six kinds of change."""
    lines = read("CHANGELOG.md").splitlines()
    assert lines[0] == "# Changelog"
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    for line in versions[1:]:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", line), line
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {line[4:] for line in lines if line.startswith("### ")} <= kinds


@pytest.mark.parametrize(
    "path",
    [".pre-commit-config.yaml", *(p.relative_to(ROOT) for p in (ROOT / ".github").rglob("*.yml"))],
    ids=str,
)
def test_settings_of_services_are_yaml(path):
    content = yaml.safe_load(read(str(path)))
    assert isinstance(content, dict)
    if "workflows" in str(path):
        for name, job in content["jobs"].items():
            assert {"runs-on", "steps"} <= job.keys(), name


def test_workflows_name_files_and_targets_that_exist():
    text = read(".github/workflows/ci.yml")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target
    for path in re.findall(r"pytest (\S+)", text):
        assert (ROOT / path).is_dir(), path


def test_the_release_check_is_a_program_without_syntax_errors():
    script = ROOT / "scripts" / "check_release.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
