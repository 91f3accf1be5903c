"""Which tests run on which machine: none is lost where there is a GPU, none is skipped without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from targets import DEVICES_OF, NO_GPU, LeftOut, Machine, Target

from salkernels.backends import BACKENDS, triton

HERE = Path(__file__).resolve().parent
LAPTOP = Machine(gpu=False, interpreted=True, missing={"cuda": NO_GPU})
SERVER = Machine(gpu=True, interpreted=False)
BARE = Machine(gpu=False, interpreted=True, missing={"cuda": "not built", "cpu": "no compiler"})
MACHINES = {"laptop": LAPTOP, "server": SERVER, "bare": BARE}
# Those that test every backend; the whole suite would take a minute to collect.
FILES = ["test_parity.py", "test_gradients.py", "test_edges.py", "test_library.py", "test_ties.py"]
OWN = ["cuda/test_on_gpu.py", "test_cuda_backend.py", "fuzz/test_fuzz.py"]  # of one backend each
COLLECT = """
import json, re, sys
sys.path.insert(0, {folder!r})
import pytest, targets

class Report:
    def pytest_collection_finish(self, session):
        self.rows = []
        for item in session.items:
            target, call = targets.Target.of(item), getattr(item, "callspec", None)
            params = dict(call.params) if call else {{}}
            shared = [params.pop(name, None) is not None for name in ("backend", "device")]
            others = re.sub(" at 0x[0-9a-f]+", "", str(params))
            about = [target.backend, target.device, str(target.dtype)]
            about += [target.slow_in_the_interpreter, all(shared)]
            self.rows.append([item.path.name, item.originalname, others, *about])

for name, about in {machines!r}.items():
    targets.here = lambda: targets.Machine(**about)
    report = Report()
    pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *{files!r}], plugins=[report])
    print("\\n" + json.dumps([name, report.rows]), flush=True)
"""


@pytest.fixture(scope="module")
def collected() -> tuple[dict[str, list[list]], list[str]]:
    """What a pytest of its own selects on each of the machines, and what it prints."""
    code = COLLECT.format(
        folder=str(HERE),
        machines={name: vars(machine) for name, machine in MACHINES.items()},
        files=[str(HERE / name) for name in (*FILES, *OWN)],
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    lines = done.stdout.splitlines()
    rows = dict(json.loads(line) for line in lines if line.startswith('["'))
    return rows, [line for line in lines if not line.startswith('["')]


@pytest.fixture(scope="module")
def rows(collected):
    return collected[0]


def count(rows: list[list]) -> Counter[tuple]:
    """By file, test and parameters other than the target; functions in those look alike."""
    return Counter(tuple(row[:3]) for row in rows)


def on(rows: list[list], backend: str, device: str) -> Counter[tuple]:
    """The tests with both fixtures that were selected for a target."""
    return count([row for row in rows if row[3:5] == [backend, device] and row[7]])


def test_a_gpu_gets_every_test_that_a_cpu_gets(rows):
    laptop, server = rows["laptop"], rows["server"]
    everything = on(laptop, "reference", "cpu")
    assert {file for file, *_ in everything} == set(FILES)
    assert everything.total() > 300
    fp64 = count([row for row in laptop if row[3:6] == ["reference", "cpu", "torch.float64"]])
    slow = count([row for row in laptop if row[3:5] == ["reference", "cpu"] and row[6]])
    assert fp64.total() > 30
    assert slow.total() < 80
    for device in ("cpu", "cuda"):
        assert on(server, "reference", device) == everything
    assert on(laptop, "cpu", "cpu") == on(server, "cpu", "cpu") == everything
    assert on(server, "cuda", "cuda") == everything
    assert on(server, "triton", "cuda") == everything - fp64
    assert on(laptop, "triton", "cpu") == everything - (fp64 | slow)


@pytest.mark.parametrize("machine", ["laptop", "bare"])
def test_without_a_gpu_nothing_of_one_is_selected(machine, rows):
    assert not any(row[3] == "cuda" or row[4] == "cuda" for row in rows[machine])
    assert (on(rows[machine], "cpu", "cpu") == Counter()) == (machine == "bare")


def test_a_gpu_runs_the_tests_that_are_its_own(rows):
    own = {Path(name).name for name in OWN}
    for file in own:
        assert any(row[0] == file and row[3] == "cuda" for row in rows["server"])
    assert sum(row[0] == "test_on_gpu.py" and row[3] == "cuda" for row in rows["server"]) > 180


def test_what_is_missing_is_told_once_on_each_machine(collected):
    _, printed = collected
    without_gpu = [line for line in printed if line.startswith(f"{NO_GPU}: ")]
    assert len(without_gpu) == 2, "of the laptop and the bare machine"
    for what in ("cuda", "reference on cuda", "triton on cuda"):
        assert all(f" of {what}" in line for line in without_gpu)
    assert sum(line.startswith("no compiler: ") for line in printed) == 1
    assert sum("Triton is not in interpreter mode" in line for line in printed) == 1


@pytest.mark.parametrize(
    ("name", "place", "reason"),
    [
        ("cuda", "cuda", NO_GPU),
        (None, "cuda", NO_GPU),
        ("reference", "cuda", NO_GPU),
        ("triton", "cuda", NO_GPU),
        ("triton", "cpu", None),
        ("cpu", "cpu", "no compiler"),
        ("cuda", None, "not built"),
        ("triton", None, None),
        (None, None, None),
    ],
)
def test_reasons(name, place, reason):
    assert BARE.obstacle(name, place) == reason
    if (name, place) != ("triton", "cpu"):
        assert SERVER.obstacle(name, place) is None


def test_triton_is_either_compiled_or_interpreted():
    assert "interpreter" in SERVER.obstacle("triton", "cpu")
    both = Machine(gpu=True, interpreted=True)
    assert "interpreter" in both.obstacle("triton", "cuda")
    assert both.obstacle("triton", "cpu") is None


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_of_targets_is_what_the_backends_say_of_themselves(name):
    """Both are written by hand: a device or dtype that is added is added to the tests, too."""
    assert list(BACKENDS) == list(DEVICES_OF)
    module = BACKENDS[name]
    devices = getattr(module, "DEVICES", DEVICES_OF[name])
    assert set(devices) <= set(DEVICES_OF[name])
    if name == "triton":
        assert set(DEVICES_OF[name]) - set(devices) == {"cpu"}, "by name, in the interpreter"
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        target = Target(name, DEVICES_OF[name][0], dtype, False)
        assert target.exists() == (dtype in getattr(module, "DTYPES", [dtype]))
    assert torch.float64 not in triton.DTYPES


def test_counts_are_by_reason_and_target():
    left_out = LeftOut()
    for reason, what in [("no GPU", "cuda"), ("no GPU", "cuda"), ("no GPU", "triton"), ("x", "y")]:
        left_out.add(reason, what)
    assert left_out.lines() == [
        "no GPU: 3 tests (2 of cuda, 1 of triton)",
        "x: 1 tests (1 of y)",
    ]
