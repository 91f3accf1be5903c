"""scripts/gpu.sh: steps that fail or hang stop no other and are told; results become a summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import QUICK
from benchmarks.provider import Provider
from benchmarks.providers import gram, providers
from salkernels import backends, reference
from tools.gpu import __main__ as command
from tools.gpu import checks, conductor, kernels, record, smoke, timing, warm
from tools.gpu.conductor import Conductor, Ending, read_endings
from tools.gpu.inputs import SMOKE, call
from tools.gpu.plan import PLAN, RESERVE, TARGETS, TOTAL, Step, find
from tools.gpu.record import LEFT_OVER, LOST, Context, OutOfTime, read
from tools.gpu.results import take
from tools.gpu.summary import LINES, summary

ROOT = Path(__file__).resolve().parent.parent


def context(folder, step="smoke", seconds=60.0):
    return Context(step, "cpu", folder, seconds)


# ---- The steps, one after the other --------------------------------------------------------------


class Scripted(Conductor):
    """Steps whose work is a line of Python, by name."""

    scripts: dict[str, str] = {}  # noqa: RUF012

    def command(self, step, limit):
        return [sys.executable, "-c", self.scripts[step.name]]


def steps(*names, limit=30.0):
    return [Step(name, "none", limit, name) for name in names]


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    monkeypatch.setattr(conductor, "LEAST", 0.1)
    monkeypatch.setattr(conductor, "RESERVE", 0)
    monkeypatch.setattr(conductor, "GRACE", 2)

    def make(scripts, seconds=60.0):
        found = Scripted(tmp_path, "cuda", seconds)
        found.scripts = scripts
        return found

    return make


def test_what_becomes_of_one_step_stops_no_other(scripted, tmp_path):
    scripts = {
        "good": "print('said by good')",
        "raises": "raise ValueError('said by raises')",
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "partly": f"raise SystemExit({LEFT_OVER})",
        "lost": f"open({str(tmp_path / 'tries')!r}, 'a').write('x'); raise SystemExit({LOST})",
        "last": "print('said by last')",
    }
    found = scripted(scripts).run(steps(*scripts))
    assert {name: ending.status for name, ending in found.items()} == {
        "good": "done",
        "raises": "failed: exit status 1",
        "dies": "failed: killed by SIGSEGV",
        "partly": "left over",
        "lost": "the CUDA context was lost",
        "last": "done",
    }
    assert read_endings(tmp_path) == found
    assert (tmp_path / "tries").read_text() == "x" * conductor.ATTEMPTS
    log = (tmp_path / "log.txt").read_text()
    for text in ("said by good", "ValueError: said by raises", "said by last"):
        assert text in log
    told = summary([], found)
    assert "done: good" in told
    assert "raises: **failed: exit status 1**" in told
    assert "partly: **left over**" in told


def test_a_step_goes_on_behind_what_cost_it_the_device(scripted, tmp_path):
    """In a new process, in which the same input is not tried again."""
    here = context(tmp_path, "time")
    here.emit("bad", failed="RuntimeError: CUDA error: an illegal memory access", lost=True)
    here.emit("other", failed="RuntimeError: no luck")
    assert context(tmp_path, "time").finished == {"bad"}
    mark = str(tmp_path / "tries")
    script = (
        f"import os; first = not os.path.exists({mark!r}); open({mark!r}, 'a').write('x');"
        f"raise SystemExit({LOST} if first else 0)"
    )
    assert scripted({"time": script}).run(steps("time"))["time"].status == "done"
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_step_that_hangs_is_ended_with_all_that_it_started(scripted, tmp_path):
    """Also one that ignores being asked, and a child of it."""
    child = "import time; time.sleep(60)"
    hangs = (
        "import pathlib, signal, subprocess, sys, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(p.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    found = scripted({"hangs": hangs, "next": "pass"}).run(
        [*steps("hangs", limit=3.0), *steps("next")]
    )
    assert time.monotonic() - start < 40
    assert [ending.status for ending in found.values()] == ["out of time", "done"]
    assert found["hangs"].seconds >= 3
    process = int((tmp_path / "pid").read_text())
    assert has_ended(process)


def has_ended(process):
    """Within seconds; one that nobody has asked for its exit status has, too."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_no_step_is_given_more_than_is_left(scripted):
    found = scripted({"slow": "import time; time.sleep(60)", "late": "pass"}, seconds=2.0).run(
        steps("slow", "late")
    )
    assert found["slow"].status == "out of time"
    assert found["slow"].limit <= 2
    assert found["late"] == Ending("late", "no time", 0.0, 0.0)


