"""Tests of the CPU kernels again, on another instruction set than this machine's best."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LEVELS = ["baseline", "avx2", "avx512"]


def run_tests_at(level: str, file: str, selection: str) -> None:
    """The choice is made once per process, so each level runs in a process of its own.

    selection: which tests of the file, as for `pytest -k`.
    """
    code = (
        "import torch, sys; from salkernels.backends import cpu\n"
        f"if cpu.instruction_set() != {level!r}: sys.exit(77)\n"
        "import pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', "
        f"{file!r}, '-k', {selection!r}]))"
    )
    environment = {**os.environ, "SALKERNELS_CPU_ISA": level}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode == 77:
        pytest.skip(f"this machine cannot run {level}")
    assert run.returncode == 0, run.stdout + run.stderr
