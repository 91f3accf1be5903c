"""Pairs of the alignment loss and positives of the positional one, against loops over floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import salkernels

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
THRESHOLDS = st.one_of(st.sampled_from([0.0, 0.1, 0.35, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def samples(draw):
    """Scans of their own length, and samples (scan, slice), repeats included: two views."""
    lengths = draw(st.lists(st.integers(1, 100), min_size=1, max_size=4))
    scans = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    return [(scan, draw(st.integers(0, lengths[scan] - 1)), lengths[scan]) for scan in scans]


def columns(rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype).reshape(-1, 3).unbind(1)


@given(rows=samples(), t=THRESHOLDS, dtype=st.sampled_from(INTEGERS))
def test_slice_pairs_by_brute_force(rows, t, dtype):
    expected = [
        [
            i != j and rows[i][0] == rows[j][0] and abs(rows[i][1] - rows[j][1]) < t * rows[i][2]
            for j in range(len(rows))
        ]
        for i in range(len(rows))
    ]
    pairs = salkernels.slice_pairs(*columns(rows, dtype), t)
    assert pairs.dtype == torch.bool
    assert pairs.shape == (len(rows), len(rows))
    assert pairs.tolist() == expected
    assert torch.equal(pairs, pairs.T)


@given(positions=st.lists(st.floats(0, 1), max_size=10), t=THRESHOLDS)
def test_positional_positives_by_brute_force(positions, t):
    count = len(positions)
    expected = [
        [i != j and abs(positions[i] - positions[j]) < t for j in range(count)]
        for i in range(count)
    ]
    given = torch.tensor(positions, dtype=torch.float64)
    positives = salkernels.positional_positives(given, t)
    assert positives.dtype == torch.bool
    assert positives.shape == (count, count)
    # At t itself a distance is decided as if nothing had been rounded: see test_reported.
    clear = ((given[:, None] - given).abs() - t).abs() > min(1e-15, t / 2)
    assert torch.equal(
        positives & clear, torch.tensor(expected, dtype=torch.bool).view(count, count) & clear
    )


def test_two_views_of_a_slice_are_a_pair_and_a_sample_is_not_its_own():
    pairs = salkernels.slice_pairs(*columns([(7, 3, 10), (7, 3, 10)]), 0.1)
    assert pairs.tolist() == [[False, True], [True, False]]


def test_other_scans_are_positives_but_never_pairs():
    rows = [(0, 2, 10), (1, 4, 20)]  # both at one fifth
    assert not salkernels.slice_pairs(*columns(rows), 1.0).any()
    positives = salkernels.positional_positives(torch.tensor([0.2, 0.2]), 0.1)
    assert positives.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("t", [0.0, 0])
def test_threshold_zero_leaves_nothing(t):
    """The inequality is strict: not even two views of one slice."""
    assert not salkernels.slice_pairs(*columns([(0, 3, 10), (0, 3, 10)]), t).any()
    assert not salkernels.positional_positives(torch.tensor([0.3, 0.3]), t).any()


@pytest.mark.parametrize("t", [1.0, 1])
def test_threshold_one_takes_the_whole_scan(t):
    rows = [(0, i, 5) for i in range(5)]
    assert salkernels.slice_pairs(*columns(rows), t).sum() == 20


def test_the_threshold_counts_slices_of_the_scan():
    """t = 0.5 of 10 slices: a distance of 4 is near and 5 is not; of 20 slices 9 is near."""
    rows = [(0, 0, 10), (0, 4, 10), (0, 5, 10), (1, 0, 20), (1, 9, 20), (1, 10, 20)]
    pairs = salkernels.slice_pairs(*columns(rows), 0.5)
    assert pairs[0].tolist() == [False, True, False, False, False, False]
    assert pairs[3].tolist() == [False, False, False, False, True, False]


def test_scan_numbers_need_not_be_small_or_in_order():
    rows = [(2**62, 1, 9), (-5, 1, 9), (2**62, 2, 9)]
    pairs = salkernels.slice_pairs(*columns(rows), 0.3)
    assert pairs.nonzero().tolist() == [[0, 2], [2, 0]]
