"""How benchmarks time a GPU, on a simulated one: a host and a queue with clocks of their own."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import measure, report, rows, runner
from benchmarks.cases import ACDC, Case
from benchmarks.clock import LONGEST_LEAD, HostQueue, Stopwatch, replay_seconds
from benchmarks.measure import Job, Settings, Times, Trial, save_truth, time_jobs, timed, try_job
from benchmarks.provider import Provider
from benchmarks.providers import EAGER, backend_provider, providers
from salkernels._pair_list import PairList
from salkernels._shared.tabular import read_csv

SMALL = Case(8, 16, 8, 8)
KERNEL, PAUSE = 10e-6, 70e-6  # seconds of a kernel on the device, and of the host to launch it
CACHE_MISS = 5e-6  # what the first kernel after a flush takes longer


class SimulatedEvent:
    def __init__(self, queue, at):
        self.queue, self.at = queue, at

    def reached(self):
        return self.queue.host >= self.at

    def since(self, other):
        return self.at - other.at


class SimulatedQueue:
    """Work begins when it is queued, or when the work before it ends."""

    def __init__(self):
        self.host = self.device = 0.0
        self.cold, self.flushes = False, 0

    def now(self):
        return self.host

    def work(self, seconds, host=PAUSE):
        self.host += host
        self.device = max(self.device, self.host) + seconds + CACHE_MISS * self.cold
        self.cold = False

    def mark(self):
        self.device = max(self.device, self.host)
        return SimulatedEvent(self, self.device)

    def flush(self):
        self.work(1e-4)
        self.cold = True
        self.flushes += 1

    def spin(self, seconds):
        cold, self.cold = self.cold, False  # it reads nothing
        self.work(seconds)
        self.cold = cold

    def synchronise(self):
        self.host = max(self.host, self.device)

    def capture(self, run):
        before = self.device, self.host
        self.device = self.host = 0.0
        run()
        launched = self.host / PAUSE
        self.device, self.host = before
        return lambda: self.work(launched * KERNEL)


@pytest.fixture
def queue():
    return SimulatedQueue()


def launches(queue, count):
    for _ in range(count):
        queue.work(KERNEL)


def test_the_device_is_not_charged_for_the_host(queue):
    """3 + 4 kernels of 10 µs that take the host 70 µs each to launch."""

    def call(mark):
        launches(queue, 3)
        mark()
        launches(queue, 4)

    found = Stopwatch(queue).time(call)
    assert found.device == pytest.approx([3 * KERNEL + CACHE_MISS, 4 * KERNEL])
    assert found.host == pytest.approx([3 * PAUSE, 4 * PAUSE])
    assert found.queued
    idle = Stopwatch(queue, lead=0.0)._once(call)
    assert not idle.queued
    assert sum(idle.device) > 5 * 7 * KERNEL  # an idle queue is charged for the pauses


def test_a_long_call_gets_a_longer_lead(queue):
    """60 launches outlast the first lead of 2 ms: that round does not count."""
    watch = Stopwatch(queue)
    found = watch.time(lambda mark: launches(queue, 60))
    assert found.device == pytest.approx([60 * KERNEL + CACHE_MISS])
    assert found.queued
    assert not watch.waits
    flushes = queue.flushes
    watch.time(lambda mark: launches(queue, 60))
    assert queue.flushes == flushes + 1  # it has learnt how long


def test_a_call_that_waits_for_the_device_is_told(queue):
    def waiting(mark):
        queue.work(KERNEL)
        queue.synchronise()
        queue.work(KERNEL)

    watch = Stopwatch(queue)
    found = watch.time(waiting)
    assert watch.waits
    assert not found.queued
    # Timed without a lead: what the device did, and its pause between the two.
    assert found.device[0] < LONGEST_LEAD / 100
    assert sum(found.host) < LONGEST_LEAD / 100


def test_every_round_finds_an_empty_cache(queue):
    watch = Stopwatch(queue)
    seconds = [watch.time(lambda mark: queue.work(KERNEL)).device[0] for _ in range(4)]
    assert seconds == pytest.approx([KERNEL + CACHE_MISS] * 4)
    assert queue.flushes == 4


def test_replay_is_timed_like_a_call(queue):
    seconds = replay_seconds(queue, lambda: launches(queue, 6))
    assert seconds == pytest.approx(6 * KERNEL + CACHE_MISS)


def test_passes_and_host_of_a_provider(queue):
    def run(problem):
        launches(queue, 2)
        return problem.features.square().mean()

    times = Times()
    problem = SMALL.problem("cpu")
    timed(Provider("x", run), problem, "forward", Stopwatch(queue), times)
    timed(Provider("x", run), problem, "both", Stopwatch(queue), times)
    assert set(times.passes) == set(times.host) == {"forward", "backward", "both"}
    assert times.passes["forward"] == pytest.approx([2 * KERNEL + CACHE_MISS])
    assert times.passes["both"] == pytest.approx([2 * KERNEL + CACHE_MISS])
    assert times.host["both"] == pytest.approx([2 * PAUSE])
    assert times.queued


def test_a_cpu_has_no_host_beside_it():
    times = Times()
    timed(providers()["gram"], SMALL.problem("cpu"), "both", Stopwatch(HostQueue()), times)
    assert times.host == {}
    assert 0 < times.passes["backward"][0] < times.passes["both"][0] < 10
    assert times.queued


class Jit:
    """Compiles for a shape at its first call in a process, as Triton does; the time is a sleep."""

    def __init__(self, seconds):
        self.seconds, self.seen = seconds, set()

    def __call__(self, problem):
        if problem.features.shape not in self.seen:
            self.seen.add(problem.features.shape)
            time.sleep(self.seconds)
        return EAGER["gather"](problem)


@pytest.fixture
def jit(monkeypatch):
    def add(seconds, builds):
        function = Jit(seconds)
        monkeypatch.setitem(providers(), "jit", Provider("jit", function, builds=builds))
        return function

    return add


def test_triton_counts_as_compiling():
    assert backend_provider("triton", None).builds
    assert not backend_provider("cuda", None).builds


def test_compilation_is_the_first_call_and_nothing_else(jit, tmp_path):
    settings = Settings("cpu", 1, 0.2, 9, True)
    list(save_truth(SMALL, settings, str(tmp_path / "truth.pt")))
    jit(1.5, builds=True)
    trial = try_job(Job("jit", "forward"), SMALL, "cpu", str(tmp_path / "truth.pt"))
    assert trial.status == "ok"
    assert trial.first > 1.5
    assert trial.seconds < 1


@pytest.mark.parametrize("builds", [True, False])
def test_compilation_in_the_child_is_in_no_round(jit, builds):
    """Also of a provider that does not say that it compiles, and whatever its trial took."""
    settings = Settings("cpu", 1, 0.2, 9, True)
    jit(1.5, builds)
    found = [
        item
        for item in time_jobs({Job("jit", "forward"): 6.0}, SMALL, settings)
        if isinstance(item, tuple) and isinstance(item[1], Times)
    ]
    (_, times), *rest = found
    assert not rest
    assert max(times.passes["forward"]) < 1
    assert len(times.passes["forward"]) >= 3


def test_rows_and_table_of_a_gpu(tmp_path, monkeypatch):
    """From times to a row to the table: host, graph, first call, and who waits for the device."""
    options = runner.Options("x", Settings("cpu", 1, 0.01, 2, True), results=tmp_path)
    one = runner._Measurement(
        "quick", SMALL, ["gram"], options, report.Results(tmp_path / "x.csv"), {}
    )
    times = Times(
        {"backward": [2e-3], "both": [3e-3]}, {"backward": [1e-4], "both": [2.5e-4]}, False, 2.9e-3
    )
    trial = Trial("ok", "", 1.0, 5e6, first=7.5)
    job = Job("gram", "both")
    found = rows.timed(one.common, SMALL, job, trial, times, None)
    assert [row["host_us"] for row in found] == ["100", "250"]
    assert [row["graph_ms"] for row in found] == ["", "2.9"]
    assert {row["first_s"] for row in found} == {"7.5"}
    assert {row["queued"] for row in found} == {"no"}
    one.results.add(found)
    lines = report.markdown(one.results.rows).splitlines()
    heading = next(line for line in lines if line.startswith("| provider"))
    assert heading.endswith("| host µs | graph ms | first call s |")
    line = next(line for line in lines if line.startswith("| gram"))
    assert line.endswith("| 250 (device waits) | 2.9 | 7.5 |")
    assert line.count("|") == heading.count("|")


def test_a_child_that_dies_while_capturing_leaves_the_times(monkeypatch, tmp_path):
    job = Job("gram", "both")
    times = Times({"backward": [2e-3], "both": [3e-3]})

    def stream(*_, **__):
        yield measure.Rates(1, 1)
        yield job
        yield job, times
        yield job
        raise runner.ChildFailed("killed by SIGSEGV")

    monkeypatch.setattr(runner, "stream", stream)
    options = runner.Options("x", Settings("cpu", 1, 0.01, 2, True), results=tmp_path)
    one = runner._Measurement(
        "quick", SMALL, ["gram"], options, report.Results(tmp_path / "x.csv"), {}
    )
    found, _ = one._times({job: Trial("ok", seconds=1.0)})
    assert found == {job: times}


def test_the_training_suite_is_two_groups_where_scans_lie_apart():
    """32 slices of two scans, two views of each: 64 samples, which no pair joins across scans."""
    for order, groups in (("views", 1), ("scans", 2)):
        case = Case.parse(f"{ACDC.key}-{order}" if order == "scans" else ACDC.key)
        assert case.order == order
        places = case.pairs.flatten().nonzero().squeeze(1)
        meta = torch.device("meta")
        assert PairList.exactly(places, case.samples, meta).groups == groups
    scans = Case.parse(f"{ACDC.key}-scans")
    assert scans.num_pairs == ACDC.num_pairs
    assert Case.parse(f"{ACDC.key}-scans-t0.1").num_pairs < scans.num_pairs


def test_a_file_of_an_earlier_version_is_read_and_kept(tmp_path):
    old = tmp_path / "x.csv"
    columns = [c for c in report.COLUMNS if c != "host_us"]
    report.Results(old, columns).add([{"case": "a", "provider": "p", "pass": "both"}])
    results = report.Results(old)
    results.add([{"case": "a", "provider": "q", "pass": "both", "host_us": "3"}])
    assert [row.get("host_us") for row in read_csv(old)] == ["", "3"]
