"""Kills at file operations: whatever is there then, the run goes on and ends with the same bits."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from salkernels.training import pretrain
from salkernels.training.inputs import open_dataset
from salkernels.training.runlog import read_metrics

EVENTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
KILLED = 9

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def forked(config, kill_at: int = 0) -> int:
    """Runs pre-training in a process of its own; returns its exit status and operations.

    kill_at: number of the operation on files of the run before which the process dies.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        count = 0
        prefix = str(config.out)

        def hook(event, arguments):
            nonlocal count
            if event in EVENTS and any(str(a).startswith(prefix) for a in arguments[:2]):
                count += 1
                if count == kill_at:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        status = 1
        try:
            pretrain.pretrain(config)
            status = 0
        finally:
            os.write(writing, str(count).encode())
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        operations = int(pipe.read() or -1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, KILLED)
    return operations if status == 0 else -1


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_ends_with_the_same_bits(
    pretrain_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "pretraining_figures", lambda *_: None)
    straight = pretrain_config(
        out=tmp_path / "straight", threads=1, checkpoint_every=2, log_every=1, precision="fp32"
    )
    open_dataset(straight)
    operations = forked(straight)
    assert operations > 40
    expected = (straight.out / "encoder.safetensors").read_bytes()
    rows = read_metrics(straight.out)
    for number in range(1, operations + 1):
        out = tmp_path / f"killed{number}"
        config = replace(straight, out=out, resume=True)
        if forked(config, number) < 0:
            forked(config)
        assert (out / "encoder.safetensors").read_bytes() == expected, number
        assert read_metrics(out) == rows, number
        left = [path for path in out.rglob(".*") if path.name != ".lock"]
        assert left == [], number
