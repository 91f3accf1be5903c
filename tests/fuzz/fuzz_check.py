"""Runs one random input through a backend, and compares with the reference in float64.

Both see the same values. A match is a discontinuity: where rounding may decide it, the gradient of
that window is not compared (and how much was compared is counted, so that this cannot hide a
failure everywhere). Everything else is compared element by element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from fuzz_inputs import DTYPES, Input
from tolerances import TOLERANCES, Tolerance
from torch import Tensor

import salkernels
from salkernels.library import match

COMPARED: Counter[str] = Counter()  # inputs, pixels and compared pixels by backend


@dataclass
class Run:
    """What a call gave: losses (G, N, M), max_sim and argmax (P, H, W) or None, gradients."""

    loss: Tensor
    max_sim: Tensor | None
    argmax: Tensor | None
    grads: tuple[Tensor, ...]


@dataclass
class Conditioning:
    """Where a comparison means something: (H, W) and (G, N | M, H, W)."""

    clear: Tensor  # bool: windows whose matches do not hang on rounding
    finite: Tensor  # bool: windows without a NaN or an infinite number
    scale: tuple[Tensor, ...]  # sum of |∂L/∂m| over the terms of a pixel's gradient
    slack: tuple[Tensor, ...]  # how far a flip of sign(1 - m) may move the normalised gradient
    unpaired: tuple[Tensor, ...]  # (G, N | M) bool: samples in no pair


def check(case: Input, backend: str, device: str = "cpu") -> None:
    """Raises AssertionError with the place where the backend is wrong."""
    tolerance = TOLERANCES[DTYPES[case.dtype]]
    query, key = case.features(device)
    pairs = case.pairs()
    wide_query, wide_key = (None if x is None else x.detach().double().cpu() for x in (query, key))
    assert wide_query is not None
    upstream = upstream_of(case, pairs)
    with threads(1):  # small tensors: more threads only wait for each other
        expected = run(case, wide_query, wide_key, pairs, upstream, "reference")
        where = conditioning(case, wide_query, wide_key, pairs, upstream, tolerance)
    with threads(case.threads):
        actual = run(case, query, key, pairs, upstream, backend)

    wide = torch.float64 if case.dtype == "fp64" else torch.float32
    assert actual.loss.dtype == wide, actual.loss.dtype
    value = tolerance.value
    if backend == "reference" and wide == torch.float32:
        # torch adds the terms of a small product one after the other: with 65 channels, 1.01e-6
        # was seen for a vector with itself.
        value += case.channels * 2**-25
    compare_values(actual.loss, expected.loss, value, "loss")
    trusted = where.clear & where.finite
    COMPARED[f"{backend} inputs"] += 1
    COMPARED[f"{backend} pixels"] += trusted.numel()
    COMPARED[f"{backend} compared"] += int(trusted.sum())
    if actual.max_sim is not None:
        assert expected.max_sim is not None
        compare_values(actual.max_sim, expected.max_sim, value, "max_sim")
        assert actual.argmax is not None
        same = (actual.argmax.cpu().long() == expected.argmax.long()) | ~trusted
        assert bool(same.all()), f"argmax: wrong at {(~same).nonzero()[0].tolist()}"
    for i, (x, got, want) in enumerate(
        zip((query, key), actual.grads, expected.grads, strict=False)
    ):
        assert got.dtype == x.dtype
        name = ("gradient of the queries", "gradient of the keys")[i]
        compare_gradient(got.cpu(), want, x.detach().cpu(), case.eps, where, i, tolerance, name)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def upstream_of(case: Input, pairs: Tensor) -> Tensor:
    """∂/∂loss (G, N, M), times H·W so that gradients are of order one."""
    pixels = case.height * case.width
    if case.reduction == "mean" and case.form in ("pairwise", "set") and case.valid == 1:
        return pairs / pairs.sum().clamp_min(1e-30) * pixels
    generator = torch.Generator().manual_seed(case.seed + 2)
    weights = torch.rand(pairs.shape, generator=generator, dtype=torch.float64) + 0.5
    signs = 1 - 2 * torch.randint(0, 2, pairs.shape, generator=generator)
    return weights * signs * pixels


def run(
    case: Input, query: Tensor, key: Tensor | None, pairs: Tensor, upstream: Tensor, backend: str
) -> Run:
    """The call of the input's form, with gradients."""
    settings = {"eps": case.eps, "backend": backend}
    valid = case.valid_pixels()
    valid = None if valid is None else valid.to(query.device)
    query = query.detach().requires_grad_()
    key = None if key is None else key.detach().requires_grad_()
    leaves = (query,) if key is None else (query, key)
    max_sim = argmax = None
    if case.form == "pairwise":
        assert key is not None
        x, y = query[:, 0], key[:, 0]
        settings["valid"] = None if valid is None else (valid[:, 0], valid[:, 1])
        loss = salkernels.wla_loss(x, y, case.window, reduction="none", **settings)
        if valid is not None:
            total = of_maxima(salkernels.align(x, y, case.window, **settings)[0], upstream.view(-1))
        elif case.reduction == "mean":
            total = salkernels.wla_loss(x, y, case.window, **settings) * case.height * case.width
        else:
            total = (loss * upstream.view(-1).to(loss)).sum()
        max_sim, argmax = salkernels.align(x, y, case.window, **settings)
    elif case.form == "set":
        given = pairs[0] if case.weighted else pairs[0] > 0
        settings["valid"] = None if valid is None else valid[0]
        call = salkernels.wla_set_loss
        loss = call(query[0], given, case.window, reduction="none", **settings)
        if valid is not None:
            max_sim, argmax = salkernels.align_set(query[0], pairs[0] > 0, case.window, **settings)
            total = of_maxima(max_sim, upstream[0][pairs[0] > 0])
        elif case.reduction == "mean":
            total = call(query[0], given, case.window, **settings) * case.height * case.width
        else:
            total = (loss * upstream[0].to(loss)).sum()
    else:
        places = (pairs > 0).reshape(-1).nonzero().squeeze(1)
        count = len(places)
        room = torch.cat([places, places.new_full((case.slack,), -1)]).to(query.device)
        given = None if case.mask == "all" else room
        found = match(query, key, given, valid, case.window, case.eps, backend)
        max_sim, argmax = found.max_sim[:count], found.argmax[:count]
        loss = found.loss.new_zeros(pairs.numel()).scatter(
            0, places.to(query.device), found.loss[:count]
        )
        total = (loss * upstream.reshape(-1).to(loss)).sum()
    grads = torch.autograd.grad(total, leaves)
    return Run(loss.detach().view(pairs.shape), max_sim, argmax, grads)


