"""The benchmark of loading and augmentation, on a phantom."""

from __future__ import annotations

import csv

import pytest

from benchmarks.loading import WORKERS, _rates, measure_loading
from benchmarks.measure import Settings


def test_every_way_to_load_is_measured(phantom, cache_folder, tmp_path):
    settings = Settings("cpu", 1, 0, 1, True)
    table = measure_loading("here", settings, tmp_path, "phantom", phantom, cache_folder)
    rows = list(csv.DictReader((tmp_path / "here-loading.csv").open()))
    assert len(rows) == 2 * len(WORKERS)
    for row in rows:
        assert row["batch"] == "32"  # two views of 16 slices
        assert float(row["samples_per_s"]) > 0
        assert row["samples_per_s"] in table


def test_rates_are_of_all_batches_together():
    rates = _rates(10, [1.0, 1.0, 2.0])
    assert float(rates["samples_per_s"]) == pytest.approx(7.5)
    assert float(rates["p80"]) == pytest.approx(10)


def test_unknown_presets_are_named(phantom, tmp_path):
    settings = Settings("cpu", 1, 0, 1, True)
    with pytest.raises(
        ValueError, match="unknown preset 'dsek'; expected one of phantom, mini, desk"
    ):
        measure_loading("here", settings, tmp_path, "dsek", phantom)