def test_again_runs_what_is_not_done(scripted, tmp_path):
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    scripts = {
        "good": f"{mark}('good ')",
        "partly": f"{mark}('partly '); raise SystemExit({LEFT_OVER})",
    }
    scripted(scripts).run(steps(*scripts))
    scripts["partly"] = f"{mark}('rest ')"
    found = scripted(scripts).run(steps(*scripts, "good"), again=True)
    assert (tmp_path / "ran").read_text() == "good partly rest "
    assert {ending.status for ending in found.values()} == {"done"}


def test_the_plan_fits_into_eight_minutes_and_names_functions():
    assert TOTAL <= 8 * 60 - 10
    assert RESERVE < TOTAL / 10
    # What is worth most has its full time even if all before it takes its limit.
    assert sum(step.limit for step in PLAN[:5]) <= TOTAL - RESERVE
    assert len({step.name for step in (*PLAN, *TARGETS)}) == len(PLAN) + len(TARGETS)
    for step in (*PLAN, *TARGETS):
        assert callable(step.function())
        assert find(step.name) is step
    with pytest.raises(ValueError, match="no step 'tme'; expected one of report, smoke"):
        find("tme")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_that_runs(tmp_path, number):
    words = [sys.executable, "-m", "tools.gpu", "run", "--seconds", "300", "--device", "cpu"]
    words += ["--steps", "train", "--out", str(tmp_path)]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "train" in run.stdout.readline()
    time.sleep(0.3)  # and the step is started
    run.send_signal(number)
    run.communicate(timeout=120)
    assert run.returncode == 128 + number
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in left


# ---- Lines of JSON -------------------------------------------------------------------------------


def test_a_measurement_that_raises_is_a_row_and_not_the_end(tmp_path):
    here = context(tmp_path)
    with here.measuring("bad", backend="x"):
        raise RuntimeError("no\n  luck")
    with here.measuring("good") as row:
        row["value"] = 1 / 3
    bad, good = read(tmp_path)
    assert bad == {
        "step": "smoke", "name": "bad", "backend": "x", "failed": "RuntimeError: no luck"
    }  # fmt: skip
    assert good["value"] == 0.33333
    assert context(tmp_path).finished == {"good"}
    assert context(tmp_path, "graph").finished == set()


def test_the_latest_row_counts_but_no_failure_replaces_a_result(tmp_path):
    here = context(tmp_path)
    here.emit("a", value=1)
    here.emit("a", value=2)
    here.emit("a", failed="later")
    here.emit("b", failed="first")
    here.emit("b", value=3)
    with (tmp_path / record.RESULTS).open("a") as file:
        file.write('{"step": "smoke", "name": "cut off')
    assert {row["name"]: row.get("value") for row in read(tmp_path)} == {"a": 2, "b": 3}


