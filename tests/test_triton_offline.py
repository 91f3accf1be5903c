"""The Triton kernels compiled for GPUs that are not here: no spills, shared memory that fits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """What is compiled."""

    dtypes: tuple[str, ...]
    capabilities: tuple[int, ...]
    all_valid: bool = False

    def arguments(self) -> list[str]:
        capabilities = map(str, self.capabilities)
        given = ["--dtypes", *self.dtypes, "--capabilities", *capabilities]
        return [*given, "--all-valid"] if self.all_valid else given


# ptxas takes an hour for all of it, most of that for bf16 and for sm_100.
BRIEF = Part(("float16",), (80, 90), all_valid=True)
WHOLE = Part(("float32", "bfloat16", "float16"), (80, 90, 100, 120))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(BRIEF, id="brief"),
        pytest.param(WHOLE, id="whole", marks=pytest.mark.nightly),
    ],
)
def part(request):
    return request.param


@pytest.fixture(scope="module")
def rows(part):
    """Compiled in a process of its own: in this one the kernels may belong to the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.ptx.offline", "--quick", "--json", *part.arguments()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_and_entry_of_the_table_is_compiled(part, rows):
    from salkernels.triton_kernels.config import TABLE

    kernels = {"match": "match_kernel", "gradient": "gradient_kernel", "norm": "norm_kernel"}
    kernels |= {name: f"{name}_kernel" for name in ("stream_match", "sum")}
    kernels |= {name: f"window_{name}_kernel" for name in ("lse", "lse_gradient")}
    kernels["gradient_across"] = "gradient_kernel"
    wanted = {
        (capability, kernels[kernel], str(dtype).removeprefix("torch."))
        for kernel, dtype in TABLE
        for capability in part.capabilities
        if str(dtype).removeprefix("torch.") in part.dtypes
    }
    compiled = {(row["capability"], row["kernel"], row["dtype"]) for row in rows}
    assert wanted <= compiled
    assert {row["diagonal"] for row in rows if row["kernel"] == "match_kernel"} == {True, False}
    assert {row["merged"] for row in rows if row["kernel"] == "gradient_kernel"} == {True, False}


def test_nothing_spills(rows):
    spilled = [row for row in rows if row["spill_bytes"]]
    assert not spilled, spilled


def test_shared_memory_fits(rows):
    for row in rows:
        assert row["shared_bytes"] <= row["shared_limit"], row


def test_registers_leave_room_for_the_block(rows):
    """65,536 registers of a multiprocessor, in every architecture from 8.0 on."""
    for row in rows:
        assert row["registers"] * 32 * row["warps"] <= 65536, row
