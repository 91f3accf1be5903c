"""The Triton kernels as machine code: PTX for sm_80, run by an emulator, against the definition.

In a process of its own: in this one the kernels may belong to Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCES

from tools import ptxemu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(ptxemu.obstacle() is not None, reason=str(ptxemu.obstacle())),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
]


def run(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# Of `tools.ptx.triton_kernels`: two tiles that pairs join, fp16 in the form of pairs, streaming.
BRIEF = ("2", "13", "10")


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(BRIEF, id="brief"),
        pytest.param((), id="all", marks=pytest.mark.nightly),  # ptxas takes many minutes
    ],
)
def test_every_way_to_tile_against_the_definition(numbers):
    rows = run("-m", "tools.ptx.triton_kernels", *numbers)
    assert len(rows) == (len(numbers) or 22)
    for row in rows:
        tolerance = TOLERANCES[getattr(torch, row["dtype"])]
        assert row["loss"] < tolerance.value, row
        assert row["max_sim"] < tolerance.similarity, row
        assert row["argmax"] == 0, row
        assert row["grad_query"] < tolerance.relative_l2, row
        assert row.get("grad_key", 0) < tolerance.relative_l2, row


TRAFFIC = """
import json
from dataclasses import asdict
from tools.traffic.table import CASES
from tools.traffic.triton import run
for case in CASES[:2]:  # fp32 and bf16
    for row in run(case):
        print(json.dumps(asdict(row)))
"""


@pytest.mark.nightly
def test_each_feature_is_read_once_and_each_gradient_written_once():
    """At the paper's windows: 32 samples of 384 channels, channels-last."""
    rows = run("-c", TRAFFIC)
    assert [row["phase"] for row in rows] == ["forward", "backward"] * 2
    for row, matches in zip(rows, (0.05, 0.06, 0.05, 0.12), strict=True):
        # What is above 1 are matches, their gradient, and pair numbers, twice as large beside bf16
        # features: for 272 pairs 5 bytes a pixel to be saved, and 9 to be read back.
        assert row["unique_read"] <= 1 + matches, row
        assert row["shared_conflicts"] == 0, row
        if row["phase"] == "forward":
            assert row["requested"] <= 1.25, row
            assert row["load_efficiency"] >= 0.9, row
        else:
            assert row["unique_written"] <= 1.01, row
            assert row["store_efficiency"] >= 0.99, row