def test_a_step_out_of_time_says_before_what(tmp_path, capsys, monkeypatch):
    words = ["step", "smoke", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert command.main(words) == LEFT_OVER
    assert f"out of time before {SMOKE[0].key}" in capsys.readouterr().out
    here = context(tmp_path, seconds=0)
    with pytest.raises(OutOfTime), here.measuring("x"):
        here.need(1)
    assert read(tmp_path) == []


# ---- What the steps find -------------------------------------------------------------------------


@pytest.mark.parametrize("form", [SMOKE[0], SMOKE[11], SMOKE[17]], ids=lambda form: form.key)
def test_smoke_bites(form, monkeypatch):
    """A gradient off by 3 %, a loss off by 1e-4: of a backend that is right otherwise."""
    given = call(form, "cpu")
    bounds = smoke.BOUNDS[form.dtype]
    assert smoke.against_definition("reference", given, bounds)["ok"]

    class Off:
        match = staticmethod(reference.match)

        @staticmethod
        def match_backward(*arguments):
            found = reference.match_backward(*arguments)
            return tuple(None if grad is None else 1.03 * grad for grad in found)

    monkeypatch.setitem(backends.BACKENDS, "off", Off)
    assert not smoke.against_definition("off", given, bounds)["ok"]

    class Biased(Off):
        match_backward = staticmethod(reference.match_backward)

        @staticmethod
        def match(*arguments):
            found = reference.match(*arguments)
            return found._replace(loss=found.loss + 1e-4)

    monkeypatch.setitem(backends.BACKENDS, "off", Biased)
    assert not smoke.against_definition("off", given, bounds)["ok"]


def test_timing_verifies_times_and_tells(tmp_path, monkeypatch):
    """A right provider, one that is wrong, one that raises, one that refuses: the case goes on."""
    raising = Provider("raises", lambda problem: 1 / 0)
    wrong = Provider("salkernels-wrong", lambda problem: gram(problem) / 2)
    for provider in (raising, wrong):
        monkeypatch.setitem(providers(), provider.name, provider)
    absent = Provider("absent", gram, package="no_such_package")
    monkeypatch.setitem(providers(), "absent", absent)
    names = ["gram", "raises", "salkernels-wrong", "salkernels-cuda", "absent"]
    monkeypatch.setattr(timing, "groups", lambda *_: [(QUICK, names)])
    here = context(tmp_path, "time")
    timing.time(here)
    found = {row.get("provider"): row for row in read(tmp_path)}
    assert found["gram"]["ok"]
    passes = {line["pass"]: line for line in found["gram"]["rows"]}
    assert set(passes) == {"forward", "backward", "both"}
    assert float(passes["both"]["median_ms"]) > 0
    assert "ZeroDivisionError" in found["raises"]["failed"]
    assert found["salkernels-wrong"]["ok"] is False
    assert found["absent"]["absent"] == "no_such_package is not installed"  # and is not wrong
    if torch.cuda.is_available():
        assert found["salkernels-cuda"]["ok"]
    else:
        assert "failed" in found["salkernels-cuda"]
    text = command.tell(tmp_path)
    assert "BAD time, S8-C16-8x8-w2-float32-channels_last raises: ZeroDivisionError" in text
    assert "absent" not in text
    assert "salkernels-wrong: relative error of the loss 5.0e-01" in text
    assert "| gram |" in (tmp_path / "timings.md").read_text()

    timing.time(context(tmp_path, "time"))  # again: only what has failed
    lines = (tmp_path / record.RESULTS).read_text().splitlines()
    assert sum('"gram"' in line and '"rows"' in line for line in lines) == 1
    assert sum("ZeroDivisionError" in line for line in lines) == 2


def test_a_check_that_is_cut_short_tells_what_it_has_found(tmp_path, monkeypatch):
    """pytest, interrupted, names what has failed so far; the rest is left over."""
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import time\ndef test_a(): assert 0, 'of a'\n"
        "def test_b(): open('reached', 'w'); time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "GRACE", 200)
    one = checks.Check("tests of cuda", words, tmp_path / "log", {})
    monkeypatch.setattr(checks, "planned", lambda context: [one])
    here = context(tmp_path, "checks")
    monkeypatch.setattr(
        Context, "left", property(lambda self: 1e4 * (not (tmp_path / "reached").exists()))
    )
    with pytest.raises(OutOfTime, match="tests of cuda"):
        checks.checks(here)
    found = {row["name"]: row for row in read(tmp_path)}
    row = found["tests of cuda, cut short"]
    assert row["ok"] is False
    assert "test_it.py::test_a" in row["failures"][0]
    assert "tests of cuda" not in found  # nor finished


@pytest.mark.parametrize(
    ("name", "code", "text", "expected"),
    [
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", {"ok": True, "findings": 0}),
        ("memcheck", 9, "========= ERROR SUMMARY: 12 errors", {"ok": False, "findings": 12}),
        ("memcheck", 1, "========= ERROR SUMMARY: 0 errors", {"ok": False, "findings": 0}),
        (
            "racecheck",
            9,
            "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)",
            {"ok": False, "findings": 2},
        ),
    ],
)
def test_verdict_of_a_sanitizer(name, code, text, expected):
    assert checks.verdict(name, code, text) == expected


def test_a_sanitizer_that_did_not_run_is_no_success():
    with pytest.raises(RuntimeError, match="no summary; its last line: Device not supported"):
        checks.verdict("memcheck", 0, "========= COMPUTE-SANITIZER\nDevice not supported\n")


@pytest.mark.parametrize(
    ("code", "text", "ok"),
    [
        (0, "....\n12 passed, 3 skipped in 4.0s", True),
        (0, "========== 12 passed in 4.0s ==========", True),
        (1, "FAILED tests/a.py::b - assert 1\n1 failed, 12 passed in 4.0s", False),
        (0, "12 skipped in 4.0s", False),  # nothing ran at all
        (5, "12 deselected, 0 passed in 4.0s", False),
    ],
)
def test_verdict_of_tests(code, text, ok):
    found = checks.verdict("tests of cuda", code, text)
    assert found["ok"] is ok
    assert found["failures"] == (["tests/a.py::b - assert 1"] if code == 1 else [])


@pytest.mark.slow
def test_the_tests_for_a_gpu_exist():
    """Selections go by the names of tests, [backend-device...]; all backends are named alike."""
    for files, expression in checks.SUITES.values():
        assert all((ROOT / name).is_file() for name in files)
        assert "cuda-cuda" in expression or "triton-cuda" in expression
    words = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_determinism.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "[reference-cpu" in done.stdout, done.stdout[-500:]


DETAILS = """==PROF== Connected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","salkernels_match_f32(Problem)","Speed Of Light","Duration","us","40.1"
"0","7","salkernels_match_f32(Problem)","Speed Of Light","DRAM Throughput","%","71.5"
"0","7","salkernels_match_f32(Problem)","Occupancy","Something Else","%","1"
"1","7","gradient_kernel","Speed Of Light","Duration","us","80.2"
"""


def test_details_of_ncu():
    assert kernels.read_details(DETAILS) == [
        {"kernel": "salkernels_match_f32", "duration": "40.1 us", "dram": "71.5 %"},
        {"kernel": "gradient_kernel", "duration": "80.2 us"},
    ]
    assert kernels.read_details("==ERROR== no access\n") == []


# ---- The summary ---------------------------------------------------------------------------------


MACHINE = {
    "step": "report", "name": "machine", "processor": "NVIDIA H100", "commit": "abc",
    "date": "today", "python": "3.12", "torch": "2.11.0",
    "versions": "salkernels 0.1.0; triton 3.6.0",
    "backends": {"cuda": "available", "triton": "available"},
    "gpu": {"driver_version": "580", "clocks.sm": "1980 MHz", "clocks.max.sm": "1980 MHz"},
}  # fmt: skip


def timed(provider, case=QUICK.key, **milliseconds):
    rows = [
        {
            "case": case, "suite": "gpu", "provider": provider, "pass": what, "status": "ok",
            "median_ms": str(ms), "p20_ms": str(ms), "p80_ms": str(ms), "times_floor": "1.5",
            "host_us": "30", "graph_ms": "0.1", "queued": "yes", "features_mb": "2",
        }
        for what, ms in milliseconds.items()
    ]  # fmt: skip
    return {"step": "time", "name": f"{case} {provider}", "provider": provider, "rows": rows,
            "ok": True}  # fmt: skip


def test_the_order_is_that_of_each_pass():
    """Backends change places between the passes: numbers, not letters, decide."""
    rows = [
        MACHINE,
        timed("gram", forward=100, backward=300, both=400),
        timed("salkernels-triton", forward=9.5, backward=70, both=79.5),
        timed("salkernels-cuda", forward=10, backward=20, both=30),
    ]
    text = summary(rows, {"time": Ending("time", "done", 3.0, 60.0)})
    assert "forward: triton 9.5 < cuda 10 < gram 100; backward: cuda 20 < triton 70 <" in text
    assert "both: cuda 30 (1.5 ×, host 30, graph 0.1) < triton 79.5" in text
    assert text.startswith("# NVIDIA H100, 1980 MHz of 1980 MHz, driver 580\n")
    assert "torch 2.11.0; salkernels 0.1.0; triton 3.6.0" in text
    assert "BAD" not in text


def test_the_summary_has_sixty_lines_whatever_there_is():
    many = [
        timed("salkernels-cuda", replace(QUICK, window=w).key, forward=1, backward=2, both=3)
        for w in range(1, 60)
    ]
    bad = [
        {"step": "smoke", "name": f"form {i}", "failed": "RuntimeError: x" * 60} for i in range(99)
    ]
    steps_train = [
        {"step": "train", "name": f"{p} {n}", "preset": p, "loss": n, "step_ms": 12.5}
        for p in ("acdc", "chd")
        for n in ("none", "cuda")
    ]
    near = [
        {
            "step": "numerics", "name": str(noise), "backend": "cuda", "dtype": "float32",
            "loss_relative": noise, "loss": 1e-3, "bias": 0.0,
        }
        for noise in (1e-5, 1e-2, 1e-4)
    ]  # fmt: skip
    per_kernel = [
        {"step": "kernels", "name": "x", "us": {"salkernels_match": 12.0, "fill": 1.0}},
        {"step": "kernels", "name": "y", "failed": "RuntimeError: y"},
    ]
    endings = {name: Ending(name, "no time", 0.0, 0.0) for name in ("graph", "ddp")}
    text = summary([MACHINE, *many, *bad, *steps_train, *near, *per_kernel], endings)
    lines = text.splitlines()
    assert 40 <= len(lines) <= LINES
    assert "smoke 0 of 99" in text
    assert "88 more are bad" in text
    assert "46 more shapes in timings.md" in text
    assert "- acdc: none 12.5, cuda 12.5" in text
    assert "cuda float32 1.0e-02 (loss 1.0e-03" in text
    assert "salkernels_match 12, fill 1" in text
    assert "not done: graph: **no time**, ddp: **no time**" in text
    assert max(map(len, lines)) < 400


def test_a_run_with_anything_wrong_is_no_success(scripted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conductor, "Conductor", Scripted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # ours stay as they are
    monkeypatch.setattr(Scripted, "scripts", {"smoke": "pass"})
    words = ["run", "--device", "cpu", "--steps", "smoke", "--out", str(tmp_path)]
    assert command.main(words) == 0
    context(tmp_path).emit("form", ok=False, grad=0.5)
    assert command.main(words) == 1
    assert "BAD smoke, form: grad 0.5" in capsys.readouterr().out
    assert "BAD smoke" in (tmp_path / "summary.md").read_text()


# ---- Into benchmarks/results ---------------------------------------------------------------------


def test_results_are_taken_over(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "gpu-results"
    here = Context("report", "cuda", folder, 60)
    with pytest.raises(ValueError, match="no results that name their machine"):
        take(folder, "h100", home)
    here.emit(**{k: v for k, v in MACHINE.items() if k != "step"})
    row = timed("salkernels-cuda", forward=1, backward=2, both=3)
    Context("time", "cuda", folder, 60).emit(**{k: v for k, v in row.items() if k != "step"})
    command.tell(folder)
    names = {path.name for path in take(folder, "h100", home)}
    assert names == {"h100.csv", "h100.md", "h100-gpu.md", "h100-gpu.json"}
    kept = json.loads((home / "h100-gpu.json").read_text())
    assert [row["step"] for row in kept["rows"]] == ["report", "time"]
    assert "salkernels-cuda" in (home / "h100.md").read_text()
    assert len(list(folder.iterdir())) <= 8  # few enough to be carried away by hand


# ---- Without a GPU -------------------------------------------------------------------------------


def test_what_is_compiled_beforehand_is_what_is_launched():
    jobs = warm.work()
    assert len(jobs) == len(set(jobs))
    cases = {what.key for kind, what in jobs if kind == "pairs"}
    for case, names in timing.groups(True, ["cuda", "triton"]):
        if "salkernels-triton" in names and case.dtype != "float64":
            assert case.key in cases
    scans = next(what for kind, what in jobs if kind == "mask")
    listed, room = warm.arguments("pairs", scans), warm.arguments("mask", scans)
    assert listed.query.shape[:2] == (2, 32)
    assert room.query.shape[:2] == (1, 64)
    assert room.pairs.shape == (64 * 64,)


def test_kernels_that_were_not_compiled_in_time_are_told():
    lines = list(warm.compiled([("form", warm.AROUND)] * 3, 90, seconds=0.0))
    assert lines == [(f"out of time before 3 calls, such as form {warm.AROUND.key}", True)]


@pytest.mark.slow
def test_triton_kernels_are_compiled_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = (
        "from tools.gpu import warm; warm.work = lambda: [('form', warm.AROUND)];"
        "raise SystemExit(warm.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"if __name__ == '__main__':\n    {program}"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert list(tmp_path.rglob("*.cubin")), done.stdout
