"""Folds and labelled subsets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salkernels.training.data.nifti import DataError
from salkernels.training.data.splits import kfold, labelled_subset


def subjects(count):
    return [f"patient{i:03d}" for i in range(1, count + 1)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 60), k=st.integers(2, 10), seed=st.integers(0, 5), order=st.randoms())
def test_folds(count, k, seed, order):
    names = subjects(count)
    if k > count:
        with pytest.raises(DataError, match=f"expected 2 to {count}"):
            kfold(names, k, seed)
        return
    folds = kfold(names, k, seed)
    assert sorted(s for fold in folds for s in fold.test) == names
    for fold in folds:
        assert sorted(fold.train + fold.test) == names
        assert list(fold.train) == sorted(fold.train)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    shuffled = names * 2  # two scans per subject
    order.shuffle(shuffled)
    assert kfold(shuffled, k, seed) == folds


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 80), fold=st.integers(0, 4), data=st.data())
def test_subsets_are_nested(count, fold, data):
    names = subjects(count)
    large = data.draw(st.integers(1, count))
    small = data.draw(st.integers(1, large))
    chosen = labelled_subset(names, large, fold)
    assert len(set(chosen)) == large
    assert set(chosen) <= set(names)
    assert set(labelled_subset(list(reversed(names)), small, fold)) <= set(chosen)


def test_seeds_and_folds_matter():
    names = subjects(80)
    assert kfold(names, 5, 0) != kfold(names, 5, 1)
    assert labelled_subset(names, 6, 0) != labelled_subset(names, 6, 1)
    assert labelled_subset(names, 6, 0, 0) != labelled_subset(names, 6, 0, 1)


def test_the_draws_are_not_the_folds_in_disguise():
    """Test sets come from another order: else the labelled would always be the first remainder."""
    names = subjects(40)
    drawn = labelled_subset(names, 8, 0)
    assert all(set(drawn) != set(fold.test) for fold in kfold(names))


def test_splits_never_change():
    """Published numbers depend on them: a change here must be deliberate."""
    assert kfold(subjects(10))[0].test == ("patient006", "patient009")
    assert labelled_subset(subjects(10), 2, 0) == ("patient004", "patient005")


@pytest.mark.parametrize("k", [-1, 0, 1, 11])
def test_bad_k(k):
    with pytest.raises(DataError, match="expected 2 to 10"):
        kfold(subjects(10), k)


@pytest.mark.parametrize("m", [-1, 0, 11])
def test_bad_m(m):
    with pytest.raises(DataError, match="expected 1 to 10"):
        labelled_subset(subjects(10), m, 0)
