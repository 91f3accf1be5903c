"""All suites in turn: verify, measure memory, time; answers are written as they come."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import rows
from .cases import QUICK, SUITES, SWEEPS, Case
from .isolate import ChildFailed, OutOfTime, stream
from .machine import Rates, describe
from .measure import MODES, Job, Settings, Times, Trial, save_truth, time_jobs, try_jobs
from .providers import names_for, providers
from .report import Results, Row

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Args:
        label: names the files in `results`.
        settings: device, threads, budget.
        suites: names in `cases.SUITES`; with `cases` given, none.
        cases: single cases instead.
        only: names of providers; empty for those that belong to the suite.
        timeout: seconds that one run of a provider may take, compilation included.
        fresh: forget what the file already holds.
        results: folder for the files.
    """

    label: str
    settings: Settings
    suites: Sequence[str] = ()
    cases: Sequence[Case] = ()
    only: Sequence[str] = ()
    timeout: float = 90
    fresh: bool = False
    results: Path = RESULTS


def plan(options: Options) -> Iterator[tuple[str, Case, list[str]]]:
    """(suite, case, providers), each case once: sweeps pass through shapes of the suites before."""
    seen: set[str] = set()
    chosen: dict[str, Sequence[Case]] = {suite: SUITES[suite] for suite in options.suites}
    if options.settings.quick:
        chosen = {"quick": [QUICK]}
    if options.cases:
        chosen = {"single": options.cases}
    for suite, cases in chosen.items():
        for case in cases:
            if case.key not in seen:
                seen.add(case.key)
                first = case is cases[0] or suite == "single"
                names = names_for(suite, first, options.settings.device)
                yield suite, case, list(options.only) or names


def run(options: Options) -> Results:
    """Measures whatever the file does not hold yet for this machine and commit."""
    path = options.results / f"{options.label}.csv"
    if options.fresh:
        path.unlink(missing_ok=True)
    results = Results(path)
    machine = describe(options.settings.device, options.settings.threads)
    unknown = set(options.only) - set(providers())
    if unknown:
        raise ValueError(f"unknown providers {sorted(unknown)}; known: {', '.join(providers())}")
    for suite, case, names in plan(options):
        if all(results.has(case.key, name, machine) for name in names):
            say(f"{suite} {case.key}: already measured")
            continue
        say(f"{suite} {case.key}")
        _Measurement(suite, case, names, options, results, machine).run()
    return results


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Measurement:
    """One case: trials of all providers, then rounds of those that gave the right answer."""

    def __init__(
        self,
        suite: str,
        case: Case,
        names: list[str],
        options: Options,
        results: Results,
        machine: Row,
    ) -> None:
        self.case, self.names, self.options, self.results = case, names, options, results
        self.settings = options.settings
        if suite in SWEEPS:  # many cases, of which the trend matters
            self.settings = self.settings._replace(budget=self.settings.budget / 2)
        self.cuda = options.settings.device.startswith("cuda")
        self.common = rows.common(suite, case, machine)

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trials = self._trials(f"{folder}/truth.pt")
        good = {job: trial for job, trial in trials.items() if trial.status == "ok"}
        times, rates = self._times(good)
        found: list[Row] = []
        for job, trial in good.items():
            if job in times and times[job].passes:
                found += rows.timed(self.common, self.case, job, trial, times[job], rates)
            else:
                lost = Trial("failed", "it ran alone, and failed between the others")
                found += rows.failed(self.common, job, lost)
        self.results.add(found)
        for row in found:
            if row["pass"] != "backward" and row["status"] == "ok":
                say(
                    f"  {row['provider']:24} {row['pass']:8} {row['median_ms']:>8} ms"
                    f"  {row['times_floor']:>6} x floor"
                )

    def _trials(self, truth: str) -> dict[Job, Trial]:
        """First runs, each in a child of its own on a CPU; failures are written at once."""
        jobs = [Job(name, mode) for name in self.names for mode in MODES]
        trials = {job: trial for job in jobs if (trial := self._refusal(job)) is not None}
        try:
            # The truth is allowed more time than a provider: there is no row without it.
            child = stream(
                save_truth, self.case, self.settings, truth, timeout=600, memory_limit=not self.cuda
            )
            list(child)
        except ChildFailed as error:
            reason = f"nothing to verify against, the definition failed: {error}"
            trials.update((job, Trial("failed", reason)) for job in jobs if job not in trials)
        for job in jobs:
            if job in trials:
                self._record(job, trials[job])
        left = [job for job in jobs if job not in trials]
        while left:
            # A CUDA context costs seconds, and its allocator tells the peak of each job by itself:
            # there one child takes all jobs until one kills it.
            batch = left if self.cuda else left[:1]
            for job, trial in zip(batch, self._try(batch, truth), strict=False):
                trials[job] = trial
                self._record(job, trial)
                left.remove(job)
        return trials

    def _refusal(self, job: Job) -> Trial | None:
        provider = providers()[job.provider]
        reason = provider.refuses(self.case)
        if reason is None and job.mode == "both" and not provider.has_backward:
            reason = "it has no backward"
        return None if reason is None else Trial("unsupported", reason)

    def _try(self, batch: list[Job], truth: str) -> Iterator[Trial]:
        try:
            yield from stream(
                try_jobs,
                batch,
                self.case,
                self.settings,
                truth,
                timeout=self.options.timeout,
                memory_limit=not self.cuda,
            )
        except OutOfTime as error:
            yield Trial("too slow", str(error))
        except ChildFailed as error:
            yield Trial("failed", str(error))

    def _times(self, good: dict[Job, Trial]) -> tuple[dict[Job, Times], Rates | None]:
        """Seconds per round, without a job that stops the child."""
        left = {job: trial.seconds for job, trial in good.items()}
        while left:
            times: dict[Job, Times] = {}
            rates, current = None, None
            try:
                for item in stream(
                    time_jobs,
                    left,
                    self.case,
                    self.settings,
                    timeout=2 * self.options.timeout,
                    memory_limit=not self.cuda,
                ):
                    if isinstance(item, Rates):
                        rates = item
                    elif isinstance(item, Job):
                        current = item
                    else:
                        times[item[0]] = item[1]
                return times, rates
            except ChildFailed as error:
                if set(times) == set(left) and current is not None:  # all are timed
                    say(f"  {current.provider} {current.mode}: no graph: {error}")
                    return times, rates
                if current is None:
                    say(f"  no timing: {error}")
                    break
                say(f"  {current.provider} {current.mode} stopped the others: {error}")
                del left[current]
        return {}, None

    def _record(self, job: Job, trial: Trial) -> None:
        if trial.status != "ok":
            say(f"  {job.provider:24} {job.mode:8} {trial.status}: {trial.reason}")
            self.results.add(rows.failed(self.common, job, trial))
