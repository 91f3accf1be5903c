"""One rank of NCCL (of Gloo in a rehearsal): DistributedDataParallel, synchronised norms, the loss.

The command line joins no group with one process; what it would do with several is done here by
hand, as far as one GPU goes.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import salkernels

from .record import Context
from .train import find_training


def ddp(context: Context) -> None:
    find_training()
    from salkernels.training import distributed

    backend = "cpu:gloo,cuda:nccl" if context.on_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            plain = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 1)
            )
            place = torch.device(context.device, 0) if context.on_gpu else torch.device("cpu")
            network = distributed.synchronise_norms(plain.to(place), place)
            network = DistributedDataParallel(network, device_ids=[0] if context.on_gpu else None)
            for name in context.backends:
                with context.measuring(name, backend=name) as row:
                    row["ok"] = _step(network, place, name)
        finally:
            dist.destroy_process_group()


def _step(network: nn.Module, place: torch.device, backend: str) -> bool:
    """Whether every parameter gets a finite gradient, and gathered rows are those sent."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 24, 24, generator=generator).to(place)
    pairs = ~torch.eye(8, dtype=torch.bool)
    network.zero_grad()
    salkernels.wla_set_loss(network(images), pairs, 2, backend=backend).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    rows = [torch.empty_like(images)]
    dist.all_gather(rows, images)
    return torch.equal(rows[0], images) and all(
        grad is not None and bool(grad.isfinite().all()) for grad in gradients
    )
