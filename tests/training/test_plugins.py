"""Methods and data sets from outside the package: by a file, and by an entry point."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import yaml

from salkernels.training import plugins
from salkernels.training.cli import main
from salkernels.training.config import PretrainConfig, pretrain_config
from salkernels.training.data.cache import open_cache
from salkernels.training.data.datasets import DATASETS
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.errors import RunError
from salkernels.training.experiment.tables import TABLES, with_plugins
from salkernels.training.identity import Identity, read_identity
from salkernels.training.methods import METHODS

ROOT = Path(__file__).parents[2]
SMALL = [
    "--crop=32", "--slices=4", "--preprocess.size=32", "--preprocess.spacing=4", "--device=cpu",
    "--model.width=4", "--model.depth=3", "--optim.steps=3", "--log_every=1",
]  # fmt: skip


def blocks(page: str, heading: str) -> list[str]:
    """The Python of a section of the documentation."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert section, heading
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture(autouse=True)
def forgotten():
    """What a test registers is gone after it."""
    saved = [(registry, dict(registry)) for registry in (METHODS, DATASETS, plugins.LOADED)]
    modules = set(sys.modules)
    yield
    for registry, content in saved:
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - modules:
        if name.startswith("salkernels.training.methods."):
            del sys.modules[name]


