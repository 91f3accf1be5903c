"""Distributed tensors on two processes: pairs shard over samples, sets are refused in words."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import salkernels

rank = int(sys.argv[1])
store = "tcp://localhost:" + sys.argv[2]
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
x, y = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
valid = torch.rand(4, 6, 6) > 0.4
plain = x.clone().requires_grad_()
expected = salkernels.wla_loss(plain, y, 2, valid=valid)
expected.backward()
losses = salkernels.wla_loss(x, y, 2, reduction="none")

for place in (Shard(0), Replicate(), Shard(1)):
    by_sample = Replicate() if place == Shard(1) else place
    maps = distribute_tensor(x, mesh, [place]).requires_grad_()
    partners = distribute_tensor(y, mesh, [place])
    mask = distribute_tensor(valid, mesh, [by_sample])
    each = salkernels.wla_loss(maps, partners, 2, reduction="none")
    assert each.placements == (by_sample,), each.placements
    torch.testing.assert_close(each.full_tensor(), losses)
    loss = salkernels.wla_loss(maps, partners, 2, valid=mask)
    torch.testing.assert_close(loss.full_tensor(), expected)
    loss.backward()
    torch.testing.assert_close(maps.grad.full_tensor(), plain.grad)
    assert salkernels.align(maps, partners, 2).max_sim.placements == (by_sample,)

for call in (
    lambda: salkernels.wla_set_loss(maps, ~torch.eye(4, dtype=torch.bool), 2),
    lambda: salkernels.wla_loss(maps, y, 2),
    lambda: salkernels.wla_loss(maps, partners, 2, valid=valid),
):
    try:
        call()
        raise SystemExit("no error")
    except TypeError as error:
        assert "DTensor" in str(error), error
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_pairs_shard_over_samples_and_sets_are_refused():
    port = str(free_port())
    command = [sys.executable, "-c", WORKER]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen([*command, str(rank), port], **pipes) for rank in range(2)]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
