"""The package as a user meets it: imports, the report, the version. In processes of their own."""

from __future__ import annotations

import subprocess
import sys

import torch

import salkernels


def run(*args):
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_has_no_effect_and_gives_the_function_both_ways():
    code = """
import sys, torch
def settings():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_num_threads(), deterministic, torch.get_default_dtype()
before, state, flags = set(sys.modules), torch.random.get_rng_state(), settings()
import salkernels.wla_loss as module_style
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "nibabel", "matplotlib", "monai", "scipy", "tensorboard"}
assert not heavy, heavy
assert "salkernels.training" not in sys.modules
assert torch.equal(state, torch.random.get_rng_state())
assert flags == settings()
assert not torch.cuda.is_initialized()

import importlib, pickle, salkernels
from salkernels import wla_loss
assert module_style is wla_loss is salkernels.wla_loss and callable(wla_loss), module_style
assert importlib.import_module("salkernels.wla_loss") is wla_loss
assert pickle.loads(pickle.dumps(wla_loss)) is wla_loss
"""
    assert run("-c", code) == "", "importing prints nothing"


def test_python_m_prints_the_report():
    report = run("-m", "salkernels")
    assert f"salkernels {salkernels.__version__}" in report
    assert torch.__version__ in report
    rows = report.partition("backends, in order of preference:")[2].strip().splitlines()
    for row, status in zip(rows, salkernels.backends(), strict=True):
        assert row.strip().startswith(status.name)
        assert (status.reason or "available") in row


def test_public_names():
    assert sorted(salkernels.__all__) == salkernels.__all__
    for name in salkernels.__all__:
        item = getattr(salkernels, name)
        assert name == "__version__" or item.__doc__, f"{name} has no docstring"
