"""`tools.traffic`: counts scaled from small maps against counts of the whole map, and the files.

The counts of Triton's kernels run in a process of their own: in this one the kernels may belong to
Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.ptx import cuda_kernels
from tools.traffic import report
from tools.traffic.instructions import (
    DRAM_BYTES_PER_SECOND,
    ISSUED_PER_SECOND,
    TOTAL,
    Count,
    Counters,
    add_map,
    by_kernel,
    count,
    run_on,
)
from tools.traffic.shapes import SHAPES, Shape
from tools.traffic.table import CASES, Row

ROOT = Path(__file__).resolve().parent.parent
# Small enough for an emulator at their full size: windows that divide the map, and that do not.
SMALL = (
    Shape("small", samples=8, channels=96, side=20),
    Shape("small-ragged", samples=8, channels=96, side=11, window=3),
    Shape("small-groups", samples=8, channels=96, side=24, groups=2, dtype="bfloat16"),
)


@pytest.mark.parametrize("shape", [*SHAPES, *SMALL], ids=lambda shape: shape.name)
def test_small_maps_determine_the_whole_one(shape):
    """A kernel with a constant, a cost of each edge window and of each whole one."""
    whole, rest = divmod(shape.side, shape.window)
    edge = 5 if rest else 0
    constant = 7 if len(shape.maps()) > 1 else 0

    def executed(height, width):
        y, x = height // shape.window, width // shape.window
        return constant + edge * (y + x) + 3 * y * x

    scaled = sum(m.weight * executed(m.height, m.width) for m in shape.maps())
    assert scaled == pytest.approx(constant + edge * 2 * whole + 3 * whole**2)
    for size in shape.maps():
        if size.room:  # pairs x windows as in the whole map
            pairs = len(shape.pairs())
            assert len(shape.pairs(size.room)) == pairs + size.room == pairs * whole**2
        assert size.height % shape.window == size.width % shape.window == rest
        assert max(size.height, size.width) < shape.side


def test_shapes_are_those_of_training():
    acdc = next(shape for shape in SHAPES if shape.name == "acdc-bf16")
    assert (acdc.groups, acdc.samples) == (2, 32)
    pairs = acdc.pairs()
    assert int(pairs.max()) >= 32 * 32, "the second group has pairs too"
    paper = SHAPES[0]
    assert len(paper.pairs()) == 272
    assert paper.bytes_moved("forward") == 32 * 384 * 44 * 44 * 4
    assert paper.bytes_moved("backward") == 2 * paper.bytes_moved("forward")
    features = paper.features(4, 6)
    assert features.shape == (1, 32, 384, 4, 6)
    assert features.stride(2) == 1, "channels-last"


@pytest.fixture(scope="module")
def passes():
    if (reason := cuda_kernels.obstacle()) is not None:
        pytest.skip(f"the PTX cannot be run: {reason}")
    from tools.traffic import cuda

    return cuda.passes()


@pytest.mark.slow
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_scaled_counts_of_cuda_are_those_of_the_whole_map(shape, passes):
    rows = count("cuda", passes, shape)
    direct = {
        phase: {name: vars(c) for name, c in kernels.items()}
        for phase, kernels in run_on(passes, shape, shape.side, shape.side).items()
    }
    close([vars(row) for row in rows], direct)


TRITON = """
import json
from dataclasses import asdict
from tools.traffic import triton
from tools.traffic.instructions import run_on, count
from tools.traffic.shapes import Shape
passes = triton.passes()
for shape in SHAPES:
    rows = [asdict(row) for row in count("triton", passes, shape)]
    direct = run_on(passes, shape, shape.side, shape.side)
    found = {phase: {k: asdict(c) for k, c in kernels.items()} for phase, kernels in direct.items()}
    print(json.dumps([rows, found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_scaled_counts_of_triton_are_those_of_the_whole_map():
    from tools import ptxemu

    if (reason := ptxemu.obstacle()) is not None:
        pytest.skip(reason)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = TRITON.replace("SHAPES", f"[{', '.join(map(repr, SMALL[:2]))}]")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        close(*json.loads(line))


def close(rows, direct):
    """A pass within 2 %, and the kernels that make it up too.

    They are not equal: matches are random, and a small kernel whose loop goes over the pixels of a
    pair, a block's threads at a time, rounds up.
    """
    assert {row["phase"] for row in rows} == {"forward", "backward"}
    for row in rows:
        kernels = direct[row["phase"]]
        whole = sum(k["instructions"] for k in kernels.values())
        if row["kernel"] == TOTAL:
            assert row["warp_instructions"] == pytest.approx(whole, rel=0.02), row
            continue
        wanted = kernels[row["kernel"]]["instructions"]
        if wanted > 0.2 * whole:
            assert row["warp_instructions"] == pytest.approx(wanted, rel=0.02), row


def test_maps_that_run_other_kernels_are_not_scaled():
    whole = {"match": Counters(1.0)}
    with pytest.raises(RuntimeError, match="do not run the same kernels"):
        add_map(SHAPES[0], "forward", whole, {"stream": Counters(1.0)}, 2.0)


def test_launches_of_one_kernel_are_added_up():
    launch = {
        "kernel": "salkernels_match",
        "warp_insns": 10,
        "mma": {"mma.f32": [3, 6144]},
        "global_ld": {"sectors": 4},
    }
    assert by_kernel([launch, launch]) == {"match": Counters(20, 6, 8)}


def rows_of(provider, shape, instructions):
    moved = {"forward": 1, "backward": 2}
    return [
        Count(provider, shape.name, phase, kernel, instructions, 0, 1.5, 31.7 * n, 1.0)
        for phase, n in moved.items()
        for kernel in ("match", TOTAL)
    ]


def test_floors(monkeypatch):
    """One microsecond is 1,045,440 instructions, and 3 MB."""
    assert pytest.approx(1e6) == 1_045_440 / ISSUED_PER_SECOND * 1e12
    assert pytest.approx(3.0e6) == DRAM_BYTES_PER_SECOND * 1e-6
    shape, ran = SHAPES[0], {"match": Counters(1_045_440, 0, 0)}
    total = sum(m.weight for m in shape.maps())
    monkeypatch.setattr(
        "tools.traffic.instructions.run_on", lambda *_: {"forward": ran, "backward": ran}
    )
    rows = {(r.phase, r.kernel): r for r in count("cuda", None, shape)}
    assert rows["forward", TOTAL].issue_floor_us == pytest.approx(total, abs=0.01)
    assert rows["forward", TOTAL].dram_floor_us == 31.7
    assert rows["backward", "match"].dram_floor_us == 63.4


def test_a_shape_is_replaced_and_the_others_stay(tmp_path):
    first, second = SHAPES[:2]
    report.write_counts("cuda", rows_of("cuda", second, 1), tmp_path)
    report.write_counts("cuda", rows_of("cuda", first, 2), tmp_path)
    report.write_counts("cuda", rows_of("cuda", second, 3), tmp_path)
    rows = report.read_counts("cuda", tmp_path)
    assert [row["shape"] for row in rows] == [first.name] * 4 + [second.name] * 4
    assert [row["warp_instructions"] for row in rows] == ["2"] * 4 + ["3"] * 4


def test_the_tables_hold_all_providers_side_by_side(tmp_path):
    for name, phase in (("a", "backward"), ("b", "forward")):
        row = Row(name, CASES[0].key, phase, "k", 1, *[1.0] * 6, 1, 1e-7)
        report.write_rows(name, [row], tmp_path)
    text = (tmp_path / "traffic.md").read_text(encoding="utf-8")
    assert [line[:4] for line in text.splitlines()[-2:]] == ["| b ", "| a "], "forward first"
    assert "issue floor" not in text
    report.write_counts("cuda", rows_of("cuda", SHAPES[0], 1), tmp_path)
    report.write_counts("triton", rows_of("triton", SHAPES[1], 1), tmp_path)
    text = (tmp_path / "traffic.md").read_text(encoding="utf-8")
    assert "| shape | DRAM floor | cuda issue floor | triton issue floor |" in text
    assert "| paper-fp32 | 31.7 / 63.4 | 1.5 / 1.5 | – |" in text
    assert "| paper-bf16 | 31.7 / 63.4 | – | 1.5 / 1.5 |" in text
