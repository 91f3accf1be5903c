"""The cuda backend's answers: what was built, what this machine has, and why it cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from targets import runs_on
from torch._subclasses.fake_tensor import FakeTensorMode

import salkernels
from salkernels import _native
from salkernels.backends import cuda

X, Y = torch.randn(2, 2, 8, 4, 4)
INFO = {"cuda": {"built": True, "architectures": ["8.0", "9.0"], "ptx": ["9.0"], "nvcc": "13.0"}}


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose library is built and whose GPU has the capability that the test sets."""

    def of(capability, driver=(13, 0)):
        monkeypatch.setattr(cuda, "_MISSING", None)
        monkeypatch.setattr(_native, "build_info", lambda: INFO)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(cuda, "_driver_version", lambda: driver)
        cuda._ask.cache_clear()
        return cuda.status()

    yield of
    cuda._ask.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_a_call_says_what_is_missing():
    reason = cuda.status()
    assert reason is not None
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this input") as caught:
        salkernels.wla_loss(X, Y, 2, backend="cuda")
    assert reason in str(caught.value)
    with pytest.raises(RuntimeError, match="the cuda backend cannot run"):
        torch.ops.salkernels.match(X[None], None, None, None, [2, 2], 1e-12, "cuda")


def test_a_torch_without_cuda_is_named_before_the_library(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._load() == f"torch {torch.__version__} is a build without CUDA"


def test_a_library_that_was_not_built_says_why(monkeypatch):
    info = {"cuda": {"built": False, "reason": "no nvcc was found"}}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(_native, "HERE", _native.HERE / "nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda._load() == "no nvcc was found"
    assert cuda.built_for() is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_code_of_the_generation_or_ptx_of_an_earlier_one_runs(capability, gpu):
    assert gpu(capability) is None


def test_a_gpu_without_code_names_what_was_built_and_what_to_set(gpu, monkeypatch):
    assert gpu((7, 5)) == "it needs compute capability 8.0 or later, and cuda:0 has 7.5"
    monkeypatch.setitem(INFO["cuda"], "architectures", ["9.0"])
    assert gpu((8, 6)) == (
        "it was built for compute capability 9.0, PTX 9.0 (nvcc 13.0), and cuda:0 has 8.6; "
        "reinstall with TORCH_CUDA_ARCH_LIST=8.6"
    )
    monkeypatch.setitem(INFO["cuda"], "ptx", [])
    assert "and cuda:0 has 10.0" in gpu((10, 0))


def test_a_driver_of_an_earlier_cuda_is_named(gpu, monkeypatch):
    assert gpu((9, 0), (12, 8)) == (
        "it was built with CUDA 13.0, while the driver is one for CUDA 12.8; update the driver, or "
        "reinstall with an earlier nvcc"
    )
    # Of its own generation it runs machine code of any version, but no later PTX.
    monkeypatch.setitem(INFO["cuda"], "nvcc", "13.2")
    assert gpu((9, 0), (13, 1)) is None
    assert gpu((12, 0), (13, 1)).startswith(
        "cuda:0 has 12.0, for which there is PTX only, and that was built with CUDA 13.2, while"
    )
    assert gpu((12, 0), (13, 2)) is None
    assert gpu((12, 0), (0, 0)) is None, "the driver does not say"


@pytest.mark.skipif(cuda._MISSING is not None, reason="the cuda library is not here")
def test_the_library_tells_the_version_of_the_driver():
    version = cuda._driver_version()
    assert (version == (0, 0)) if not torch.cuda.is_available() else (version >= (12, 0)), version


def test_compiled_code_knows_a_gpu_that_there_is_no_code_for(gpu, monkeypatch):
    """The reason is asked for while a graph is traced, and becomes part of it."""
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda")

    def chosen(x):
        reason = cuda.why_not(x, None, (2, 2))
        return x.new_empty(1 if reason is None else len(reason))

    for capability in ((8, 0), (7, 5)):
        reason = gpu(capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # dynamo would use it
        # The driver is asked by means that no graph can hold, as here.
        monkeypatch.setattr(cuda, "_driver_version", lambda: (13, len(os.listdir(os.sep)) * 0))
        cuda._ask.cache_clear()
        torch.compiler.reset()
        traced = torch.compile(chosen, fullgraph=True, backend="eager")
        assert len(traced(x)) == (1 if reason is None else len(reason))


def test_inputs_that_it_does_not_take(gpu):
    gpu((9, 0))
    assert cuda.why_not(X, Y, (2, 2)) == "it runs on GPUs, and the features are on cpu"
    integers = torch.empty(2, 2, 8, 4, 4, dtype=torch.int32, device="meta")
    assert "the features are on meta" in cuda.why_not(integers, None, (2, 2))


@runs_on("cuda", "cuda")
@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_call_can_be_captured_in_a_cuda_graph(where):
    features = torch.randn(6, 32, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    features.requires_grad_()
    pairs = ~torch.eye(6, dtype=torch.bool, device=where)
    for window in (2, 8):
        expected = torch.autograd.grad(
            salkernels.wla_set_loss(features, pairs, window, backend="cuda"), features
        )[0]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = salkernels.wla_set_loss(features, pairs, window, backend="cuda")
            torch.autograd.grad(loss, features)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = salkernels.wla_set_loss(features, pairs, window, backend="cuda")
            (grad,) = torch.autograd.grad(loss, features)
        graph.replay()
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("setting", ["torch.backends.cuda.matmul", "torch.backends"])
def test_either_way_to_allow_tf32_is_understood(setting):
    """Reading the older flag raises after the newer one was set; in a process of its own."""
    code = f"""
import torch
from salkernels import _torch_private
assert not _torch_private.tf32_allowed()
{setting}.fp32_precision = "tf32"
assert _torch_private.tf32_allowed()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_of_the_tree_is_packaged():
    """An editable install would hide one that a wheel lacks."""
    root = Path(__file__).resolve().parent.parent
    listed = re.search(
        r"^packages = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.S | re.M
    )[1]
    for folder, name in (("salkernels", "salkernels"), ("training", "salkernels.training")):
        for init in (root / folder).rglob("__init__.py"):
            package = ".".join((name, *init.parent.relative_to(root / folder).parts))
            assert f'"{package}"' in listed, package
