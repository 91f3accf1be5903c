"""The reference cuts its work to a budget: the cut changes no value, and the memory keeps to it."""

from __future__ import annotations

import pytest
import torch
from cases import F64, MASKS
from compare import assert_gradient, assert_values, tolerance_for
from torch.utils._python_dispatch import TorchDispatchMode

import salkernels
import salkernels.reference as reference


def both_forms(window, mask):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 4, 5, dtype=F64, generator=generator).requires_grad_()
    by_pair = salkernels.wla_set_loss(
        features, MASKS[mask](4), window, reduction="none", backend="reference"
    )
    pairwise = salkernels.wla_loss(
        features, features.roll(1, 0), window, reduction="none", backend="reference"
    )
    grads = [torch.autograd.grad(20 * out.sum(), features)[0] for out in (by_pair, pairwise)]
    found = salkernels.align(features, features.roll(1, 0), window, backend="reference")
    return by_pair, pairwise, grads, found


@pytest.mark.parametrize(("budget", "mask"), [(1, "holes"), (7, "others"), (64, "holes")])
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 4), (4, 5)])
def test_the_budget_changes_nothing(budget, window, mask, monkeypatch):
    expected = both_forms(window, mask)
    monkeypatch.setattr(reference, "GRAM_BUDGET", budget)
    actual = both_forms(window, mask)
    for name, a, b in zip(("set", "pairwise"), actual[:2], expected[:2], strict=True):
        assert_values(a, b, 1e-14, name)
    for name, a, b in zip(("set", "pairwise"), actual[2], expected[2], strict=True):
        assert_gradient(a, b, tolerance_for(F64), name)
    assert_values(actual[3][0], expected[3][0], 1e-14, "max_sim")
    assert torch.equal(actual[3][1], expected[3][1])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives back, in elements of its storage."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return out


@pytest.mark.parametrize("window", [(2, 2), (5, 7), (12, 12)])
@pytest.mark.parametrize("samples", [2, 8])
@pytest.mark.parametrize("form", ["set", "pairwise"])
def test_no_tensor_is_larger_than_pairs_pixels_or_the_budget(form, samples, window, monkeypatch):
    """O(pairs · H · W) and one budget; never (H · W)², however large the window."""
    budget, pixels = 8000, 12 * 12
    monkeypatch.setattr(reference, "GRAM_BUDGET", budget)
    features = torch.randn(1, samples, 4, 12, 12)
    pairs = MASKS["others"](samples).reshape(-1).nonzero().squeeze(1)
    args = features, None, pairs, None
    count = len(pairs)
    if form == "pairwise":
        features, count = features.transpose(0, 1), samples
        args = features, features.flip(0), None, None
    with Largest() as largest:
        found = reference.match(*args, window, 1e-12)
        reference.match_backward(found.max_sim, *args, *found[1:], window, 1e-12)
    assert largest.elements >= count * pixels, "the mode saw nothing"
    one_row = samples * window[0] * window[1]  # a query pixel and its keys: the least there is
    assert largest.elements <= max(budget, count * pixels, features.numel(), one_row)
    assert largest.elements < pixels * pixels


def test_what_is_kept_for_backward_is_a_few_bytes_per_pair_and_pixel():
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    features = torch.randn(4, 8, 6, 6).requires_grad_()
    pairs = MASKS["one"](4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        salkernels.wla_set_loss(features, pairs, 3, reduction="none", backend="reference")
    planes = [t for t in kept if t.shape[-2:] == (6, 6) and t.dim() == 3]
    assert sorted(t.dtype.itemsize for t in planes) == [1, 4]  # argmax and max_sim
    assert all(len(t) == 1 for t in planes), "room for one pair only"
    assert not any(t.numel() > features.numel() for t in kept)
