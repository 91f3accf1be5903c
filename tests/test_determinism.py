"""The same call twice gives the same bits, whatever the memory held before.

The number of threads may change the last bit: torch splits one long sum among them.
"""

from __future__ import annotations

import pytest
import torch
from cases import MASKS
from compare import is_interpreted

import salkernels


@pytest.fixture
def poison():
    """Not here: the deterministic mode that fills memory would hide what is not deterministic."""


def run(backend, device, dtype, window):
    """`window` None is the whole map."""
    generator = torch.Generator().manual_seed(1)
    size = 8 if is_interpreted(backend, device) else 24
    features = torch.randn(6, 32, size, size, generator=generator).to(device, dtype)
    features.requires_grad_()
    window = window or (size, size)
    settings = {"reduction": "none", "backend": backend}
    set_loss = salkernels.wla_set_loss(features, MASKS["band"](6).to(device), window, **settings)
    pair_loss = salkernels.wla_loss(features, features.roll(1, 0), window, **settings)
    (set_loss.sum() + pair_loss.sum()).backward()
    return set_loss, pair_loss, features.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(2, 2), (5, 7), None])
def test_bit_equal_twice(window, dtype, backend, device):
    assert not torch.are_deterministic_algorithms_enabled()
    first = run(backend, device, dtype, window)
    rubbish = torch.full((1 << 20,), torch.nan, device=device)  # shifts what the next call is given
    second = run(backend, device, dtype, window)
    del rubbish
    for name, a, b in zip(("set loss", "pair loss", "gradient"), first, second, strict=True):
        assert torch.equal(a, b), name


def test_deterministic_mode_is_honoured(backend, device):
    expected = run(backend, device, torch.float32, (2, 2))
    torch.use_deterministic_algorithms(True)
    try:
        actual = run(backend, device, torch.float32, (2, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gp_is_bit_equal_twice(device):
    positives = (torch.rand(16, 16) > 0.5).to(device)
    base = torch.randn(16, 64)

    def run_gp():
        embeddings = base.to(device, copy=True).requires_grad_()
        loss = salkernels.gp_loss(embeddings, positives)
        return loss, *torch.autograd.grad(loss, embeddings)

    assert all(torch.equal(a, b) for a, b in zip(run_gp(), run_gp(), strict=True))
