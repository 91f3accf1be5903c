"""One process, or one of many that `torchrun` started.

Everything here is the identity in one process. A step of the optimiser takes W · k batches: k in a
row (`optim.accumulate`) on each of W processes, numbered rank · k + place. `gather` makes a loss
over the samples of all of them, whichever way they are spread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .errors import RunError
from .locks import sole_use
from .replay import active, scale_gradient

Result = TypeVar("Result")
# For messages of a few bytes over the CPU, which may have to wait for process 0: it preprocesses
# the scans while the others stand by. A process that died is noticed at once all the same.
_control: Any = None
_alone = False  # in an action that the other processes wait for
PATIENCE = timedelta(days=1)


def world() -> int:
    """W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes logs, figures and checkpoints."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if started_by_torchrun() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def started_by_torchrun() -> int:
    """Processes that torchrun started; 1 where it is not in play."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def require_one_process(command: str) -> None:
    """Raises a RunError under torchrun, for what cannot be shared by processes.

    Fine-tuning takes the Dice of a batch as a whole, which is no mean over parts of the batch.
    """
    if started_by_torchrun() > 1:
        raise RunError(
            f"{command} runs in one process, but torchrun started {started_by_torchrun()}; start "
            f"it with python. Only pretrain is shared by processes"
        )


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did, for the time of the block.

    device: of the configuration; NCCL joins GPUs, Gloo CPUs.

    Raises:
        RunError: another process was lost, or there are more processes than GPUs.
    """
    global _control
    if started_by_torchrun() == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(own_gpu(device))
        backend = "cpu:gloo,cuda:nccl"
    # torchrun keeps one store over restarts: without a prefix of its own an attempt would find the
    # addresses of the last one (pytorch/pytorch#135712).
    store, number, count = next(rendezvous("env://"))
    store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
    except RunError:
        raise
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise RunError(
            f"process {rank()} lost another one ({str(error).splitlines()[0]}); with "
            f"--max-restarts and --resume torchrun goes on from the last checkpoint"
        ) from error
    # Not after an error: the others may be waiting in it, and the process ends anyway.
    dist.destroy_process_group()
    _control = None


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Holds a run folder for all processes of this run, by the first of them."""
    with ExitStack() as stack:
        first(lambda: stack.enter_context(sole_use(out)) if is_main() else None)
        yield


def own_gpu(device: str) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device not in ("auto", "cuda"):
        raise RunError(
            f"under torchrun each process takes a GPU of its own: use device auto or cuda (or "
            f"cpu), not {device!r}"
        )
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        raise RunError(
            f"torchrun started more processes on this machine than it has GPUs ({count}); lower "
            f"--nproc-per-node, or raise optim.accumulate for larger steps"
        )
    return torch.device("cuda", place)


def first(action: Callable[[], Result]) -> Result:
    """Does something in process 0 alone, for which all wait, and gives its result to all.

    Within such an action it does nothing special: the others wait already.

    Raises:
        RunError: in the other processes, where process 0 failed.
    """
    global _alone
    if world() == 1 or _alone:
        return action()
    box: list[Any] = [None, "it failed"]
    if not is_main():
        dist.broadcast_object_list(box, src=0, group=_control)
        if box[1] is not None:
            raise RunError(f"process {rank()} stops with process 0, which says why")
        result: Result = box[0]
        return result
    _alone = True
    try:
        result = action()
        box = [result, None]
    finally:
        _alone = False
        dist.broadcast_object_list(box, src=0, group=_control)
    return result


def total(values: list[float]) -> list[float]:
    """Sum over processes of each number."""
    if world() == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, group=_control)
    summed: list[float] = numbers.tolist()
    return summed


def broadcast(tensor: Tensor) -> None:
    """Replaces the tensor's content in all processes with that of process 0."""
    if world() > 1:
        dist.broadcast(tensor, src=0)


def gather(local: Tensor) -> Tensor:
    """The rows of all W · k batches of a step: (B, ...) -> (W · k · B, ...).

    Gradient goes to the rows of this batch alone, times W · k: a loss of gathered rows only is the
    same number for every batch, and the mean over batches of these gradients is its gradient.
    B must be the same everywhere.
    """
    replay = active()
    if replay is not None:
        return replay.gather(local)
    if world() == 1:
        return local
    rows = gather_rows(local.detach())
    rows[rank()] = scale_gradient(local, world())
    return torch.cat(rows)


def gather_rows(local: Tensor) -> list[Tensor]:
    """The tensor of every process, without gradient."""
    if world() == 1:
        return [local]
    rows = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(rows, local.contiguous())
    return rows


def share(count: Tensor) -> Tensor:
    """Factor that turns a mean over this batch's `count` terms into its part of the mean over the
    terms of all W · k batches of the step, where gradients are averaged over batches."""
    counts = gather(count[None])
    if len(counts) == 1:
        return torch.ones((), device=count.device)
    return len(counts) * count / counts.sum().clamp_min(1)


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module such that gradients are averaged over processes in its backward pass.

    Running statistics of batch norms are those of process 0; a method's memory is kept alike by
    `gather` and `broadcast`.
    """
    if world() == 1:
        return module
    gpu = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        module,
        device_ids=gpu,
        find_unused_parameters=getattr(module, "leaves_parameters_out", False),
    )


def bare(module: nn.Module) -> nn.Module:
    """The module itself, without what `parallel` put around it: its keys are those on disk."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def synchronise_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Lets batch norms take their statistics over the samples of all processes."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = SyncBatchNorm(child.num_features)
            norm.weight, norm.bias = child.weight, child.bias
            norm.load_state_dict(child.state_dict())
            module.add_module(name, norm)
        else:
            synchronise_norms(child, device)
    return module


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the samples of all processes on CPUs, for which torch's own has no kernel.

    Every process must hold equally many samples.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        wide = x.float()
        mean = _mean_over_processes(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]
        # In two passes: E[x²] − E[x]² would cancel where a channel's mean is far from 0.
        variance = _mean_over_processes(centred.square().mean((0, 2, 3)))
        self._remember(mean.detach(), variance.detach(), world() * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None  # our models track statistics
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        momentum = self.momentum if self.momentum is not None else 0.1
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / (count - 1), momentum)


class _Sum(torch.autograd.Function):
    """Sum over processes; the loss is the sum of all processes' losses, so gradients add up too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.clone()
        dist.all_reduce(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result = grad.clone()
        dist.all_reduce(result)
        return result


def _mean_over_processes(x: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(x)
    return summed / world()
