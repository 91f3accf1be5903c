"""The recipe of docs/contributing.md for a method, followed to the letter on a copy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import salkernels

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def recipe():
    """The file and the line."""
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    section = text.partition("## Add a pre-training method")[2].partition("\n## ")[0]
    code, line = CODE.findall(section)
    return re.search(r"`training/methods/(\w+)\.py`", section)[1], code, line


@pytest.fixture(scope="module")
def followed(recipe, tmp_path_factory):
    """Runs a command with a copy of the training package to which the recipe was applied."""
    name, code, line = recipe
    copy = tmp_path_factory.mktemp("package") / "training"
    shutil.copytree(TRAINING, copy, ignore=shutil.ignore_patterns("__pycache__", "results", "runs"))
    methods = copy / "methods"
    assert not (methods / f"{name}.py").exists()
    (methods / f"{name}.py").write_text(code, encoding="utf-8")
    registry = methods / "__init__.py"
    before = registry.read_text(encoding="utf-8")
    after = re.sub(r"(FILES = \(\n(?:    .*\n)*?)\)", rf"\g<1>{line})", before, count=1)
    assert after.count("\n") == before.count("\n") + 1  # one line
    registry.write_text(after, encoding="utf-8")
    package = Path(salkernels.__file__)
    places = {
        "path": [path for path in sys.path if path],
        "packages": {"salkernels": str(package), "salkernels.training": str(copy / "__init__.py")},
    }

    def run(*arguments):
        command = [sys.executable, "-I", str(copy / "experiment" / "child.py"), json.dumps(places)]
        ours, parent = os.pipe()  # the process ends when this end is closed
        try:
            return subprocess.run(
                [*command, *map(str, arguments)], capture_output=True, text=True, check=False,
                stdin=ours, env={**os.environ, "COLUMNS": "100"},
            )  # fmt: skip
        finally:
            os.close(ours)
            os.close(parent)

    return run


def test_help_knows_the_method_and_its_settings(recipe, followed):
    done = followed("pretrain", "--help-all")
    assert done.returncode == 0, done.stderr
    assert f"--{recipe[0]}.power POWER" in done.stdout
    assert "exponent of the cosines. (type: int, default: 2)" in done.stdout


def test_it_trains_three_steps(recipe, followed, phantom, cache_folder, tmp_path):
    name, out = recipe[0], tmp_path / "run"
    small = [
        "--crop=32", "--slices=4", "--preprocess.size=32", "--preprocess.spacing=4", "--device=cpu",
        "--model.width=4", "--model.depth=3", "--optim.steps=3", "--log_every=1",
    ]  # fmt: skip
    where = [f"--data={phantom}", f"--cache={cache_folder}", f"--out={out}"]
    done = followed("pretrain", f"--method={name}", f"--{name}.power=4", *small, *where)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] <= 1 for row in rows)
    assert (out / "encoder.safetensors").is_file()
    assert (out / "figures" / "input_slices.png").is_file()
    assert "power: 4" in (out / "config.yaml").read_text()


def test_its_settings_are_checked_by_itself(recipe, followed, tmp_path):
    name = recipe[0]
    wrong = followed(
        "pretrain", f"--method={name}", f"--{name}.power=0", f"--out={tmp_path / 'run'}"
    )
    assert wrong.returncode == 2
    assert "spread.power must be at least 1, got 0" in wrong.stderr


def test_it_is_no_row_of_the_papers_tables(followed, tmp_path):
    done = followed(
        "experiment", "table1", "--arms", "spread", f"--data={tmp_path}", f"--out={tmp_path}"
    )
    assert done.returncode == 2
    assert "no arm 'spread'; expected some of random, rotation, pirl" in done.stderr
