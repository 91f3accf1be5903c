"""Private names of torch: which there are, and what is left where one has gone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import salkernels
from salkernels import _torch_private

SOURCES = sorted(Path(salkernels.__file__).parent.rglob("*.py"))


def test_torch_has_them_all():
    """Red with a new torch: its users take longer ways, and lose a message."""
    assert callable(torch._C._len_torch_dispatch_stack)
    assert callable(torch._C._are_functorch_transforms_active)
    assert callable(torch._C._functorch.is_legacy_batchedtensor)
    assert callable(torch._C._get_fp32_precision_getter)
    operator = torch.ops.aten.sin.default
    assert _torch_private.without_wrapper(operator) is not operator
    plain = torch.ones(2)
    assert torch.equal(_torch_private.without_wrapper(operator)(plain), plain.sin())
    assert _torch_private.nobody_looks(plain)
    assert _torch_private.nobody_looks_at_all((plain, plain))
    assert not _torch_private.transforms_active()
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert not _torch_private.nobody_looks(plain)
        assert not _torch_private.nobody_looks_at_all((plain,))
    seen = []
    torch.vmap(lambda x: seen.append(_torch_private.transforms_active()) or x)(torch.ones(2))
    assert seen == [True]


def test_a_constant_is_marked_as_torch_marks_one():
    theirs = torch.compiler.assume_constant_result(lambda: 1)
    ours = _torch_private.constant_for_dynamo(lambda: 1)
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_other_module_uses_one(path):
    """torch._x, or a name imported from a module of torch that starts with an underscore."""
    if path.name == "_torch_private.py" or "triton_kernels" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            private = chain.startswith("torch.") and any(
                part.startswith("_") and not part.startswith("__") for part in chain.split(".")
            )
            assert not private, f"{path.name}:{node.lineno}: {chain}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), f"{path.name}:{node.lineno}"


def test_without_any_of_them_all_results_are_the_same(monkeypatch):
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    pairs = ~torch.eye(3, dtype=torch.bool)

    def results():
        loss = salkernels.wla_set_loss(x, pairs, 2)
        return loss, torch.autograd.grad(loss, x)[0]

    expected = results()
    monkeypatch.setattr(_torch_private, "_count_modes", None)
    monkeypatch.setattr(_torch_private, "_transforms", None)
    monkeypatch.setattr(_torch_private, "_precision", None)
    torch.testing.assert_close(results(), expected)
    assert not _torch_private.tf32_allowed()
    assert _torch_private.without_wrapper(len) is len
    with pytest.raises(RuntimeError):  # torch's own words then
        torch.func.grad(lambda z: salkernels.wla_set_loss(z, pairs, 2))(x.detach())


def test_the_package_can_be_imported_without_them():
    code = (
        "import torch\n"
        "names = '_len_torch_dispatch_stack', '_are_functorch_transforms_active'\n"
        "kept = {name: vars(torch._C).pop(name) for name in names}\n"
        "import salkernels\n"
        "vars(torch._C).update(kept)\n"  # torch itself needs them
        "assert not salkernels._torch_private.nobody_looks(torch.ones(2))\n"
        "x = torch.randn(2, 4, 6, 6, requires_grad=True)\n"
        "salkernels.wla_loss(x, x.flip(0), 2).backward()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert importlib.import_module("salkernels._torch_private") is _torch_private