def of_maxima(max_sim: Tensor, upstream: Tensor) -> Tensor:
    """Σ upstream (P,) · mean |1 − max_sim| over all pixels: what the operator's loss sums."""
    return ((1 - max_sim).abs().mean(dim=(1, 2)) * upstream.to(max_sim)).sum()


class InWindow(NamedTuple):
    """The maxima of one window, each (G, N, M, L)."""

    best: Tensor  # cosine
    match: Tensor  # index of the pixel that has it
    present: Tensor  # whether both samples are a pair and both pixels valid
    doubtful: bool  # whether rounding may decide a match otherwise


def in_window(
    case: Input,
    pairs: Tensor,
    tolerance: Tolerance,
    features: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
) -> InWindow:
    """features: of the queries (G, N, C, L) and of the keys (G, M, C, L); valid: their pixels."""
    asks, answers = valid
    norms = [x.norm(dim=2) for x in features]
    units = [x / n[:, :, None].clamp_min(case.eps) for x, n in zip(features, norms, strict=True)]
    sim = torch.einsum("gncp,gmcl->gnmpl", *units)
    sim = sim.masked_fill(~answers[:, None, :, None], -2)  # below any cosine
    best, match = sim.max(dim=-1)
    present = asks[:, :, None] & answers.any(dim=-1)[:, None, :, None] & (pairs > 0)[..., None]
    lead = sim.topk(min(2, sim.shape[-1]), dim=-1).values
    close = (lead[..., 0] - lead[..., -1] < tolerance.margin) & (sim.shape[-1] > 1)
    at_eps = [((n / case.eps - 1).abs() < 1e-5).any() for n in norms]
    doubtful = bool((close & present).any()) or any(at_eps)
    return InWindow(best, match, present, doubtful and not case.exact)


