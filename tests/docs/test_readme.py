"""The README: short, its figures those of the tracked results, its links and commands real."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from salkernels.backends.measured import fastest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROVIDERS = {
    "**`cpu` backend**": "salkernels-cpu",
    "window-wise Gram, eager": "gram",
    "window-wise Gram, `torch.compile`": "gram-compiled",
    "the paper's text, pair by pair, eager": "naive",
    "`late-interaction-kernels` (`maxsim_padded`)": "late-interaction-padded",
}


def table(below: str) -> list[list[str]]:
    """The cells of the first table below a heading or other words, without its header."""
    section = README[README.index(below) :]
    rows = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def number(text: str) -> float:
    return float(re.search(r"[\d,.]+", text)[0].replace(",", ""))


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_its_example_is_the_one_that_is_tested():
    example = (ROOT / "docs" / "examples" / "five_lines.py").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.split("\n\n", 1)[1] in example


def test_its_times_are_those_of_the_results():
    with (ROOT / "benchmarks" / "results" / "cpu.csv").open(newline="") as file:
        rows = {
            row["provider"]: row
            for row in csv.DictReader(file)
            if (row["suite"], row["layout"], row["pass"]) == ("paper", "channels_last", "both")
        }
    shown = table("## Speed")
    assert [row[0] for row in shown] == list(PROVIDERS)
    ours = float(rows["salkernels-cpu"]["median_ms"])
    for name, ms, times, memory in shown:
        row = rows[PROVIDERS[name]]
        assert number(ms) == round(float(row["median_ms"])), name
        assert number(times) == round(float(row["median_ms"]) / ours), name
        assert abs(number(memory) - float(row["peak_mb"])) <= 0.5, name


def test_its_times_on_a_gpu_are_those_of_the_results_and_of_the_default():
    with (ROOT / "benchmarks" / "results" / "h100.csv").open(newline="") as file:
        rows = {
            (row["dtype"], row["provider"]): row
            for row in csv.DictReader(file)
            if row["case"].startswith("S32-C384-44x44-w2-") and row["pass"] == "both"
            and row["layout"] == "channels_last"
        }  # fmt: skip
    chosen = {dtype: fastest(getattr(torch, dtype), (2, 2)) for dtype in ("float32", "bfloat16")}
    (name, *ours), (_, *gram) = table("On an NVIDIA H100")
    assert name == (
        f"**`{chosen['float32']}` in fp32, `{chosen['bfloat16']}` in bf16: the default**"
    )
    providers = {
        "float32": (f"salkernels-{chosen['float32']}", "gram"),
        "bfloat16": (f"salkernels-{chosen['bfloat16']}", "gram-half"),
    }
    for i, (dtype, names) in enumerate(providers.items()):
        for cell, provider in zip((ours[i], gram[i]), names, strict=True):
            row = rows[dtype, provider]
            ms, memory = cell.split(", ")
            assert number(ms) == float(f"{float(row['median_ms']):.3g}"), (dtype, provider)
            assert abs(number(memory) - float(row["peak_mb"])) <= 0.5, (dtype, provider)


def test_its_dice_are_those_of_the_results():
    written = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "training" / "results").rglob("*.md")
    )
    rows = table("## Dice on ACDC")
    assert len(rows) == 5
    for name, *cells in rows:
        for cell in cells[:2]:
            figure = cell.replace("*", "")
            assert re.fullmatch(r"0\.\d{3} \(0\.\d{3}\)", figure), name
            assert f"| {figure} |" in written, (name, figure)


def test_its_interval_is_that_of_the_results():
    probed = ROOT / "training" / "results" / "mini-probe" / "collapse-probe.md"
    (mean, low, high) = re.search(r"(0\.\d+)\s\[(0\.\d+), (0\.\d+)\] above PCL", README).groups()
    row = f"| no E, independent views in one frame | +{mean} [+{low}, +{high}]"
    assert row in probed.read_text(encoding="utf-8")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)\s]+)\)", README.replace("\n", " ")))
def test_its_links_lead_somewhere(link):
    if not link.startswith("https://"):
        path, _, anchor = link.partition("#")
        page = (ROOT / path).read_text(encoding="utf-8") if anchor else ""
        assert (ROOT / path).exists()
        headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
