"""The benchmark of a pre-training step: every loss in the same step, and its share of it."""

from __future__ import annotations

import csv

import pytest

from benchmarks.measure import Settings
from benchmarks.provider import Provider
from benchmarks.providers import gram, providers
from benchmarks.training import EXTRA, QUICK_SHAPE, Step, measure_training
from salkernels import backends

SETTINGS = Settings("cpu", 1, 0, 1, True)


def test_every_loss_is_timed_in_the_step(tmp_path):
    table = measure_training("here", SETTINGS, tmp_path)
    rows = {row["loss"]: row for row in csv.DictReader((tmp_path / "here-training.csv").open())}
    available = {f"salkernels-{status.name}" for status in backends() if status.available}
    assert set(rows) == {*EXTRA, *available}
    for name, row in rows.items():
        assert row["status"] == "ok", row["reason"]
        assert float(row["step_ms"]) > 0  # two rounds do not tell how much more than the other
        assert float(row["alignment_ms"]) > 0
        assert f"| {name} | {row['step_ms']} " in table


def test_a_wrong_loss_gets_no_time(tmp_path, monkeypatch):
    monkeypatch.setitem(providers(), "gram", Provider("gram", lambda p: gram(p) / 2))
    table = measure_training("here", SETTINGS, tmp_path)
    assert "| gram | wrong: first loss" in table


def test_the_method_itself_and_the_encoder_alone():
    """Without a provider the step is the method's own, and with λ = 0 it has no alignment."""
    own = float(Step(None, SETTINGS, 2, QUICK_SHAPE)())
    assert own == pytest.approx(float(Step(providers()["gram"], SETTINGS, 2, QUICK_SHAPE)()))
    alone = float(Step(None, SETTINGS, 2, QUICK_SHAPE, lambda_=0.0)())
    assert alone < own
