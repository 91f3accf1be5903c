"""The optimiser of a run and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .config import OptimConfig


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Factor on the rate of step `step` (from 0): linear warm-up, then half a cosine."""
    warmup = round(optim.warmup * optim.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, optim.steps - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_lr + (1 - optim.final_lr) * cosine


def make_optimiser(groups: Iterable[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over parameter groups, each with a factor `scale` on the learning rate.

    Weight decay acts on matrices and kernels, not on biases and norms, unless `decay_all` is set.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        lr = optim.lr * group.get("scale", 1.0)
        for decay in (True, False):
            chosen = [p for p in parameters if (p.dim() > 1) == decay]
            if chosen:
                weight_decay = optim.weight_decay if decay or optim.decay_all else 0.0
                split.append({"params": chosen, "lr": lr, "weight_decay": weight_decay})
    if optim.name == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        return torch.optim.SGD(split, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
    return kind(split, lr=optim.lr)
