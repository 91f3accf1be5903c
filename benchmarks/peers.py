"""Kernels of other projects that compute the same row-max, on windows gathered for every pair.

Late-interaction retrieval scores a query of L tokens against a document: the sum over its tokens of
the largest cosine. With a window of one sample as query and the same window of its partner as
document, the mean of 1 - max over a window's rows is 1 - score / L. The absolute value of Eq. 1
makes no difference, since a cosine is at most 1.

Each imports its package when called: a package that is missing or broken is a row with a reason.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Problem
from .provider import Provider, to_windows, widen


def gathered(problem: Problem, normalise: bool) -> tuple[Tensor, Tensor]:
    """The windows of queries and keys, (P·T, L, C) each."""
    features = problem.features
    if normalise:
        features = F.normalize(widen(features), dim=1).to(features.dtype)
    windows = to_windows(features, problem.window)  # (S, T, L, C)
    return windows[problem.query].flatten(0, 1), windows[problem.key].flatten(0, 1)


def from_scores(scores: Tensor, problem: Problem) -> Tensor:
    """Sums of L maxima, one per window and pair -> the mean loss."""
    return 1 - scores.mean() / problem.window**2


def keops(problem: Problem) -> Tensor:
    """Row-max by a lazy tensor: KeOps finds the matches, torch gathers and multiplies them.

    KeOps 2.3 cannot differentiate its max reduction, and names this detour in the error.
    """
    from pykeops.torch import LazyTensor

    x, y = gathered(problem, normalise=True)
    x, y = widen(x), widen(y)
    rows, keys = (
        LazyTensor(x.detach()[:, :, None, :].contiguous()),
        LazyTensor(y.detach()[:, None, :, :].contiguous()),
    )
    match = (rows | keys).argmax(dim=2)  # (P·T, L, 1)
    best = torch.take_along_dim(y, match.long(), dim=1)  # (P·T, L, C)
    return (1 - (x * best).sum(dim=-1)).abs().mean()


def late_interaction(problem: Problem) -> Tensor:
    """late-interaction-kernels: one fused Triton kernel per direction, norms included."""
    from late_interaction_kernels import maxsim_pairs

    x, y = gathered(problem, normalise=False)
    # "auto" may reduce in half precision: fp32 input asks for fp32 sums.
    return from_scores(maxsim_pairs(x, y, normalize=True, backward="unified"), problem)


def late_interaction_padded(problem: Problem) -> Tensor:
    """The entry of late-interaction-kernels that has a path for CPUs, in plain torch.

    That path loops over the windows and indexes the batch in each turn, so that its backward fills
    a gradient of the whole batch per window: in one call of 9,792 windows it did not end in two
    minutes. In chunks its cost is linear.
    """
    from late_interaction_kernels import maxsim_padded

    x, y = gathered(problem, normalise=True)
    chunk = len(x) if x.is_cuda else 64
    scores = []
    for queries, documents in zip(x.split(chunk), y.split(chunk), strict=True):
        lengths = torch.full((len(queries),), x.shape[1], device=x.device)
        scores.append(maxsim_padded(queries, documents[:, None], lengths, lengths[:, None]))
    return from_scores(torch.cat(scores), problem)


def flash_maxsim(problem: Problem) -> Tensor:
    """flash-maxsim: Triton, products in fp16 whatever the input."""
    from flash_maxsim import flash_maxsim_batched_train, flash_maxsim_pairs

    x, y = gathered(problem, normalise=True)
    if torch.is_grad_enabled():
        scores = flash_maxsim_batched_train(x, y[:, None].contiguous(), shared_docs=False)
    else:
        scores = flash_maxsim_pairs(x, y)
    return from_scores(scores, problem)


def maxsim_cpu(problem: Problem) -> Tensor:
    """maxsim-cpu: one query window against the windows of all its partners per call; fp32 only."""
    import maxsim_cpu as package

    unit = F.normalize(problem.features.detach().float(), dim=1)
    windows = to_windows(unit, problem.window).transpose(0, 1).contiguous().numpy()  # (T, S, L, C)
    partners = [row.nonzero()[:, 0].numpy() for row in problem.pairs]
    total = 0.0
    for window in windows:
        for query, keys in zip(window, partners, strict=True):
            if len(keys):
                total += float(package.maxsim_scores(query, window[keys]).sum(dtype="float64"))
    scores = len(problem.query) * len(windows)
    return torch.tensor(1 - total / scores / problem.window**2)


PEERS = [
    Provider("keops", keops, "pykeops", builds=True),
    Provider("late-interaction-kernels", late_interaction, "late_interaction_kernels", builds=True),
    Provider("late-interaction-padded", late_interaction_padded, "late_interaction_kernels"),
    Provider("flash-maxsim", flash_maxsim, "flash_maxsim", builds=True),
    Provider("maxsim-cpu", maxsim_cpu, "maxsim_cpu", has_backward=False),
]
