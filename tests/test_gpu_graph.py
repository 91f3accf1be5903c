"""The step `graph` of scripts/gpu.sh, its captures played on a CPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from salkernels import _kept, _short
from tools.gpu import graph
from tools.gpu.record import Context, read

NAMES = ("mask on cpu", "mask not seen before", "mask changed later")


class PlayedGraphs:
    """What is computed in a capture is what each replay gives again."""

    def __init__(self):
        self.capturing, self.last = False, None

    @contextmanager
    def graph(self, _):
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def capture(self, run):
        run()
        with self.graph(None):
            run()
        place, computed = self.last, self.last.clone()
        return lambda: place.copy_(computed)


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """Runs the checks of graphs; gives the rows that they wrote."""
    played, gradient = PlayedGraphs(), graph._Checks.gradient

    def remembered(self, pairs):
        played.last = gradient(self, pairs)
        return played.last

    monkeypatch.setattr(graph._Checks, "gradient", remembered)
    monkeypatch.setattr(graph, "cuda_queue", lambda: played)
    monkeypatch.setattr(torch.cuda, "graph", played.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: played.capturing)
    monkeypatch.setattr(_kept, "RECENT", _kept.Recent(most=4))
    monkeypatch.setattr(graph, "MANY", 6)
    monkeypatch.setattr(Context, "backends", ["reference"])
    monkeypatch.setattr(_kept, "_has_streams", lambda device: True)
    monkeypatch.setattr(_kept, "stream_of", lambda device: 1)

    def run():
        context = Context("graph", "cpu", tmp_path, 60.0)
        features = torch.randn(8, 4, 2, 2, requires_grad=True)
        pairs = ~torch.eye(8, dtype=torch.bool)
        each = graph._Checks(context, "reference", features, pairs)
        whole = (lambda: each._captured("cpu"), each._unseen, each._changed_later)
        for name, check in zip(NAMES, whole, strict=True):
            with context.measuring(name) as row:
                row["ok"] = check()
        return {row["name"]: row for row in read(tmp_path)}

    return run


def test_captures_are_right(checks):
    assert [row["ok"] for row in checks().values()] == [True] * 3


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("nothing is kept", "mask on cpu"),
        ("no error", "mask not seen before"),
        ("an old list", "mask changed later"),
    ],
)
def test_each_check_bites(checks, monkeypatch, fault, found):
    if fault == "nothing is kept":
        monkeypatch.setattr(_kept.Recent, "put", lambda *_: None)
    elif fault == "no error":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    else:
        monkeypatch.setattr(_kept, "_content", lambda source: b"%d" % source.data_ptr())
        monkeypatch.setattr(_short, "key_of_set", lambda *_: None)  # it reads the content itself
    row = checks()[found]
    assert row.get("ok") is not True
