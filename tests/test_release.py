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


WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def workflow(name: str) -> dict:
    """Its content; YAML 1.1 reads the key `on` as True."""
    content = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in content.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_name_files_and_targets_that_exist(name):
    text = WORKFLOWS[name].read_text(encoding="utf-8")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target
    for path in re.findall(r"-m pytest ([^\s-]\S*)", text):
        assert (ROOT / path).is_dir(), path
    assert all("timeout-minutes" in job for job in workflow(name)["jobs"].values())


def test_changes_are_tested_on_the_oldest_and_the_newest():
    jobs = workflow("ci")["jobs"]
    assert set(jobs["test"]["needs"]) == {"lint", "types"}
    rows = jobs["test"]["strategy"]["matrix"]["include"]
    classifiers = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    oldest = re.search(r'"torch>=([\d.]+)"', read("pyproject.toml"))[1]
    pythons = [row["python"] for row in rows]
    assert {classifiers[0], classifiers[-1]} <= set(pythons)
    assert any(
        row["python"] == classifiers[0] and row["torch"] == f"torch=={oldest}.*" for row in rows
    )
    assert any(row["command"] == ".ci/run" for row in rows)
    assert any(row["os"].startswith("macos") for row in rows)


def test_long_tests_run_every_night():
    nightly = workflow("nightly")
    assert nightly["on"]["schedule"]
    failing = [name for name, job in nightly["jobs"].items() if job.get("continue-on-error")]
    assert failing == ["torch-nightly"]
    commands = [step.get("run", "") for job in nightly["jobs"].values() for step in job["steps"]]
    assert any("--hypothesis-profile=nightly" in command for command in commands)
    assert any("-m nightly --nightly" in command for command in commands)


def test_only_a_tag_publishes_and_without_a_password():
    jobs = workflow("wheels")["jobs"]
    publish = jobs["publish"]
    assert "github.ref_type == 'tag'" in publish["if"]
    assert set(publish["needs"]) == jobs.keys() - {"publish"}
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("secrets." in path.read_text(encoding="utf-8") for path in WORKFLOWS.values())
    others = [workflow(name)["permissions"] for name in WORKFLOWS]
    assert all(permissions == {"contents": "read"} for permissions in others)


def test_the_release_check_is_a_program_without_syntax_errors():
    script = ROOT / "scripts" / "check_release.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
