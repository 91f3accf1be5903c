"""Comparisons that say where and by how much two tensors differ."""

from __future__ import annotations

import torch
from tolerances import TOLERANCES, UNCLEAR_WINDOWS, Tolerance
from torch import Tensor


def is_interpreted(backend: str, device: torch.device) -> bool:
    """Whether the backend's kernels run in Triton's interpreter, seconds for a call."""
    return backend == "triton" and device.type == "cpu"


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    return TOLERANCES[dtype]


def assert_values(actual: Tensor, expected: Tensor, atol: float, what: str = "value") -> None:
    """Same shape, NaN and Inf in the same places, and no element further than `atol`."""
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, expected = _double(actual), _double(expected)
    _assert_no_worse(_errors(actual, expected), torch.tensor(atol), actual, expected, what)


def assert_gradient(
    actual: Tensor, expected: Tensor, tolerance: Tolerance, what: str = "gradient"
) -> None:
    """Close element by element, and as a vector: length, direction, and no drift to one side."""
    assert tuple(actual.shape) == tuple(expected.shape), (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, expected = _double(actual), _double(expected)
    largest = expected.abs().max().clamp_min(1)  # gradients are scaled to order one: see upstream
    bound = tolerance.element * expected.abs() + tolerance.floor * largest
    _assert_no_worse(_errors(actual, expected), bound, actual, expected, what)
    relative_l2, cosine, bias = vector_errors(actual, expected)
    if expected.norm() <= tolerance.floor * largest * expected.numel() ** 0.5:
        return  # nothing but rounding: a direction means nothing
    assert relative_l2 <= tolerance.relative_l2, f"{what}: relative L2 error {relative_l2:.3g}"
    assert cosine <= tolerance.cosine, f"{what}: 1 - cosine is {cosine:.3g}"
    assert abs(bias) <= tolerance.bias, f"{what}: signed bias {bias:+.3g}"


def vector_errors(actual: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Relative L2 error, 1 - cosine, and the signed mean error as a share of the mean size."""
    actual, expected = _double(actual).flatten(), _double(expected).flatten()
    error = actual - expected
    size = expected.norm()
    if size == 0:
        return float(error.norm()), 0.0, float(error.mean())
    # From the difference of unit vectors: 1 - a·b would cancel to zero below 1e-16.
    apart = actual / actual.norm().clamp_min(1e-300) - expected / size
    return (
        float(error.norm() / size),
        float(apart.square().sum() / 2),
        float(error.mean() / expected.abs().mean()),
    )


def clear_pixels(margin: Tensor, window: tuple[int, int], band: float) -> Tensor:
    """(H, W) bool: pixels of windows in which no pair's match hangs on rounding.

    `margin` (P, H, W) is the lead of the best match over the second best. Fails if more than a
    small share of the windows is left out.
    """
    height, width = margin.shape[-2:]
    clear = torch.ones(height, width, dtype=torch.bool)
    windows, unclear = 0, 0
    for top in range(0, height, window[0]):
        for left in range(0, width, window[1]):
            block = (
                slice(None),
                slice(top, top + window[0]),
                slice(left, left + window[1]),
            )
            windows += 1
            if bool((margin[block] < band).any()):
                unclear += 1
                clear[block[1:]] = False
    assert unclear <= UNCLEAR_WINDOWS * windows, f"{unclear} of {windows} windows are too close"
    return clear


def upstream(shape: torch.Size, height: int, width: int) -> Tensor:
    """A gradient of the loss other than 1, scaled so that feature gradients are of order one."""
    generator = torch.Generator().manual_seed(len(shape))
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    weights.view(-1)[::2] *= -1  # both signs: a kernel that takes |g| is wrong
    return weights * (height * width)


def _errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Absolute differences; 0 where both are the same NaN or Inf, inf where only one is."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = (actual - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(same, 0.0, error)


def _assert_no_worse(
    error: Tensor, bound: Tensor, actual: Tensor, expected: Tensor, what: str
) -> None:
    excess = (error - bound).flatten()
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {error.numel()} elements differ, worst at "
            f"{place}: {actual.flatten()[worst]:.9g}, expected {expected.flatten()[worst]:.9g}, "
            f"allowed {bound.expand_as(error).flatten()[worst]:.3g}"
        )


def _double(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)