def conditioning(
    case: Input,
    query: Tensor,
    key: Tensor | None,
    pairs: Tensor,
    upstream: Tensor,
    tolerance: Tolerance,
) -> Conditioning:
    """Window by window in float64."""
    keys = query if key is None else key
    clear = torch.ones(query.shape[-2:], dtype=torch.bool)
    finite = clear.clone()
    maps = [torch.zeros_like(x[:, :, 0]) for x in (query, query, keys, keys)]
    scale_query, slack_query, scale_key, slack_key = maps
    everything = torch.ones(query.shape[0], query.shape[1] + keys.shape[1], *query.shape[3:])
    valid = case.valid_pixels()
    if valid is not None and key is None:
        valid = torch.cat([valid, valid], dim=1)
    valid = everything.bool() if valid is None else valid
    strength = (pairs > 0) * upstream.abs() / clear.numel()  # |∂L/∂m|, (G, N, M)
    for top in range(0, case.height, case.window[0]):
        for left in range(0, case.width, case.window[1]):
            block = (
                slice(top, top + case.window[0]),
                slice(left, left + case.window[1]),
            )
            rows, columns = (x[(..., *block)].flatten(-2) for x in (query, keys))  # (G, S, C, L)
            here = valid[(..., *block)].flatten(-2)
            asks, answers = here[:, : rows.shape[1]], here[:, rows.shape[1] :]
            rows = rows.masked_fill(~asks[:, :, None], 0)
            columns = columns.masked_fill(~answers[:, :, None], 0)
            if not (rows.isfinite().all() and columns.isfinite().all()):
                finite[block] = False
                continue
            if 0 in pairs.shape:
                continue
            found = in_window(case, pairs, tolerance, (rows, columns), (asks, answers))
            if found.doubtful:
                clear[block] = False
            weight = strength[..., None] * found.present
            flips = (1 - found.best).abs() < tolerance.margin
            sine = (1 - found.best.square()).clamp_min(0).sqrt()
            slack = 2 * weight * flips * sine
            shape = maps[0][(..., *block)].shape[-2:]
            for target, value in ((scale_query, weight), (slack_query, slack)):
                target[(..., *block)] += value.sum(dim=2).unflatten(-1, shape)
            for target, value in ((scale_key, weight), (slack_key, slack)):
                hits = torch.zeros_like(found.best).scatter_add_(-1, found.match, value).sum(dim=1)
                target[(..., *block)] += hits.unflatten(-1, shape)
    alone = [~(pairs > 0).any(dim=axis) for axis in (2, 1)]
    if key is None:  # one gradient holds both roles
        scales, slacks = (scale_query + scale_key,), (slack_query + slack_key,)
        return Conditioning(clear, finite, scales, slacks, (alone[0] & alone[1],))
    scales, slacks = (scale_query, scale_key), (slack_query, slack_key)
    return Conditioning(clear, finite, scales, slacks, tuple(alone))


def compare_values(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    actual, expected = actual.detach().double().cpu(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    wrong = ~(((actual - expected).abs() <= atol) | (actual.isnan() & expected.isnan()))
    fail_if(wrong, actual, expected, what)


def compare_gradient(
    actual: Tensor,
    expected: Tensor,
    x: Tensor,
    eps: float,
    where: Conditioning,
    index: int,
    tolerance: Tolerance,
    what: str,
) -> None:
    """Of x / ‖x‖, in effect: differences are multiplied by the norm of the pixel."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    limits = torch.finfo(actual.dtype)
    # NaN in a finite window is a pixel that takes no part: as dead as a vector of zeros.
    norm = x.double().norm(dim=2, keepdim=True).nan_to_num(0)
    trusted = (where.clear & where.finite).expand_as(actual)
    dead = (norm <= eps).expand_as(actual) & where.finite
    fail_if(dead & (actual != 0), actual, expected, f"{what}, of vectors not above eps")
    scale, slack = where.scale[index][:, :, None], where.slack[index][:, :, None]
    bound = tolerance.element * expected.abs() * norm + tolerance.floor * scale + slack
    bound = bound + float(limits.smallest_normal) * norm
    difference = (actual.double() - expected).abs() * norm
    overflows = expected.abs() >= 0.9 * float(limits.max)
    fail_if(trusted & ~overflows & ~(difference <= bound), actual, expected, what)
    unpaired = where.unpaired[index][:, :, None, None, None]
    fail_if(unpaired & (actual != 0), actual, expected, f"{what}, of samples in no pair")


def fail_if(wrong: Tensor, actual: Tensor, expected: Tensor, what: str) -> None:
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {actual[place].item()!r} at {place}, expected {expected[place].item()!r}; "
            f"{int(wrong.sum())} of {wrong.numel()} are wrong"
        )
