"""Tuning of Triton's tiles without a GPU: what is compiled and timed, and which tile is kept."""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from salkernels.triton_kernels import tune
from salkernels.triton_kernels.config import Tile

F32 = torch.float32


def tuned(kernel, chosen, **milliseconds):
    tiles = {"a": Tile(64, 16, 4, 1), "b": Tile(64, 32, 4, 1), "c": Tile(32, 16, 4, 1)}
    times = {tiles[name]: tune.Time(ms, 0.0) for name, ms in milliseconds.items()}
    subject = tune.Subject(kernel, kernel, F32, None)
    return tune.Tuned(subject, tiles["a"], tiles[chosen], times, 0)


def test_one_tile_for_all_shapes_of_a_kernel():
    """The least slow-down over all, each against the table's: not the winner of the longest."""
    small = tuned("match", "b", a=1.0, b=0.5, c=0.9)
    large = tuned("match", "c", a=100.0, b=110.0, c=90.0)
    alone = tuned("sum", "c", a=1.0, c=0.5)
    found = tune.settled([small, large, alone], 90)
    assert found == {
        ("match", F32, 90): Tile(64, 32, 4, 1),
        ("sum", F32, 90): Tile(32, 16, 4, 1),
    }


class Compilers:
    """In place of the processes: what the test says becomes of each job."""

    outcomes: dict = {}  # noqa: RUF012
    restarts = 0

    def __init__(self, capability, workers):
        assert capability == 90

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def restart(self):
        type(self).restarts += 1
        self.outcomes.clear()

    def submit(self, work):
        futures = []
        for one in work:
            future = Future()
            outcome = self.outcomes.get(one.tiles[0], 3)
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            elif outcome is not None:
                future.set_result(outcome)
            futures.append(future)
        return futures


def test_tuning_times_what_was_compiled(monkeypatch):
    """Not what does not compile or is late; the table's tile in any case."""
    make = partial(tune.arguments, F32, 4, 8, 4, 2)
    subject = tune.Subject("match", "match", F32, make)
    first, broken, late, *rest = subject.candidates()
    key = ("match", F32, 9)
    fake = type("Fake", (Compilers,), {})
    fake.outcomes = {(key, first): None, (key, broken): ValueError("no"), (key, late): None}
    monkeypatch.setattr(tune, "Compilers", fake)
    monkeypatch.setattr(tune, "call_of", lambda subject, device: subject)
    monkeypatch.setattr(tune, "milliseconds", lambda call, best_so_far: tune.Time(1.0, 0.1))
    (found,) = tune.tuned([subject], 90, patience=0.0)
    assert list(found.times) == [first, *rest]
    assert found.chosen == first
    assert found.missing == 2
    assert "2 were not compiled in time" in tune.table(found)
    assert fake.restarts == 0


def test_a_compiler_that_crashes_costs_one_kernel(monkeypatch, capsys):
    """All processes of a pool end with it: what comes later is compiled by new ones."""
    make = partial(tune.arguments, F32, 4, 8, 4, 2)
    subjects = [tune.Subject(name, name, F32, make) for name in ("match", "gradient")]
    fake = type("Fake", (Compilers,), {})
    fake.outcomes = {
        ((one.kernel, F32, 9), tile): BrokenProcessPool("it crashed")
        for one in subjects
        for tile in one.candidates()
    }
    monkeypatch.setattr(tune, "Compilers", fake)
    monkeypatch.setattr(tune, "call_of", lambda subject, device: subject)
    monkeypatch.setattr(tune, "milliseconds", lambda call, best_so_far: tune.Time(1.0, 0.1))
    first, second = tune.tuned(subjects, 90, patience=0.0)
    assert len(first.times) == 1
    assert len(second.times) == tune.MOST
    assert fake.restarts == 1
    assert "does not compile: it crashed" in capsys.readouterr().err


def test_subjects_are_the_kernels_that_a_window_takes():
    def kernels(window, samples=32):
        options = Namespace(samples=samples, channels=8, size=44, window=window, dtypes=["float32"])
        return [subject.kernel for subject in tune.subjects_of(options)]

    assert kernels(2) == ["match", "gradient", "gradient_across"]
    assert kernels(2, samples=16) == ["match", "gradient"]
    assert kernels(3) == ["match", "sum"]
    assert kernels(22) == ["stream_match", "sum"]
