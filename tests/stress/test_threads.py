"""Many threads call at once: each gets, bit for bit, what it gets alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import salkernels

THREADS = 64
SHARED = torch.randn(6, 40, 20, 20, generator=torch.Generator().manual_seed(9)).requires_grad_()


def call(number: int) -> list[torch.Tensor]:
    """Losses and gradients of inputs that depend on the number: small, large, shared by all."""
    generator = torch.Generator().manual_seed(number)
    side, channels = 6 + 3 * (number % 5), (8, 33, 64)[number % 3]
    dtype = (torch.float32, torch.bfloat16, torch.float64)[number % 3]
    features = torch.randn(5, channels, side, side, generator=generator).to(dtype)
    features.requires_grad_()
    pairs = torch.rand(5, 5, generator=generator) < 0.6
    loss = salkernels.wla_set_loss(features, pairs, 2 + number % 4)
    of_shared = salkernels.wla_loss(SHARED[:3], SHARED[3:], 4)
    results = [loss, *torch.autograd.grad(loss, features)]
    return [*results, of_shared, *torch.autograd.grad(of_shared, SHARED)]


def test_64_threads_get_what_one_gets():
    alone = [call(number) for number in range(THREADS)]
    start = threading.Barrier(THREADS)

    def together(number: int) -> list[list[torch.Tensor]]:
        start.wait(timeout=60)
        return [call(number) for _ in range(2)]

    with ThreadPoolExecutor(THREADS) as pool:
        for number, rounds in enumerate(pool.map(together, range(THREADS))):
            for results in rounds:
                for ours, expected in zip(results, alone[number], strict=True):
                    assert torch.equal(ours, expected), f"thread {number}"


def test_errors_of_some_threads_do_not_reach_others():
    good = torch.randn(3, 8, 6, 6)
    expected = salkernels.wla_loss(good[:1], good[1:2], 2)

    def work(number: int) -> bool:
        if number % 2:
            with pytest.raises(ValueError, match="must have the same shape"):
                salkernels.wla_loss(good, good[:, :4], 2)
            return True
        return torch.equal(salkernels.wla_loss(good[:1], good[1:2], 2), expected)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(400)))
