"""What scripts/gpu.sh tells of a run: its summary, and what benchmarks/results keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.cases import QUICK
from tools.gpu import __main__ as command
from tools.gpu import record
from tools.gpu.conductor import Ending
from tools.gpu.record import Context
from tools.gpu.results import take
from tools.gpu.summary import LINES, summary

MACHINE = {
    "step": "report", "name": "machine", "processor": "NVIDIA H100", "commit": "abc",
    "date": "today", "python": "3.12", "torch": "2.11.0",
    "versions": "salkernels 0.1.0; triton 3.6.0",
    "backends": {"cuda": "available", "triton": "available"},
    "gpu": {"driver_version": "580", "clocks.sm": "1980 MHz", "clocks.max.sm": "1980 MHz"},
}  # fmt: skip


def timed(provider, case=QUICK.key, **milliseconds):
    rows = [
        {
            "case": case, "suite": "gpu", "provider": provider, "pass": what, "status": "ok",
            "median_ms": str(ms), "p20_ms": str(ms), "p80_ms": str(ms), "times_floor": "1.5",
            "host_us": "30", "graph_ms": "0.1", "queued": "yes", "features_mb": "2",
        }
        for what, ms in milliseconds.items()
    ]  # fmt: skip
    return {"step": "time", "name": f"{case} {provider}", "provider": provider, "rows": rows,
            "ok": True}  # fmt: skip


def test_the_order_is_that_of_each_pass():
    """Backends change places between the passes: numbers, not letters, decide."""
    rows = [
        MACHINE,
        timed("gram", forward=100, backward=300, both=400),
        timed("salkernels-triton", forward=9.5, backward=70, both=79.5),
        timed("salkernels-cuda", forward=10, backward=20, both=30),
    ]
    text = summary(rows, {"time": Ending("time", "done", 3.0, 60.0)})
    assert "forward: triton 9.5 < cuda 10 < gram 100; backward: cuda 20 < triton 70 <" in text
    assert "both: cuda 30 (1.5 ×, host 30, graph 0.1) < triton 79.5" in text
    assert text.startswith("# NVIDIA H100, 1980 MHz of 1980 MHz, driver 580\n")
    assert "torch 2.11.0; salkernels 0.1.0; triton 3.6.0" in text
    assert "BAD" not in text


def test_the_summary_has_sixty_lines_whatever_there_is():
    many = [
        timed("salkernels-cuda", replace(QUICK, window=w).key, forward=1, backward=2, both=3)
        for w in range(1, 60)
    ]
    bad = [
        {"step": "smoke", "name": f"form {i}", "failed": "RuntimeError: x" * 60} for i in range(99)
    ]
    steps_train = [
        {"step": "train", "name": f"{p} {n}", "preset": p, "loss": n, "step_ms": 12.5}
        for p in ("acdc", "chd")
        for n in ("none", "cuda")
    ]
    ms = {"GP": 0.7, "encoder": 48.0}
    steps_train.append({"step": "split", "name": "acdc", "preset": "acdc", "ms": ms})
    near = [
        {
            "step": "numerics", "name": str(noise), "backend": "cuda", "dtype": "float32",
            "loss_relative": noise, "loss": 1e-3, "bias": 0.0,
        }
        for noise in (1e-5, 1e-2, 1e-4)
    ]  # fmt: skip
    per_kernel = [
        {"step": "kernels", "name": "x", "us": {"salkernels_match": 12.0, "fill": 1.0}},
        {"step": "kernels", "name": "y", "failed": "RuntimeError: y"},
    ]
    endings = {name: Ending(name, "no time", 0.0, 0.0) for name in ("graph", "ddp")}
    text = summary([MACHINE, *many, *bad, *steps_train, *near, *per_kernel], endings)
    lines = text.splitlines()
    assert 40 <= len(lines) <= LINES
    assert "smoke 0 of 99" in text
    assert "88 more are bad" in text
    assert "46 more shapes in timings.md" in text
    assert "- acdc: none 12.5, cuda 12.5" in text
    assert "- acdc: encoder 48, GP 0.7" in text
    assert "cuda float32 1.0e-02 (loss 1.0e-03" in text
    assert "salkernels_match 12, fill 1" in text
    assert "not done: graph: **no time**, ddp: **no time**" in text
    assert max(map(len, lines)) < 400


def test_results_are_taken_over(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "gpu-results"
    here = Context("report", "cuda", folder, 60)
    with pytest.raises(ValueError, match="no results that name their machine"):
        take([folder], "h100", home)
    here.emit(**{k: v for k, v in MACHINE.items() if k != "step"})
    row = timed("salkernels-cuda", forward=1, backward=2, both=3)
    Context("time", "cuda", folder, 60).emit(**{k: v for k, v in row.items() if k != "step"})
    command.tell(folder)
    names = {path.name for path in take([folder], "h100", home)}
    assert names == {"h100.csv", "h100.md", "h100-gpu.md", "h100-gpu.json"}
    kept = json.loads((home / "h100-gpu.json").read_text())
    assert [row["step"] for row in kept["rows"]] == ["report", "time"]
    assert "salkernels-cuda" in (home / "h100.md").read_text()
    assert len(list(folder.iterdir())) <= 8  # few enough to be carried away by hand


def test_results_of_two_commits_are_merged(tmp_path, monkeypatch):
    """Rows of both are kept; the table and the summary have the latest."""
    home = tmp_path / "home"
    for commit, milliseconds, windows in (("old", 9.0, (2, 3)), ("new", 5.0, (2,))):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        folder = tmp_path / commit
        here = Context("report", "cuda", folder, 60)
        here.emit(**{k: v for k, v in (MACHINE | {"commit": commit}).items() if k != "step"})
        for window in windows:
            row = timed("salkernels-cuda", replace(QUICK, window=window).key, forward=milliseconds)
            row["rows"] = [line | {"commit": commit} for line in row["rows"]]
            here = Context("time", "cuda", folder, 60)
            here.emit(**{k: v for k, v in row.items() if k != "step"})
    take([tmp_path / "old", tmp_path / "new"], "h100", home)
    kept = json.loads((home / "h100-gpu.json").read_text())
    assert [run["commit"] for run in kept["runs"]] == ["old", "new"]
    times = [(row["commit"], row["rows"][0]["median_ms"]) for row in kept["rows"] if "rows" in row]
    assert times == [("old", "9.0"), ("old", "9.0"), ("new", "5.0")]
    csv = (home / "h100.csv").read_text()
    assert csv.count(",9.0,") >= 2
    assert csv.count(",5.0,") >= 1
    text = (home / "h100-gpu.md").read_text()
    assert "-w2-float32-channels_last forward: cuda 5.0" in text
    assert "-w3-float32-channels_last forward: cuda 9.0" in text
    assert "9.0" in (home / "h100.md").read_text()
    other = Context("report", "cuda", tmp_path / "other", 60)
    machine = MACHINE | {"processor": "NVIDIA A100"}
    other.emit(**{k: v for k, v in machine.items() if k != "step"})
    with pytest.raises(ValueError, match="different machines, NVIDIA A100 and NVIDIA H100"):
        take([tmp_path / "old", tmp_path / "other"], "h100", home)
