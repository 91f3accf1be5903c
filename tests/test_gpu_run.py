"""scripts/gpu.sh: steps that fail or hang stop no other and are told; every result is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tools.gpu import __main__ as command
from tools.gpu import conductor, record
from tools.gpu.conductor import Conductor, Ending, read_endings
from tools.gpu.inputs import SMOKE
from tools.gpu.plan import BESIDE, ON_DEMAND, PLAN, RESERVE, TARGETS, TOTAL, Step, find
from tools.gpu.record import LEFT_OVER, LOST, Context, OutOfTime, read
from tools.gpu.summary import summary

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
    kept = sum(step.least for step in PLAN[4:])
    assert sum(step.limit for step in PLAN[:4]) + kept <= TOTAL - RESERVE
    everything = (*PLAN, *ON_DEMAND, BESIDE, *TARGETS)
    assert len({step.name for step in everything}) == len(everything)
    for step in everything:
        assert callable(step.function())
        assert find(step.name) is step
        assert step.least <= step.limit
    assert find("time:40").limit == 40
    assert find("time:40").function() is find("time").function()
    with pytest.raises(ValueError, match="no step 'tme'; expected one of report, smoke"):
        find("tme")
    for text in ("time:x", "time:0", "time:inf"):
        with pytest.raises(ValueError, match=f"expected STEP:SECONDS, .* got '{text}'"):
            find(text)


def test_steps_leave_to_the_later_ones_what_those_need_at_least(scripted):
    quick = dict.fromkeys(("first", "second", "third"), "pass")
    first, second, third = steps(*quick)
    found = scripted(quick, seconds=20.0).run([first, second, replace(third, least=8.0)])
    assert 11 < found["second"].limit <= found["first"].limit <= 12
    assert 12 < found["third"].limit <= 20
    # Where there is too little for all, what is worth more has its own least.
    plan = [replace(first, least=4.0), replace(second, least=8.0)]
    found = scripted(quick, seconds=6.0).run(plan)
    assert 3.9 <= found["first"].limit <= 4.0


def test_a_step_in_the_background_is_waited_for_and_ended(scripted, tmp_path, monkeypatch):
    """What times waits for it, but not for ever; at the end its processes are gone."""
    beside, late, plain, timing_step = steps("beside", "late", "plain", "timing")
    timing_step = replace(timing_step, times=True)
    mark = tmp_path / "mark"
    scripts = {
        "beside": f"import time; time.sleep(2); open({str(mark)!r}, 'w')",
        "late": f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
        "time.sleep(60)",
        "plain": "pass",
        "timing": f"import os; raise SystemExit(not os.path.exists({str(mark)!r}))",
    }
    found = scripted(scripts).run([plain, timing_step], beside=beside)
    assert [found[name].status for name in ("beside", "plain", "timing")] == ["done"] * 3
    # It may say that all is there that they need, and go on.
    row = json.dumps({"step": "beside", "name": "x"}) + "\n"
    scripts["beside"] = (
        "import time; time.sleep(0.5);"
        f"open({str(tmp_path / record.RESULTS)!r}, 'a').write({row!r}); time.sleep(60)"
    )
    start = time.monotonic()
    found = scripted(scripts).run([timing_step], beside=beside)
    assert time.monotonic() - start < 20
    assert found["timing"].status == "done"
    # What compiles by itself does it alone.
    scripts["compiling"] = (
        f"import os; pid = int(open({str(tmp_path / 'pid')!r}).read());"
        "raise SystemExit(os.path.exists(f'/proc/{pid}'))"
    )
    alone = replace(steps("compiling")[0], compiles=True)
    found = scripted(scripts).run([plain, alone], beside=late)
    assert (found["late"].status, found["compiling"].status) == ("left over", "done")
    monkeypatch.setattr(conductor, "PATIENCE", 1.5)
    found = scripted(scripts).run([timing_step], beside=late)
    assert found["late"].status == "left over"
    assert found["timing"].status == "done"
    assert has_ended(int((tmp_path / "pid").read_text()))
    assert read_endings(tmp_path)["late"].status == "left over"


def test_a_measurement_that_takes_too_long_is_left_over(tmp_path, monkeypatch, capsys):
    """What catches every Exception does not catch that, and no row calls it a failure."""

    def endless(here):
        here.emit("first", value=1)
        with here.measuring("second"):
            try:
                time.sleep(60)
            except Exception:
                time.sleep(60)
            except BaseException:  # as a callback loses it
                time.sleep(60)

    monkeypatch.setattr(Step, "function", lambda self: endless)
    monkeypatch.setattr(command, "LATE", 0.2)
    monkeypatch.setattr(command, "BEGIN", time.monotonic())
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    words = ["step", "smoke", "--device", "cpu", "--seconds", "0.5", "--out", str(tmp_path)]
    assert command.main(words) == LEFT_OVER
    assert time.monotonic() - start < 30
    assert [row["name"] for row in read(tmp_path)] == ["first"]
    assert "out of time in the middle" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_command_names_shapes_and_steps():
    given = command.parser().parse_args(
        ["run", "--steps", "time:40", "tune", "--cases", "w22", "S64"]
    )
    found = Conductor(given.out, "cpu", 60.0, given.cases)
    found.names = ["time", "tune"]
    words = found.command(find("time"), 44.0)
    again = command.parser().parse_args(words[3:])
    assert (again.name, again.seconds) == ("time", 40.0)
    assert again.cases == ["w22", "S64"]
    assert again.beside == ["time", "tune"]


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
    assert bad.pop("commit", None) == record.commit()
    assert bad == {
        "step": "smoke", "name": "bad", "backend": "x", "failed": "RuntimeError: no luck"
    }  # fmt: skip
    assert good["value"] == 0.33333
    assert context(tmp_path).finished == {"good"}
    assert context(tmp_path, "graph").finished == set()


def test_what_other_code_has_measured_is_measured_again(tmp_path, monkeypatch):
    """It is known to have been tried, and what has not been comes first."""
    context(tmp_path).emit("a", value=1)
    monkeypatch.setattr(record, "commit", lambda: "another")
    here = context(tmp_path)
    here.emit("b", value=2)
    again = context(tmp_path)
    assert again.finished == {"b"}
    assert again.tried == {"a", "b"}


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
