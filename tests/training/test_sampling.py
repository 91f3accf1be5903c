"""Batches: who is drawn, and that each is a function of seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from salkernels.training.data.nifti import DataError
from salkernels.training.data.sampling import LabelledSlices, TwoSubjects, batches
from salkernels.training.inputs import open_dataset


@pytest.fixture
def cache(pretrain_config):
    return open_dataset(pretrain_config())


def test_half_the_slices_from_one_scan_of_each_of_two_subjects(cache):
    for step in range(20):
        batch = TwoSubjects(cache, cache.subjects, 8, seed=0)[step]
        assert batch.images.shape == (8, 1, 32, 32)
        assert batch.images.dtype == torch.float32
        assert Counter(batch.volume.tolist()).most_common(1)[0][1] == 4
        assert len({name.split("_")[0] for name in batch.names}) == 2
        for volume, index, depth, image in zip(
            batch.volume, batch.slice_index, batch.num_slices, batch.images, strict=True
        ):
            assert depth == cache.num_slices(int(volume))
            assert torch.equal(image[0], torch.tensor(cache.image(int(volume))[int(index)]))


def test_distinct_slices_while_there_are_enough_then_repeats(cache):
    few = TwoSubjects(cache, cache.subjects, 12, seed=0)[0]  # 6 of 6 slices each
    for volume in set(few.volume.tolist()):
        assert few.slice_index[few.volume == volume].unique().numel() == 6
    many = TwoSubjects(cache, cache.subjects, 20, seed=0)[0]  # 10 of 6
    assert many.images.shape[0] == 20


def test_a_batch_depends_on_seed_and_step_alone(cache):
    data = TwoSubjects(cache, cache.subjects, 8, seed=3)
    straight = [b.names for b in batches(data, 0, 6, workers=0)]
    assert [b.names for b in batches(data, 4, 6, workers=0)] == straight[4:]
    assert [b.names for b in batches(data, 0, 6, workers=2)] == straight
    assert [b.names for b in batches(TwoSubjects(cache, cache.subjects, 8, 4), 0, 6, 0)] != straight


def test_all_subjects_and_frames_are_drawn(cache):
    data = TwoSubjects(cache, cache.subjects, 4, seed=0)
    seen = {name for step in range(120) for name in data[step].names}
    assert seen == {volume.name for volume in cache.volumes}


def test_labelled_slices_come_once_per_epoch(cache):
    subjects = cache.subjects[:2]
    data = LabelledSlices(cache, subjects, batch_size=5, seed=0)
    total = sum(cache.num_slices(v) for s in subjects for v in cache.of_subject(s))
    drawn: list[tuple[int, int]] = []
    for step in range(-(-2 * total // 5)):
        batch = data[step]
        drawn += zip(batch.volume.tolist(), batch.slice_index.tolist(), strict=True)
    assert len(set(drawn[:total])) == total
    assert len(set(drawn[total : 2 * total])) == total
    assert drawn[:total] != drawn[total : 2 * total]


def test_description_names_scans_and_slices(cache):
    text = TwoSubjects(cache, cache.subjects, 4, seed=0)[0].describe()
    assert text.count("patient") == 2
    assert "_frame" in text
    assert "[" in text


def test_too_little_to_draw_from(cache):
    with pytest.raises(DataError, match="two subjects"):
        TwoSubjects(cache, cache.subjects[:1], 8, 0)
    with pytest.raises(ValueError, match="even"):
        TwoSubjects(cache, cache.subjects, 7, 0)
    with pytest.raises(ValueError, match="batch_size"):
        LabelledSlices(cache, cache.subjects, 0, 0)
