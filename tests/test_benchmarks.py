"""The benchmarks themselves: right inputs, every provider right, results that survive."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from benchmarks import providers as providers_module
from benchmarks import verify
from benchmarks.cases import DESK, PAPER, QUICK, SUITES, Case, sample_pairs
from benchmarks.isolate import ChildFailed, OutOfTime, stream
from benchmarks.machine import Rates
from benchmarks.measure import Job, Settings, Trial, rounds_for, run_once, try_job
from benchmarks.provider import Provider
from benchmarks.providers import providers
from benchmarks.report import COLUMNS, Results, markdown
from benchmarks.runner import Options, plan, run
from salkernels import backends, wla_set_loss
from salkernels._shared.tabular import read_csv

SETTINGS = Settings("cpu", 1, 0.01, 2, True)
AVAILABLE = [f"salkernels-{status.name}" for status in backends() if status.available]
EAGER = ["naive", "gather", "gram", *AVAILABLE]
SMALL = Case(samples=8, channels=5, height=8, width=4)


def test_paper_has_272_ordered_pairs():
    pairs = sample_pairs(32)
    assert pairs.count_nonzero() == 272 == PAPER.num_pairs
    assert not pairs.diagonal().any()
    assert torch.equal(pairs, pairs.T)
    # Both views of a slice are a pair, and nothing crosses from one subject to the other.
    assert pairs[0, 16]
    assert not pairs[:8, 8:16].any()


def test_floor_of_paper():
    """Three passes over 95 MB, and the FLOPs of 272 pairs with four keys per pixel."""
    assert PAPER.feature_bytes == 32 * 384 * 44 * 44 * 4
    assert PAPER.bytes_moved("both") == 3 * PAPER.feature_bytes
    products = 272 * 44 * 44 * 384
    rows = 32 * 44 * 44 * 384
    assert PAPER.flops("forward") == 2 * 4 * products + 2 * rows
    assert PAPER.flops("both") == (2 * 4 + 4) * products + 6 * rows
    assert Rates(36, 190).floor(PAPER.bytes_moved("both"), PAPER.flops("both")) == pytest.approx(
        PAPER.flops("both") / 190e9
    )


def test_suites_are_what_was_asked_for():
    assert [case.window for case in SUITES["desk"]] == [2, 3, 4, 6]
    assert [case.window for case in SUITES["vanilla"]] == [44]
    assert {case.layout for case in SUITES["paper"]} == {"channels_last", "nchw"}
    for cases in SUITES.values():
        for case in cases:
            assert Case.parse(case.key) == case


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("name", EAGER)
def test_provider_against_the_definition(name, layout):
    dtype = "float32" if name == "salkernels-triton" else "float64"
    case = Case(8, 5, 8, 4, 2, dtype, layout)
    loss, grad = run_once(providers()[name], case.problem("cpu"), "both")
    errors = verify.errors(verify.truth(case, "cpu"), loss, grad)
    assert verify.complaint(errors, dtype) is None, errors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", EAGER)
def test_provider_in_other_dtypes(name, dtype):
    case = Case(8, 16, 8, 8, 2, dtype)
    loss, grad = run_once(providers()[name], case.problem("cpu"), "both")
    assert grad is not None
    assert grad.dtype == case.torch_dtype
    errors = verify.errors(verify.truth(case, "cpu"), loss, grad)
    assert verify.complaint(errors, dtype) is None, errors


@pytest.mark.parametrize("name", [p.name for p in providers().values() if p.package])
def test_peer_is_right_or_says_why_not(name, tmp_path):
    provider = providers()[name]
    if reason := provider.refuses(SMALL):
        pytest.skip(reason)
    if name == "keops":
        pytest.skip("KeOps compiles for longer than this test may take")
    mode = "both" if provider.has_backward else "forward"
    trial = try_job(Job(name, mode), SMALL, "cpu", _truth(SMALL, tmp_path))
    assert trial.status == "ok" or trial.reason


def _truth(case, folder):
    path = folder / "truth.pt"
    torch.save(list(verify.truth(case, "cpu")), path)
    return str(path)


def test_naive_is_equation_one():
    """Naive against loops over pairs, windows and pixels: not only against our own reference."""
    features, pairs, query, key, window = Case(8, 3, 4, 4, 2, "float64").problem("cpu")
    losses = []
    for i, j in zip(query.tolist(), key.tolist(), strict=True):
        for row in range(4):
            for column in range(4):
                top, left = row // window * window, column // window * window
                pixel = features[i, :, row, column]
                part = features[j, :, top : top + window, left : left + window].flatten(1).T
                best = torch.cosine_similarity(pixel[None], part).max()
                losses.append((1 - best).abs())
    expected = torch.stack(losses).mean()
    problem = Case(8, 3, 4, 4, 2, "float64").problem("cpu")
    torch.testing.assert_close(providers()["naive"].run(problem), expected)
    torch.testing.assert_close(wla_set_loss(features, pairs, window, backend="reference"), expected)


def _half(problem):
    return providers_module.naive(problem) / 2


def _scaled_gradient(problem):
    loss = providers_module.naive(problem)
    return 2 * loss - loss.detach()


def _raising(problem):
    raise RuntimeError("0 active\n drivers")


def _greedy(problem):
    raise MemoryError


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (_half, "wrong", "relative error of the loss 5.0e-01"),
        (_scaled_gradient, "wrong", "relative error of the gradient 1.0e+00"),
        (_raising, "failed", "RuntimeError: 0 active drivers"),
        (_greedy, "out of memory", "MemoryError"),
    ],
)
def test_trial_says_what_is_wrong(monkeypatch, tmp_path, function, status, reason):
    monkeypatch.setitem(providers(), "bad", Provider("bad", function))
    trial = try_job(Job("bad", "both"), SMALL, "cpu", _truth(SMALL, tmp_path))
    assert trial.status == status
    assert reason in trial.reason


def test_not_a_number_is_wrong():
    nan = float("nan")
    assert verify.complaint(verify.Errors(nan, 0), "float32")
    assert verify.complaint(verify.Errors(0, nan), "float32")
    assert verify.complaint(verify.Errors(0, 0), "float32") is None


def test_refusals():
    assert "divide" in str(providers()["naive"].refuses(Case(window=5)))
    assert "not installed" in str(Provider("x", _half, "no_such_package").refuses(PAPER))
    assert providers()["salkernels-reference"].refuses(Case(window=5)) is None


def _numbers(count):
    yield from range(count)


def _sleeping():
    yield 1
    time.sleep(60)


def _dying():
    yield 1
    os.kill(os.getpid(), signal.SIGSEGV)


def _failing():
    yield 1
    raise ValueError("no")


def _allocating():
    yield 1
    torch.empty(1 << 50, dtype=torch.uint8)


def test_stream_yields_what_the_child_does():
    assert list(stream(_numbers, 3, timeout=60)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "timeout", "kind", "message"),
    [
        (_sleeping, 3, OutOfTime, "nothing within 3 s"),
        (_dying, 60, ChildFailed, "killed by SIGSEGV"),
        (_failing, 60, ChildFailed, "ValueError: no"),
        (_allocating, 60, ChildFailed, "allocate memory"),
    ],
)
def test_stream_survives_the_child(function, timeout, kind, message):
    list(stream(_numbers, 1, timeout=60))  # the server is up: the short limit is the child's own
    items = stream(function, timeout=timeout)
    assert next(items) == 1
    with pytest.raises(kind, match=message):
        next(items)


def test_rounds_follow_the_budget():
    settings = Settings("cpu", 1, 2.0, 25, False)
    assert rounds_for(0.001, settings) == 25
    assert rounds_for(0.3, settings) == 6
    assert rounds_for(1, settings) == 5
    assert rounds_for(3, settings) == 3
    assert rounds_for(100, settings) == 2


def test_csv_round_trip_and_replacement(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    results = Results(path)
    row = dict.fromkeys(COLUMNS, "") | {"case": "a", "provider": "p", "pass": "both"}
    results.add([row | {"reason": 'commas, "quotes" and ω'}, row | {"pass": "forward"}])
    assert read_csv(path) == Results(path).rows == results.rows
    results.add([row | {"status": "ok"}])
    assert [(r["pass"], r["status"]) for r in read_csv(path)] == [("forward", ""), ("both", "ok")]
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Results(path)


def test_each_case_is_planned_once():
    full = list(plan(Options("x", SETTINGS._replace(quick=False), SUITES)))
    cases = {case.key: names for _, case, names in full}
    assert len(cases) == len(full)
    assert set(cases[PAPER.key]) == set(providers())
    assert "keops" not in cases[SUITES["paper"][1].key]
    assert set(AVAILABLE) <= set.intersection(*map(set, cases.values()))
    assert PAPER.key in cases
    assert DESK.key in cases
    chosen = plan(Options("x", SETTINGS, only=["naive"]))
    assert [(case, names) for _, case, names in chosen] == [(QUICK, ["naive"])]


def test_runner_measures_resumes_and_draws(tmp_path, capsys, monkeypatch):
    from benchmarks.__main__ import main

    words = ["--quick", "--threads", "1", "--results", str(tmp_path), "--providers"]
    assert main([*words, "gram", "naive", "maxsim-cpu"]) == 0
    path = tmp_path / "quick.csv"
    rows = {(row["provider"], row["pass"]): row for row in read_csv(path)}
    for name in ("gram", "naive"):
        for what in ("forward", "backward", "both"):
            row = rows[name, what]
            assert row["status"] == "ok"
            assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
            assert float(row["times_floor"]) > 0
            assert row["torch"] == torch.__version__
            assert row["commit"]
        assert float(rows[name, "both"]["peak_mb"]) > 0
    assert rows["maxsim-cpu", "backward"]["reason"]
    table = (tmp_path / "quick.md").read_text()
    assert table in capsys.readouterr().out
    assert "| naive |" in table

    # Nothing is measured twice; another provider brings all of the case side by side again.
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.runner.stream", forbidden)
        assert main([*words, "gram", "naive"]) == 0
    assert "already measured" in capsys.readouterr().err
    assert main([*words, "gather"]) == 0
    assert {row["provider"] for row in read_csv(path)} >= {"gather", "gram", "naive", "maxsim-cpu"}
    assert main([*words, "nobody"]) == 2


def test_rows_of_another_commit_do_not_count(tmp_path):
    options = Options("x", SETTINGS, only=["gram"], results=tmp_path)
    results = run(options)
    machine = {column: results.rows[0][column] for column in COLUMNS}
    assert results.has(QUICK.key, "gram", machine)
    assert not results.has(QUICK.key, "gram", machine | {"commit": "other"})
    assert not results.has(QUICK.key, "naive", machine)


def test_figures_and_table_come_from_the_csv_alone(tmp_path):
    draw = pytest.importorskip("benchmarks.plots", reason="matplotlib is not installed").draw
    results = Results(tmp_path / "x.csv")
    for case in (DESK, *SUITES["sweep-window"], *SUITES["sweep-size"], PAPER):
        common = {
            name: str(getattr(case, name))
            for name in ("samples", "channels", "height", "width", "window", "dtype", "layout")
        }
        common |= {"case": case.key, "provider": "naive", "status": "ok", "features_mb": "2"}
        timed = {"median_ms": "2", "p20_ms": "1", "p80_ms": "3", "peak_mb": "5", "rounds": "3"}
        rates = {"gb_per_s": "2", "gflop_per_s": "3", "copy_gb_per_s": "9", "pairs": "1"}
        rates |= {"gemm_gflop_per_s": "99", "times_floor": "4"}
        results.add([common | timed | rates | {"pass": "both"}])
        lost = Trial("out of memory", "MemoryError: x")
        failure = {"provider": "gram", "status": lost.status, "reason": lost.reason}
        results.add([common | failure | {"pass": "both"}])
    names = {path.name for path in draw(results.path)}
    assert names == {f"x-{n}.png" for n in ("window", "size", "memory", "roofline")}
    table = markdown(results.rows)
    assert "- gram, both: **out of memory** (MemoryError: x)" in table
