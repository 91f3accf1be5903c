"""The steps of scripts/gpu.sh, rehearsed on a CPU: what they find, and what they need compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases import QUICK
from benchmarks.provider import Provider
from benchmarks.providers import gram, providers
from salkernels import backends, reference, reference_contrast
from tools.gpu import __main__ as command
from tools.gpu import checks, host, kernels, negatives, record, smoke, timing, warm
from tools.gpu.inputs import SMOKE, call
from tools.gpu.record import Context, OutOfTime, read

ROOT = Path(__file__).resolve().parent.parent


def context(folder, step="smoke", seconds=60.0):
    return Context(step, "cpu", folder, seconds)


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


def test_the_check_of_negatives_bites(monkeypatch):
    """A log-sum-exp off by 1e-3, a gradient off by 3 %, a term where there is none."""
    form = next(form for form in negatives.FORMS if form.valid is not None)
    given, bounds = call(form, "cpu"), smoke.BOUNDS[form.dtype]
    right = reference_contrast

    def well(lse=right.window_lse, backward=right.window_lse_backward):
        off = SimpleNamespace(window_lse=lse, window_lse_backward=backward)
        monkeypatch.setattr(negatives, "for_negatives", lambda *_: off)
        return negatives.against_definition("off", given, bounds)["ok"]

    assert well()
    assert not well(lse=lambda *a: right.window_lse(*a) * 1.001)
    assert not well(lse=lambda *a: right.window_lse(*a).clamp_min(-100))
    grads = right.window_lse_backward
    assert not well(backward=lambda *a: (grads(*a)[0] * 1.03, grads(*a)[1]))


def test_the_negatives_are_checked_and_timed(tmp_path):
    here = context(tmp_path, "negatives")
    negatives.negatives(here)
    rows = read(tmp_path)
    checked = [row for row in rows if "ok" in row]
    assert len(checked) == len(negatives.FORMS) * len(here.backends)
    assert all(row["ok"] for row in checked)
    assert sum(row.get("backward_ms", 0) > 0 for row in rows) == len(here.backends)
    text = command.tell(tmp_path)
    assert f"negatives {len(checked)} of {len(checked)}" in text
    assert f"- {QUICK.key}: {here.backends[0]} " in text


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


@pytest.mark.parametrize("fails", [True, False])
def test_a_check_that_is_cut_short_tells_what_it_has_found(tmp_path, monkeypatch, fails):
    """Without a summary of pytest, which is killed here: what has failed is named and bad, and what
    has not been reached is left over."""
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"def test_a(): assert not {fails}, 'of a'\n"
        f"def test_b(): open({str(tmp_path / 'reached')!r}, 'w'); time.sleep(60)\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    words += ["-p", checks.PLUGIN, str(tests)]
    monkeypatch.setattr(checks, "GRACE", 2)
    told = tmp_path / "told"
    one = checks.Check("tests of cuda", words, tmp_path / "log", {checks.VARIABLE: str(told)}, told)
    monkeypatch.setattr(checks, "planned", lambda context: [one])
    here = context(tmp_path, "checks")
    monkeypatch.setattr(
        Context, "left", property(lambda self: 1e4 * (not (tmp_path / "reached").exists()))
    )
    with pytest.raises(OutOfTime, match="tests of cuda"):
        checks.checks(here)
    found = {row["name"]: row for row in read(tmp_path)}
    row = found["tests of cuda, cut short"]
    assert row["ok"] is not fails
    assert row["summary"] == f"cut short at 50%, {1 - fails} passed, {int(fails)} failed"
    assert len(row["failures"]) == fails
    if fails:
        assert "test_it.py::test_a: AssertionError: of a" in row["failures"][0]
        assert "FAILED" in (tmp_path / "log").read_text(), "told as it happens"
    assert "tests of cuda" not in found  # nor finished


def test_host_times_are_of_a_call(tmp_path):
    here = context(tmp_path, "host")

    def call():
        time.sleep(0.002)

    found = host.microseconds(here, call, count=5)
    assert 2000 <= found["least_us"] <= found["us"] < 50_000
    text, under_profiler = host.profiled(here, call)
    assert "sleep" in text
    assert under_profiler >= 2000
    host.host(here)
    names = {row["name"] for row in read(tmp_path) if row["us"] > 0}
    assert {"torch.mul", "trivial autograd.Function", f"{QUICK.key} gram both"} <= names
    assert {f"{QUICK.key} {name} forward" for name in here.backends} <= names
    assert {f"profile {name}" for name in here.backends} <= names


def tuner_step():
    pytest.importorskip("triton")
    from tools.gpu import tune

    return tune


def test_the_tuner_is_rehearsed(tmp_path):
    tune = tuner_step()
    tune.tune(context(tmp_path, "tune"))
    (row,) = read(tmp_path)
    assert row["ok"]
    assert len(row["all"]) == tune.tuner.MOST
    assert json.loads((tmp_path / tune.TILES).read_text())[0]["kernel"] == "match"


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


def test_what_is_compiled_beforehand_follows_the_steps():
    """Five of the main shapes, the small forms, and then all others."""
    everything = warm.work()
    kinds = [kind for kind, _ in everything]
    assert "form" not in kinds[: warm.MAIN]
    assert kinds[warm.MAIN] == "form"
    assert warm.work(["report", "ddp"]) == []
    assert {kind for kind, _ in warm.work(["smoke", "graph"])} == {"form"}
    assert ("form", warm.AROUND) not in warm.work(["smoke"])
    found = warm.work(["negatives"])
    assert {kind for kind, _ in found} == {"negatives"}
    assert {what.key for _, what in found} >= {case.key for case in negatives.timed(True)}
    few = warm.work(["time"], ("w22",))
    assert few
    assert {what.window for _, what in few} == {22}


def test_candidates_of_the_tuner_are_compiled_beforehand():
    tune = tuner_step()
    found = tune.candidates_work(90, ("w6",))
    wide = [one for one in tune.subjects() if "-w6-" in one.label]
    assert len(found) == sum(len(one.candidates()) for one in wide) == 2 * tune.tuner.MOST
    work = found[f"{wide[0].label} 64x16 w4 s1"]
    assert work.passes == ("forward",)
    assert work.make()[4] == (6, 6)


def test_shapes_are_named_by_parts_of_their_keys():
    keys = {case.key for case, _ in timing.groups(True, ["cuda"], ("w2", "S64"))}
    assert all("-w2-" in key or key.startswith("S64-") for key in keys)
    assert len(keys) > 3
    assert {case.key for case in kernels.cases(True, ("w22",))} == {
        "S32-C384-44x44-w22-bfloat16-channels_last"
    }


def test_what_was_never_tried_is_timed_first(tmp_path):
    here = Context("time", "cuda", tmp_path, 60.0)
    order = [case.key for case, _ in timing._left(here)]
    first, names = next(timing.groups(True, here.backends))
    for name in names:
        here.emit(f"{first.key} {name}", failed="RuntimeError: not this time")
    again = [case.key for case, _ in timing._left(Context("time", "cuda", tmp_path, 60.0))]
    assert again[-1] == order[0] == first.key
    assert again[:-1] == order[1:]


def test_kernels_that_were_not_compiled_in_time_are_told():
    pytest.importorskip("triton")
    jobs = warm.named([("form", form) for form in SMOKE[:3]])
    lines = list(warm.compiled(jobs, 90, seconds=0.0, workers=1))
    assert lines == [("", f"out of time before 3 calls, such as form {SMOKE[0].key}", True)]


@pytest.mark.slow
def test_triton_kernels_are_compiled_without_a_gpu(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The second call of a signature finds its kernels kept, and must not launch them either.
    program = (
        "from tools.gpu import warm; warm.work = lambda: [('form', warm.AROUND)];"
        "from salkernels.triton_kernels import offline;"
        "status = warm.main(['--workers=1']); offline.pretend(90);"
        "(work,) = warm.named(warm.work()).values();"
        "print([offline.compile_work(work) for _ in range(2)]);"
        "raise SystemExit(status)"
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
