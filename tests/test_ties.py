"""Ties: among equal similarities the lowest pixel of the window is the match, row by row.

Only exact arithmetic makes a tie: vectors of zeros and one power of two. Products of equal but
arbitrary vectors may differ in the last bit with their place in a matrix product.
"""

from __future__ import annotations

import pytest
import torch
from cases import F32, F64, oracle
from hypothesis import given
from hypothesis import strategies as st

import salkernels

DTYPES = [F32, F64, torch.bfloat16, torch.float16]


def one_hot(codes, channels=4):
    """(B, H, W) codes -> (B, C, H, W): unit vectors along a channel, of several lengths."""
    planes = torch.nn.functional.one_hot(codes, channels).movedim(-1, 1)
    return planes * (2.0 ** (codes[:, None] - 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(2, 2), (3, 4), (7, 9), (1, 9), (4, 1)])
def test_of_all_equal_keys_the_first_wins(window, dtype, backend, device):
    x = torch.randint(0, 4, (2, 7, 9))
    x = one_hot(x).to(device, dtype).requires_grad_()
    y = one_hot(torch.ones(2, 7, 9, dtype=torch.long)).to(device, dtype).requires_grad_()
    _, argmax = salkernels.align(x, y, window, backend=backend)
    assert (argmax == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_goes_to_the_first_of_equals_only(dtype, backend, device):
    x = torch.zeros(1, 2, 4, 6, device=device, dtype=dtype)
    x[:, 0], x[:, 1] = 1, 1
    y = torch.zeros(1, 2, 4, 6, device=device, dtype=dtype)
    y[:, 0] = 1
    y.requires_grad_()
    salkernels.wla_loss(x, y, (2, 3), backend=backend).backward()
    chosen = y.grad.abs().sum(dim=1)[0] > 0
    assert chosen.nonzero().tolist() == [[0, 0], [0, 3], [2, 0], [2, 3]]


def test_the_second_best_place_is_row_by_row(backend, device):
    """Equal keys at (0, 2) and (1, 0) of a 2 x 3 window: the upper row comes first."""
    y = torch.zeros(1, 2, 2, 3, device=device)
    y[:, 1] = 1
    y[0, :, 0, 2] = y[0, :, 1, 0] = torch.tensor([1.0, 0.0], device=device)
    x = torch.zeros_like(y)
    x[:, 0] = 1
    _, argmax = salkernels.align(x, y, (2, 3), backend=backend)
    assert (argmax == 2).all()


def test_the_first_nan_wins(backend, device):
    x, y = torch.ones(1, 2, 2, 3, device=device), torch.ones(1, 2, 2, 3, device=device)
    y[0, 0, 0, 2] = y[0, 0, 1, 1] = torch.nan
    max_sim, argmax = salkernels.align(x, y, (2, 3), backend=backend)
    assert max_sim.isnan().all()
    assert (argmax == 2).all()


@given(data=st.data())
def test_matches_of_one_hot_maps_are_the_oracle_s(data):
    height = data.draw(st.integers(1, 7), label="height")
    width = data.draw(st.integers(1, 7), label="width")
    window = (
        data.draw(st.integers(1, height), label="rows"),
        data.draw(st.integers(1, width), label="columns"),
    )
    seed = data.draw(st.integers(0, 2**16), label="seed")
    codes = torch.randint(0, 4, (2, height, width), generator=torch.Generator().manual_seed(seed))
    x, y = one_hot(codes[:1]).double(), one_hot(codes[1:]).double()
    expected = oracle(x[0], y[0], window)
    max_sim, argmax = salkernels.align(x, y, window)
    assert torch.equal(argmax[0], expected.argmax)
    assert torch.equal(max_sim[0], expected.max_sim)
