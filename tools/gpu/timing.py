"""Times of our backends and of all peers, shape by shape, by the means of `benchmarks`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

import salkernels
from benchmarks import rows, verify
from benchmarks.cases import ACDC, CHD, DESK, PAPER, QUICK, Case, Problem
from benchmarks.clock import queue_for
from benchmarks.isolate import describe_error
from benchmarks.machine import Rates, describe, measure_rates
from benchmarks.measure import (
    MODES,
    Job,
    Settings,
    Times,
    Trial,
    first_call,
    interleaved,
    replayed,
    trial,
)
from benchmarks.provider import Provider, Run, to_windows
from benchmarks.providers import aligned, gram, providers

from .record import Context, OutOfTime, Row

BUDGET, ROUNDS = 0.12, 15  # seconds of rounds for a job, and the most of them
LONGEST_TRUTH = 3e12  # operations of the definition beyond which results are compared with no truth
Group = tuple[Case, list[str]]


def gram_half(problem: Problem) -> Tensor:
    """`gram` with its product in the 16 bits of the features: what one writes under autocast."""
    samples, pixels = problem.features.shape[0], problem.window**2
    unit = torch.nn.functional.normalize(problem.features.float(), dim=1)
    windows = to_windows(unit.to(problem.features.dtype), problem.window).transpose(0, 1)
    sim = windows.flatten(1, 2) @ windows.flatten(1, 2).transpose(-1, -2)
    sim = sim.float().unflatten(2, (samples, pixels)).unflatten(1, (samples, pixels))
    return aligned(sim).mean(dim=(0, 2))[problem.query, problem.key].mean()


def in_tf32(run: Run) -> Run:
    """With one TF32 product in place of each in fp32: faster, and off by 2^-11."""

    def inside(problem: Problem) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return run(problem)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return inside


def with_mask_on_the_device(name: str) -> Run:
    """Our backend with the table of pairs on the GPU: not counted, and cut into no groups."""

    masks: dict[Tensor, Tensor] = {}  # moved once: a method would make it there

    def run(problem: Problem) -> Tensor:
        mask = masks.get(problem.pairs)
        if mask is None:
            mask = masks[problem.pairs] = problem.pairs.to(problem.features.device)
        return salkernels.wla_set_loss(problem.features, mask, problem.window, backend=name)

    return run


def variants(backends: list[str]) -> dict[str, Provider]:
    """Providers that only matter here, beside those of `benchmarks`."""
    found = [Provider("gram-half", gram_half), Provider("gram-tf32", in_tf32(gram))]
    for name in backends:
        run = with_mask_on_the_device(name)
        builds = providers()[f"salkernels-{name}"].builds
        found.append(Provider(f"gpumask-{name}", run, builds=builds, eager_windows=False))

    @functools.cache
    def compiled() -> Callable[[Problem], Tensor]:
        return torch.compile(gram_half, dynamic=False, fullgraph=True)

    found.append(Provider("gram-half-compiled", lambda p: compiled()(p), builds=True))
    return {provider.name: provider for provider in found}


def groups(on_gpu: bool, backends: list[str], cases: tuple[str, ...] = ()) -> Iterator[Group]:
    """Cases and who runs them, in order of worth; those of a group take turns.

    Args:
        cases: parts of the keys of those that are wanted (default: all).
    """
    for case, names in _all_groups(on_gpu, backends):
        if wanted(case, cases):
            yield case, names


def wanted(case: Case, cases: tuple[str, ...]) -> bool:
    """Whether a key contains one of them; a `-w2` does not stand for `-w22`."""
    return not cases or any(f"{part}-" in f"{case.key}-" or part == case.key for part in cases)


def _all_groups(on_gpu: bool, backends: list[str]) -> Iterator[Group]:
    ours = [f"salkernels-{name}" for name in backends]
    masked = [f"gpumask-{name}" for name in backends]
    if not on_gpu:
        yield QUICK, [*ours, "gram", "gather"]
        yield replace(QUICK, samples=16, order="scans"), [*ours, *masked, "gram-half"]
        return
    half = functools.partial(replace, PAPER, dtype="bfloat16")
    yield PAPER, [*ours, "gram", "gram-tf32"]
    yield half(), [*ours, "gram", "gram-half"]
    yield replace(ACDC, order="scans"), [*ours, *masked, "gram-half"]
    yield ACDC, [*ours, "gram-half"]
    yield replace(CHD, order="scans"), [*ours, "gram-half"]
    for window in (3, 4, 6, 2):
        yield replace(DESK, window=window), [*ours, "gram"]
    for window in (3, 4, 6, 11, 22, 44):
        divides = 44 % window == 0 and window < 44
        yield half(window=window), [*ours, *(["gram-half"] if divides else [])]
    yield replace(PAPER, layout="nchw"), [*ours, "gram"]
    yield PAPER, ["gram-compiled", "gather", "naive"]
    yield half(), ["gram-half-compiled", "late-interaction-kernels", "flash-maxsim"]
    yield PAPER, ["late-interaction-kernels", "late-interaction-padded", "naive-compiled"]
    for window in (3, 4, 6, 11, 22, 44):
        yield replace(PAPER, window=window), [*ours, *(["gram-tf32"] if 44 % window == 0 else [])]
    yield replace(PAPER, dtype="float16"), ours
    yield replace(DESK, samples=512, dtype="bfloat16"), ours
    yield replace(PAPER, dtype="float64"), ["salkernels-cuda", "salkernels-reference"]
    yield PAPER, ["keops", "flash-maxsim"]


def time(context: Context) -> None:
    """Every group; one that raises becomes rows with the reason."""
    providers().update(variants(context.backends))
    machine = describe(context.device, torch.get_num_threads())
    settings = Settings(context.device, torch.get_num_threads(), BUDGET, ROUNDS, not context.on_gpu)
    rates: dict[str, Rates] = {}
    for case, left in _left(context):
        context.need(6 if context.on_gpu else 1, case.key)
        if case.dtype not in rates:
            with context.measuring(f"rates {case.dtype}") as row:
                rates[case.dtype] = measure_rates(context.device, case.torch_dtype, settings.quick)
                row.update(rates[case.dtype]._asdict())
        shared = rows.common("gpu", case, machine)
        _Group(context, case, settings, shared, rates.get(case.dtype)).run(left)
        if context.on_gpu:
            torch.cuda.empty_cache()


def _left(context: Context) -> list[Group]:
    """What is not measured yet; first what no run has tried, of this commit or of an earlier."""
    found = []
    for case, names in groups(context.on_gpu, context.backends, context.cases):
        left = [name for name in names if f"{case.key} {name}" not in context.finished]
        found += [(case, left)] if left else []
    return sorted(
        found,
        key=lambda group: all(f"{group[0].key} {name}" in context.tried for name in group[1]),
    )


class _Group:
    """One case and some of its providers."""

    def __init__(
        self, context: Context, case: Case, settings: Settings, shared: dict[str, str],
        rates: Rates | None,
    ) -> None:  # fmt: skip
        self.context, self.case, self.settings = context, case, settings
        self.shared, self.rates = shared, rates
        self.problem = case.problem(context.device)
        self.truth = self._truth()

    def _truth(self) -> verify.Truth | None:
        if self.case.flops("both") > LONGEST_TRUTH:
            return None
        try:
            return verify.truth(self.case, self.context.device)
        except Exception as error:
            print(f"no truth of {self.case.key}: {describe_error(error)}", flush=True)
            return None

    def run(self, names: list[str]) -> None:
        """Trials, rounds in turns, graphs of ours, and a row for each."""
        good: dict[Job, Trial] = {}
        late = None
        for name in names:
            if self.context.left < 3:
                late = self._label(name)
                break
            reason = providers()[name].refuses(self.case)
            if reason is not None and not _ours(name):
                what = {"case": self.case.key, "provider": name}
                self.context.emit(self._label(name), **what, absent=reason)
                continue
            try:
                good.update(self._trials(name))
            except Exception as error:
                with self._measuring(name):
                    raise error
        times: dict[Job, Times] = {}
        expected = {job: found.seconds for job, found in good.items()}
        for item in interleaved(expected, self.problem, self.settings, graphs=False):
            if isinstance(item[1], Times):
                times[Job(*item[0])] = item[1]
        if self.context.on_gpu:
            ours = {job: found for job, found in times.items() if _ours(job.provider)}
            for _ in replayed(ours, self.problem, queue_for(self.context.device)):
                pass
        for name in dict.fromkeys(job.provider for job in good):
            with self._measuring(name) as row:
                row.update(self._found(name, good, times))
        if late:
            raise OutOfTime(late)

    def _trials(self, name: str) -> dict[Job, Trial]:
        provider = providers()[name]
        reason = provider.refuses(self.case)
        if reason is not None:
            raise NotImplementedError(reason)
        modes = MODES if provider.has_backward else MODES[:1]
        return {Job(name, mode): self._trial(name, mode) for mode in modes}

    def _trial(self, name: str, mode: str) -> Trial:
        provider = providers()[name]
        first = first_call(provider, self.problem, mode)
        if self.truth is None:
            again = first_call(provider, self.problem, mode)
            return Trial("ok", "larger than what is verified", again, first=first)
        found = trial(provider, self.problem, mode, self.truth)
        return replace(found, first=first)

    def _found(self, name: str, good: dict[Job, Trial], times: dict[Job, Times]) -> Row:
        """Rows in the columns of `benchmarks`, and what a summary needs of them."""
        found: Row = {"rows": []}
        for job in (job for job in good if job.provider == name):
            measured = times.get(job)
            if measured is None or not measured.passes:
                raise RuntimeError("it ran alone, and failed between the others")
            made = rows.timed(self.shared, self.case, job, good[job], measured, self.rates)
            if good[job].reason:
                made = [{**row, "reason": good[job].reason} for row in made]
            found["rows"] += made
            found[f"first_{job.mode}_s"] = good[job].first
            if measured.obstacle:
                found[f"no_graph_{job.mode}"] = measured.obstacle
        # A result out of bounds is timed all the same, and told: here times are compared with what
        # people use, and that is less exact at times.
        found["ok"] = not _ours(name) or all(
            good[job].status == "ok" for job in good if job.provider == name
        )
        return found

    def _measuring(self, name: str) -> AbstractContextManager[Row]:
        return self.context.measuring(self._label(name), case=self.case.key, provider=name)

    def _label(self, name: str) -> str:
        return f"{self.case.key} {name}"


def _ours(provider: str) -> bool:
    return provider.startswith(("salkernels-", "gpumask-"))
