"""Files that are whole or not there, checkpoints that survive, signals that are heard."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch

from salkernels._shared.files import write_atomically
from salkernels.training.checkpoint import (
    LAST,
    PREVIOUS,
    load_checkpoint,
    save_checkpoint,
    stop_on_signal,
)
from salkernels.training.errors import RunError


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def half(file):
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_last_and_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "x": torch.full((3,), step)})
    assert load_checkpoint(tmp_path)["step"] == 3
    last = tmp_path / LAST
    last.write_bytes(last.read_bytes()[:50])  # cut short
    state = load_checkpoint(tmp_path)
    assert state["step"] == 2
    assert torch.equal(state["x"], torch.full((3,), 2))


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refused)
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 1
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_full_disk_says_so_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"step": 1})

    def full(state, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"No space left.*is intact.*--resume"):
        save_checkpoint(tmp_path, {"step": 2})
    assert load_checkpoint(tmp_path)["step"] == 1


def test_nothing_to_resume_and_nothing_readable(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"step": 1})
    (tmp_path / LAST).write_bytes(b"garbage")
    assert not (tmp_path / PREVIOUS).exists()
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (tmp_path / LAST).parent.mkdir()
    torch.save({"step": Evil()}, tmp_path / LAST)
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def python_handles_ctrl_c():
    """As in a terminal; a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_signals_are_requests_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert stop.signal is None
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second acts at once
    assert signal.getsignal(signal.SIGINT) is before
