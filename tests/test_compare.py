"""The helpers themselves: a comparison that cannot fail proves nothing."""

from __future__ import annotations

import pytest
import torch
from compare import assert_gradient, assert_values, clear_pixels, upstream, vector_errors
from tolerances import TOLERANCES

TIGHT = TOLERANCES[torch.float64]


def test_values_pass_within_the_bound():
    assert_values(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-7]), 1e-6)
    assert_values(torch.empty(0, 3), torch.empty(0, 3), 0.0)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, 2.1], [1.0, 2.0]),
        ([1.0, torch.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, torch.nan]),
        ([1.0, torch.inf], [1.0, -torch.inf]),
        ([1.0, torch.inf], [1.0, 2.0]),
    ],
)
def test_values_name_the_worst_element(actual, expected):
    with pytest.raises(AssertionError, match=r"loss: 1 of 2 elements differ, worst at \(1,\)"):
        assert_values(torch.tensor(actual), torch.tensor(expected), 1e-3, "loss")


def test_values_accept_the_same_nan_and_inf():
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert_values(odd, odd.clone(), 0.0)


def test_shapes_must_be_equal():
    with pytest.raises(AssertionError, match="shape"):
        assert_values(torch.zeros(2), torch.zeros(1, 2), 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_gradient(torch.zeros(2), torch.zeros(1, 2), TIGHT)


def test_gradient_is_compared_as_a_vector_too():
    torch.manual_seed(0)
    expected = torch.randn(1000, dtype=torch.float64)
    # Each element is inside a bound of 1e-9 of its size, yet all lean to one side.
    leaning = expected + 1e-9 * expected.abs()
    assert_gradient(expected.clone(), expected, TIGHT)
    with pytest.raises(AssertionError, match=r"relative L2|bias"):
        assert_gradient(leaning, expected, TIGHT)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.01])
def test_gradient_of_wrong_size_or_sign_fails(factor):
    expected = torch.linspace(-1, 1, 50, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_gradient(factor * expected, expected, TIGHT)


def test_gradient_expected_to_vanish_must_vanish():
    zero = torch.zeros(5)
    assert_gradient(zero, zero, TIGHT)
    with pytest.raises(AssertionError):
        assert_gradient(zero + 1e-6, zero, TIGHT)
    with pytest.raises(AssertionError):
        assert_gradient(zero + torch.nan, zero, TIGHT)


def test_vector_errors_of_known_vectors():
    relative, cosine, bias = vector_errors(torch.tensor([0.0, 2.0]), torch.tensor([2.0, 0.0]))
    assert relative == pytest.approx(2**0.5)
    assert cosine == pytest.approx(1)
    assert bias == pytest.approx(0)
    assert vector_errors(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0, 0.0)


def test_clear_pixels_leaves_out_whole_windows_and_few():
    margin = torch.ones(1, 20, 20)
    margin[0, 3, 2] = 1e-9
    clear = clear_pixels(margin, (2, 2), 1e-5)
    assert (~clear).nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    with pytest.raises(AssertionError, match="too close"):
        clear_pixels(torch.zeros(1, 4, 4), (2, 2), 1e-5)


def test_upstream_has_both_signs_and_is_not_one():
    weights = upstream(torch.Size([4]), 3, 5)
    assert (weights < 0).any()
    assert (weights > 0).any()
    assert (weights.abs() >= 7.5).all()


def test_memory_is_poisoned():
    """The fixture in conftest does what it says."""
    assert torch.empty(5).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert (torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
