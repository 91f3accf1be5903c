"""Tables of what was measured on a GPU: from the tracked results, and nothing by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "docs" / "hooks" / "gpu.py"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("gpu_hook", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_providers_come_fastest_first_for_each_dtype(hook):
    rows = [cells(line) for line in hook.paper().splitlines()[2:] if line.startswith("|")]
    for dtype in ("float32", "bfloat16"):
        both = [float(row[4]) for row in rows if row[0] == dtype]
        assert len(both) >= 3
        assert both == sorted(both)


def test_every_shape_that_was_timed_is_shown(hook):
    rows = [line for line in hook.shapes().splitlines()[2:] if line.startswith("|")]
    assert len(rows) == len(hook.times())
    assert all(len(cells(line)) == 8 for line in rows)
    assert "NCHW" in "".join(rows)


def test_training_is_what_the_json_says(hook):
    found = hook.training()["acdc"]
    assert f"(+{found['own'] - found['none']:.1f})" in hook.steps()
    minutes = 18000 * found["own"] / 1e3 / 60
    assert f"| {minutes:.0f} min |" in hook.hours()


def test_kernels_of_both_passes_are_told_apart(hook):
    rows = [cells(line) for line in hook.floors().splitlines()[2:]]
    assert len(rows) == 2 * len(hook.COUNTED)
    for shape, phase, _, _, cuda, _, triton in rows:
        for backend, shown in (("cuda", cuda), ("triton", triton)):
            spent = hook.profiled(hook.COUNTED[shape.strip("`")], backend, phase)
            assert len(spent) >= 2, (shape, backend, phase)
            assert float(shown) == round(sum(spent))


def test_an_unknown_name_is_an_error(hook):
    with pytest.raises(KeyError):
        hook.on_page_markdown("<!-- gpu: nothing -->")
