"""Puts what was measured on a GPU into the pages: `<!-- gpu: NAME -->` becomes a table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from salkernels.training.presets import PRETRAIN

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TIMES, EVERYTHING = RESULTS / "h100.csv", RESULTS / "h100-gpu.json"
PAPER = "S32-C384-44x44-w2-{}-channels_last"
GRAM = ("gram-half", "gram")  # in the dtype of 16-bit features, where it was measured; in fp32
BACKENDS = ("cuda", "triton")
# Shapes of `python -m tools.traffic`, and their cases.
COUNTED = {
    "paper-fp32": PAPER.format("float32"),
    "paper-bf16": PAPER.format("bfloat16"),
    "acdc-bf16": "S64-C384-44x44-w2-bfloat16-channels_last-scans",
    **{f"window{w}-fp32": f"S32-C384-44x44-w{w}-float32-channels_last" for w in (3, 6)},
    "window22-bf16": "S32-C384-44x44-w22-bfloat16-channels_last",
}
OURS = re.compile(r"salkernels_|\w+_kernel$")
FORWARD = re.compile(r"salkernels_(match|stream|norms|reduce)|(stream_)?match_|norm_|loss_")
PLAN = "plan_kernel"  # once in each pass
Row = dict[str, str]

_PLACE = re.compile(r"^<!-- gpu: ([\w-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of each page; an unknown name is a KeyError."""
    return _PLACE.sub(lambda match: TABLES[match[1]](), markdown)


def paper() -> str:
    """Every provider at the paper's shape, fastest first."""
    lines = ["| features | provider | forward, ms | backward | both | memory | × the floor |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for dtype in ("float32", "bfloat16"):
        passes = times()[PAPER.format(dtype)]
        ranked = sorted(passes["both"].values(), key=lambda row: float(row["median_ms"]))
        for row in ranked:
            name = row["provider"]
            parts = [_short(passes[what][name]["median_ms"]) for what in ("forward", "backward")]
            lines.append(
                f"| {dtype} | {name} | {' | '.join(parts)} | {_short(row['median_ms'])} | "
                f"{_short(row['peak_mb'])} MB | {_short(row['times_floor'])} |"
            )
    return "\n".join([*lines, "", _conditions()])


def shapes() -> str:
    """Our backends at all shapes, beside the Gram product."""
    lines = ["| S, C, size | ω | pairs | features | `cuda` | `triton` | Gram | floor |"]
    lines.append("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for passes in times().values():
        both = passes["both"]
        row = next(iter(both.values()))
        gram = next((both[name] for name in GRAM if name in both), None)
        kind = row["dtype"] + (", NCHW" if row["layout"] == "nchw" else "")
        kind += ", scan after scan" if "-scans" in row["case"] else ""
        lines.append(
            f"| {row['samples']}, {row['channels']}, {row['height']} × {row['width']} | "
            f"{row['window']} | {row['pairs']} | {kind} | "
            + " | ".join(_both_passes(passes, f"salkernels-{name}") for name in BACKENDS)
            + f" | {_short(gram['median_ms']) if gram else ''} | {_short(row['floor_ms'])} |"
        )
    return "\n".join([*lines, "", _conditions()])


def steps() -> str:
    """Training steps with and without the alignment loss."""
    lines = ["| preset | without LA, ms | with LA | with a Gram product in its place |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for preset, found in training().items():
        none, own, gram = (found[loss] for loss in ("none", "own", "gram-half"))
        lines.append(
            f"| `{preset}` | {none:.1f} | {own:.1f} (+{own - none:.1f}) | "
            f"{gram:.1f} (+{gram - none:.1f}) |"
        )
    return "\n".join(lines)


def hours() -> str:
    """What pre-training takes at the length of the presets, by the step alone."""
    lines = ["| preset | steps | s a step | one pre-training |", "| --- | ---: | ---: | ---: |"]
    for preset, found in training().items():
        count, seconds = PRETRAIN[preset]["optim.steps"], found["own"] / 1e3  # type: ignore[index]
        lines.append(
            f"| `{preset}` | {count:,} | {seconds:.3f} | {count * seconds / 60:,.0f} min |"
        )
    return "\n".join(lines)


def floors() -> str:
    """Counted floors beside the profiler's time, pass by pass, in microseconds."""
    lines = ["| shape | pass | DRAM | `cuda`: issue | on the GPU | `triton`: issue | on the GPU |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for shape, case in COUNTED.items():
        for phase in ("forward", "backward"):
            memory = counted("cuda")[shape, phase]["dram_floor_us"]
            cells = []
            for backend in BACKENDS:
                found = counted(backend).get((shape, phase))
                spent = sum(profiled(case, backend, phase))
                cells += [found["issue_floor_us"] if found else "", f"{spent:.0f}"]
            lines.append(f"| `{shape}` | {phase} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "paper": paper, "shapes": shapes, "steps": steps, "hours": hours, "floors": floors,
}  # fmt: skip


@cache
def times() -> dict[str, dict[str, dict[str, Row]]]:
    """Rows by case, pass and provider."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    with TIMES.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] == "ok":
                passes = found.setdefault(row["case"], {})
                passes.setdefault(row["pass"], {})[row["provider"]] = row
    return found


@cache
def training() -> dict[str, dict[str, float]]:
    """Milliseconds of a step by preset and alignment loss."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads(EVERYTHING.read_text(encoding="utf-8"))["rows"]:
        if row["step"] == "train" and "step_ms" in row:
            found.setdefault(row["preset"], {})[row["loss"]] = row["step_ms"]
    return found


@cache
def counted(backend: str) -> dict[tuple[str, str], Row]:
    """Totals of the emulator's counts by shape and pass."""
    with (RESULTS / f"instructions-{backend}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "total"]
    return {(row["shape"], row["phase"]): row for row in rows}


def profiled(case: str, backend: str, phase: str) -> list[float]:
    """Microseconds of each kernel of ours in a pass."""
    rows = json.loads(EVERYTHING.read_text(encoding="utf-8"))["rows"]
    found = next(
        row["us"]
        for row in rows
        if row["step"] == "kernels" and (row.get("case"), row.get("backend")) == (case, backend)
    )
    spent = [us / 2 for name, us in found.items() if name == PLAN]
    for name, us in found.items():
        if OURS.match(name) and name != PLAN and bool(FORWARD.match(name)) == (phase == "forward"):
            spent.append(us)
    return spent


def _both_passes(passes: dict[str, dict[str, Row]], provider: str) -> str:
    parts = [passes.get(what, {}).get(provider) for what in ("forward", "backward", "both")]
    if not all(parts):
        return ""
    forward, backward, both = (_short(row["median_ms"]) for row in parts if row)
    return f"{both} ({forward} + {backward})"


def _short(number: str) -> str:
    """Three digits."""
    return f"{float(number):.3g}"


def _conditions() -> str:
    row = next(iter(times()[PAPER.format("float32")]["both"].values()))
    return (
        f"*Medians on the device behind a queue, caches cold; {row['processor']}; torch "
        f"{row['torch']}, {row['versions']}; commit {row['commit']}, {row['date']}.*"
    )
