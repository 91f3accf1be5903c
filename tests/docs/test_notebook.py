"""The notebook: its cells run in order and draw the pictures; its page shows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("nibabel", reason="the training extra is not installed")
pytest.importorskip("matplotlib", reason="the training extra is not installed")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "phantom.ipynb"


@pytest.fixture
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.mark.slow
def test_its_cells_run(cells, tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plt.close("all")
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
    assert names["encoder"].is_file()
    assert len(plt.get_fignums()) == 3  # slices, curves, matches
    plt.close("all")
    assert "maps (1, 64, 6, 6) loss 0." in capsys.readouterr().out


def test_nothing_of_a_run_is_stored(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_its_page_shows_the_cells_and_opens_in_colab(cells, monkeypatch):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    sys.modules.pop("notebook", None)
    import notebook

    name = NOTEBOOK.relative_to(ROOT).as_posix()
    shown = notebook.page(name, "https://github.com/owner/name/")
    assert f"({notebook.COLAB}/github/owner/name/blob/main/{name})" in shown
    assert all("".join(cell["source"]) in shown for cell in cells)
    assert "Upload notebook" in notebook.page(name, None)