@pytest.fixture
def spread(tmp_path):
    """The method of the recipe in docs/contributing.md, in a folder of its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "spread.py"
    path.write_text(blocks("contributing.md", "Add a pre-training method")[0], encoding="utf-8")
    return path


@pytest.fixture
def pretrain(spread, phantom, cache_folder, tmp_path):
    """Runs `pretrain` with the plug-in; returns the exit status."""
    where = [f"--data={phantom}", f"--cache={cache_folder}", f"--out={tmp_path / 'run'}"]

    def run(*arguments):
        return main(["pretrain", "--method=spread", *SMALL, *where, *arguments])

    return run


def test_the_method_of_the_recipe_trains_from_a_file_outside_the_package(
    pretrain, spread, tmp_path
):
    assert pretrain("--spread.power=4", "--plugin", str(spread)) == 0
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (out / "encoder.safetensors").is_file()
    assert yaml.safe_load((out / "config.yaml").read_text())["spread"] == {"power": 4}


def test_help_lists_it_with_its_settings(spread, capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with contextlib.suppress(SystemExit):
            main(["pretrain", "--plugin", str(spread), option])
        shown[option] = " ".join(capsys.readouterr().out.split())
    assert re.search(r"pre-training method: random, .*, sal, .*spread\.", shown["--help"])
    assert "--spread.power POWER exponent of the cosines." in shown["--help-all"]
    assert "(spread.py: method spread)" in shown["--help-all"]


def test_without_the_file_the_method_is_unknown(pretrain, capsys):
    assert pretrain() == 2
    assert "unknown method 'spread'" in capsys.readouterr().err


def test_a_run_records_its_plugin_and_does_not_go_on_with_another(
    pretrain, spread, tmp_path, capsys
):
    assert pretrain("--plugin", str(spread)) == 0
    out = tmp_path / "run"
    first = read_identity(out).plugins
    assert [*first] == ["spread.py"]
    assert len(first["spread.py"]) == 64
    assert pretrain("--plugin", str(spread), "--resume") == 0
    spread.write_text(spread.read_text() + "\n# another version\n")
    capsys.readouterr()
    assert pretrain("--plugin", str(spread), "--resume") == 2
    said = capsys.readouterr().err
    assert f"the plug-in spread.py was {first['spread.py'][:12]}, and is" in said
    assert pretrain("--plugin", str(spread), "--resume", "--allow_mismatch") == 0
    marks = read_identity(out).mismatches
    assert [mark.partition(" was")[0] for mark in marks] == ["the plug-in spread.py"]


def test_runs_that_use_no_plugin_do_not_record_those_that_are_there(
    spread, phantom, cache_folder, tmp_path
):
    where = [f"--data={phantom}", f"--cache={cache_folder}", f"--out={tmp_path / 'run'}"]
    words = ["pretrain", "--method=simclr", *SMALL, *where]
    assert main([*words, "--plugin", str(spread)]) == 0
    record = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert "plugins" not in record
    assert Identity.of(record).plain()["hash"] == record["hash"]
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "spread" not in settings
    assert "sal" in settings
    assert main([*words, "--resume"]) == 0  # without the plug-in


def test_a_settings_file_names_no_code(pretrain, spread, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"plugin: ['{spread}']\n")
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--config", str(settings), *SMALL])
    assert stopped.value.code == 2
    assert "a settings file cannot name code to run" in capsys.readouterr().err
    assert "spread" not in METHODS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.py", "x = 1\n", "expected one subclass of Method or an instance of DatasetInfo"),
        ("mine.py", "a\n1 / 0\n", r"mine\.py, line 1: NameError: name 'a'"),
        ("mine.py", "\n\ndef (:\n", r"mine\.py, line 3: SyntaxError"),
        ("sal.py", "x = 1\n", r"the package has a sal\.py of its own"),
        ("base.py", "x = 1\n", r"the package has a base\.py of its own"),
        ("two words.py", "x = 1\n", "expected a Python file"),
        ("mine.txt", "x = 1\n", "expected a Python file"),
        ("crop.py", None, "the name 'crop' is taken"),
    ],
)
def test_a_file_that_is_no_plugin_is_refused_in_one_line(name, text, message, spread, tmp_path):
    path = tmp_path / name
    path.write_text(spread.read_text() if text is None else text)
    for _ in range(2):  # the first try leaves nothing behind
        with pytest.raises(RunError, match=message) as caught:
            plugins.load(path)
        assert "\n" not in str(caught.value)
    assert plugins.LOADED == {}
    with pytest.raises(RunError, match="cannot be read"):
        plugins.load(tmp_path / "nothing.py")


def test_a_method_without_a_label_is_refused(spread):
    spread.write_text(spread.read_text().replace('label: ClassVar[str] = "Spread"', "x = 1"))
    with pytest.raises(RunError, match=r"expected Spread\.label"):
        plugins.load(spread)
    assert "spread" not in METHODS


def test_configurations_in_code_have_its_settings(spread):
    plugin = plugins.load(spread)
    assert plugins.load(spread) is plugin
    config = pretrain_config()(method="spread")
    assert isinstance(config, PretrainConfig)
    assert config.settings.power == 2
    with pytest.raises(ValueError, match=r"make the configuration with config\.pretrain_config"):
        PretrainConfig(method="spread")
    # Edited in a notebook and loaded again.
    spread.write_text(spread.read_text().replace("power: int = 2", "power: int = 3"))
    assert plugins.load(spread) is not plugin
    assert pretrain_config()(method="spread").settings.power == 3


def test_two_files_of_one_name_are_refused(spread, tmp_path):
    plugins.load(spread)
    other = tmp_path / "spread.py"
    other.write_text(spread.read_text())
    with pytest.raises(RunError, match="has the same name"):
        plugins.load(other)


@pytest.fixture
def layout(tmp_path):
    """The data set of docs/training/plugins.md, and a folder that has its layout."""
    path = tmp_path / "flat.py"
    path.write_text(blocks("training/plugins.md", "A data set")[0], encoding="utf-8")
    return path


def test_a_data_set_from_a_file(layout, phantom, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for image in phantom.rglob("patient*_frame*.nii.gz"):
        kind = "labels" if image.name.endswith("_gt.nii.gz") else "images"
        subject, frame = image.name.removesuffix(".nii.gz").removesuffix("_gt").split("_")
        (data / f"{subject}-{frame}-{kind}.nii.gz").write_bytes(image.read_bytes())
    words = [f"--data={data}", "--dataset=flat", f"--out={tmp_path / 'run'}", "--plugin"]
    assert main(["pretrain", "--method=simclr", *SMALL, *words, str(layout)]) == 0
    assert [*read_identity(tmp_path / "run").plugins] == ["flat.py"]
    # Loaders in processes of their own need not know the plug-in.
    info = DATASETS["flat"]
    cache = open_cache(
        info.find(data), PreprocessConfig(spacing=4.0, size=32), info, tmp_path / "cache"
    )
    content = pickle.dumps(cache)
    assert b"salkernels.training.methods.flat" not in content
    assert pickle.loads(content).info.class_names == info.class_names


def test_an_entry_point_registers_its_method(tmp_path, monkeypatch, capsys):
    package = tmp_path / "site" / "outside_methods"
    package.mkdir(parents=True)
    code = blocks("contributing.md", "Add a pre-training method")[0]
    code = code.replace("from ..models", "from salkernels.training.models")
    code = code.replace("from .base", "from salkernels.training.methods.base")
    (package / "__init__.py").write_text(code)
    about = tmp_path / "site" / "outside_methods-1.5.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-methods\nVersion: 1.5\n")
    (about / "entry_points.txt").write_text(
        "[salkernels.methods]\nfarther = outside_methods:Spread\nbroken = outside_methods:Nothing\n"
        "[salkernels.datasets]\nwrong = outside_methods:Spread\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with contextlib.suppress(SystemExit):
        main(["pretrain", "--help-all"])
    said = capsys.readouterr()
    assert "--farther.power" in said.out
    assert "the plug-in outside_methods:Nothing is left out: AttributeError" in said.err
    assert "the plug-in outside_methods:Spread is left out: TypeError: expected a Data" in said.err
    config = pretrain_config()(method="farther")
    found = plugins.used_by(config)
    assert [*found] == ["outside-methods 1.5"]
    assert plugins.files() == []
    # Any of its files counts.
    (package / "other.py").write_text("x = 1\n")
    assert plugins._package_digest("outside_methods") != found["outside-methods 1.5"]


def test_an_experiment_takes_it_for_an_arm(spread, phantom, cache_folder, tmp_path, capsys):
    small = [f"--pretrain.{setting[2:]}" for setting in SMALL]
    small += [f"--finetune.{setting[2:]}" for setting in SMALL if "slices" not in setting]
    out = tmp_path / "experiment"
    words = ["experiment", "table1", "--only_pretrain", f"--data={phantom}", f"--out={out}"]
    words += [*small, "--threads=1", "--arms", "spread"]
    assert main(words) == 2
    assert "no arm 'spread'" in capsys.readouterr().err
    assert main([*words, "--plugin", str(spread)]) == 0
    assert [*read_identity(out / "pretrain" / "spread").plugins] == ["spread.py"]
    assert with_plugins(TABLES["table1"], ["spread"]).arm("spread").label == "Spread"
    # A table of another version of it would mix two methods.
    spread.write_text(spread.read_text() + "\n# another version\n")
    assert main([*words, "--plugin", str(spread)]) == 2
    assert "the plug-in spread.py was" in capsys.readouterr().err
