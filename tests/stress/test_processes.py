"""Worker processes that call the loss: forked, also after the parent has used it, and spawned."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import salkernels

ITEMS = 6
PAIRS = ~torch.eye(6, dtype=torch.bool)


def loss_and_gradient(number: int) -> torch.Tensor:
    """Large enough for the kernel to use all threads of its process."""
    generator = torch.Generator().manual_seed(number)
    features = torch.randn(6, 48, 24, 24, generator=generator).requires_grad_()
    loss = salkernels.wla_set_loss(features, PAIRS, 2)
    (grad,) = torch.autograd.grad(loss, features)
    return torch.cat((loss.detach()[None], grad.flatten()))


class Losses(Dataset):
    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
        return os.getpid(), loss_and_gradient(number)


@pytest.fixture
def one_thread():
    """As in a worker, so that torch's sums over the pairs are split alike."""
    threads = torch.get_num_threads()
    yield lambda: torch.set_num_threads(1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method, one_thread):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    torch.set_num_threads(2)
    loss_and_gradient(0)  # the parent has used it, with its threads, before it forks
    loader = DataLoader(
        Losses(),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=method,
        timeout=120,
    )
    results = list(loader)
    loss_and_gradient(0)  # and may go on
    one_thread()
    assert len({pid for pid, _ in results} - {os.getpid()}) == 2
    for number, (_, values) in enumerate(results):
        assert torch.equal(values, loss_and_gradient(number))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_with_one_thread(one_thread):
    """More threads hang there, in any operator of torch: OpenMP does not survive a fork."""
    torch.set_num_threads(2)
    loss_and_gradient(0)
    one_thread()
    expected = loss_and_gradient(1)
    torch.set_num_threads(2)
    loss_and_gradient(0)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(loss_and_gradient(1), expected) else 3)
    assert os.waitpid(child, 0)[1] == 0
