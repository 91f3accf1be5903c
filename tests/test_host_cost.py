"""The tool that times what a call costs the host runs, and tells of each call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.host_cuda import kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("stub", ["cpu", "cuda"])
def test_it_times_every_call(stub):
    if stub == "cuda" and kernels.obstacle() is not None:
        pytest.skip(kernels.obstacle())
    command = [sys.executable, "-m", "tools.host_cost", "--backends", stub, "--seconds", "0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = {line[:36].strip(): line[36:].split() for line in run.stdout.splitlines()}
    assert sum(name.startswith("floor: ") for name in found) == 6
    for form in ("set", "pairs"):
        for passes in ("forward", "both"):
            median, least = map(float, found[f"{stub}: {form}, {passes}"])
            assert median >= least > 0
