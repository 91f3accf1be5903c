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


def test_both_imports_give_the_function():
    code = """
import salkernels.wla_loss as module_style
from salkernels import wla_loss
import salkernels
assert module_style is wla_loss is salkernels.wla_loss and callable(wla_loss), module_style
import pickle
assert pickle.loads(pickle.dumps(wla_loss)) is wla_loss
import importlib
assert importlib.import_module("salkernels.wla_loss") is wla_loss
"""
    run("-c", code)


def test_import_is_light_and_has_no_effect():
    code = """
import sys, torch
before, state = set(sys.modules), torch.random.get_rng_state()
def settings():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_num_threads(), deterministic, torch.get_default_dtype()
flags = settings()
import salkernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "nibabel", "matplotlib", "monai", "scipy", "tensorboard"}
assert not heavy, heavy
assert "salkernels.training" not in sys.modules
assert torch.equal(state, torch.random.get_rng_state())
assert flags == settings()
assert not torch.cuda.is_initialized()
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
