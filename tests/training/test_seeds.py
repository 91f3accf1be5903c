"""Experiments over several seeds: plan, folds that rotate, the seed as the unit, exact p."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from salkernels.training.cli import main
from salkernels.training.experiment.cells import folds_by_seed, plan
from salkernels.training.experiment.experiment import ExperimentConfig
from salkernels.training.experiment.plots import draw
from salkernels.training.experiment.statistics import paired_difference, sign_flip
from salkernels.training.experiment.summary import Results, Score, averaged, markdown, write
from salkernels.training.experiment.tables import TABLES

ARMS = tuple(TABLES["table1"].arm(name) for name in ("random", "pcl"))


def test_folds_rotate_by_the_seed_and_not_by_its_place():
    five = (0, 1, 2, 3, 4)
    assert folds_by_seed((0, 3), five) == {0: five, 3: five}
    rotated = folds_by_seed(range(5), five, 2)
    assert rotated == {0: (0, 1), 1: (2, 3), 2: (0, 4), 3: (1, 2), 4: (3, 4)}
    assert folds_by_seed((3,), five, 2)[3] == rotated[3]
    used = [fold for own in rotated.values() for fold in own]
    assert {used.count(fold) for fold in five} == {2}
    assert folds_by_seed((1, 2), (0, 3), 1) == {1: (3,), 2: (0,)}


def test_every_seed_has_runs_of_its_own(pretrain_config, finetune_config, tmp_path):
    folds = {0: (0, 1), 4: (2,)}
    cells = plan(ARMS, (1,), folds, tmp_path, pretrain_config(), finetune_config())
    assert [(c.command, c.arm, c.seed, c.fold) for c in cells] == [
        ("pretrain", "pcl", 0, 0), ("finetune", "random", 0, 0), ("finetune", "pcl", 0, 0),
        ("finetune", "random", 0, 1), ("finetune", "pcl", 0, 1),
        ("pretrain", "pcl", 4, 0), ("finetune", "random", 4, 2), ("finetune", "pcl", 4, 2),
    ]  # fmt: skip
    assert all(cell.config.seed == cell.seed for cell in cells)
    assert len({cell.config.out for cell in cells}) == len({cell.name for cell in cells}) == 8
    # Runs of seed 0 lie where those of experiments without seeds do.
    assert cells[0].config.out == tmp_path / "pretrain" / "pcl"
    assert cells[-1].needs.parent == tmp_path / "pretrain" / "pcl_s4" == cells[5].config.out


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_the_exact_p_against_all_patterns(count):
    values = np.random.default_rng(count).normal(0.5, 1, count)
    patterns = itertools.product((1, -1), repeat=count)
    as_far = [abs(np.dot(p, values)) >= abs(values.sum()) - 1e-12 for p in patterns]
    assert sign_flip(values) == pytest.approx(np.mean(as_far))


def test_the_exact_p_at_its_ends():
    assert sign_flip([0.1] * 6) == 2 / 64
    assert sign_flip([0.1, -0.1]) == 1
    assert sign_flip([0.0, 0.0]) == 1
    assert math.isnan(sign_flip([]))
    assert math.isnan(sign_flip([0.1] * 25))
    found = stats.permutation_test(
        ([0.1, 0.3, -0.05, 0.2],), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip([0.1, 0.3, -0.05, 0.2]) == pytest.approx(found.pvalue)


def results(gains=((0.10, 0.30), (0.20, 0.20), (0.00, 0.10)), **changes):
    """Two arms, three seeds with two folds each; a fold is worth more than a seed."""
    planned = tuple((seed, fold) for seed in range(3) for fold in range(2))
    scores = [
        Score(arm, 2, fold, {"RV": value}, value, ("a",), (f"s{fold}",), seed)
        for arm, factor in (("random", 0), ("pcl", 1))
        for seed, fold in planned
        if (value := 0.3 + 0.2 * fold + factor * gains[seed][fold])
    ]
    made = Results(TABLES["table1"], ("random", "pcl"), (2,), planned, tuple(scores), {})
    return replace(made, **changes)


def test_the_seed_is_the_unit():
    made = results()
    assert (made.seeds, made.unit) == ((0, 1, 2), "seed")
    mean = made.summary("random", 2)
    assert (mean.folds, mean.seeds) == (6, 3)
    assert (mean.mean, mean.std) == pytest.approx((0.4, 0.0), abs=1e-12)
    found = made.difference("pcl", 2, "random")
    assert (found.folds, found.seeds, found.p) == (6, 3, 0.25)
    expected = paired_difference([0.2, 0.2, 0.05])
    assert found[:3] == pytest.approx(expected[:3])
    text = markdown(made, {"commands": ["c"], "conditions": "x"})
    assert "mean over 3 seeds of pre-training" in text
    assert f"| PCL | {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}], p = 0.25 |" in text
    one = replace(
        made, scores=tuple(s for s in made.scores if s.seed == 1), planned=((1, 0), (1, 1))
    )
    assert one.unit == "fold"
    assert one.difference("pcl", 2, "random").folds == 2
    assert "each arm was pre-trained once" in markdown(one, {"commands": ["c"], "conditions": "x"})


def test_the_best_of_many_is_marked(tmp_path):
    """With the p of as many tries; of a single arm there is no choice."""
    made = results()
    about = {"commands": ["c"], "conditions": "x"}
    assert made.best_of(2) == ("", 0)
    assert "best of" not in markdown(made, about)
    more = [
        replace(score, arm=arm, mean=score.mean + gain)
        for arm, gain in (("gcl", -0.1), ("sal", 0.05))
        for score in made.scores
        if score.arm == "pcl"
    ]
    many = replace(made, arms=("random", "gcl", "pcl", "sal"), scores=(*made.scores, *more))
    assert many.best_of(2) == ("sal", 3)
    text = markdown(many, about)
    marked = [line for line in text.splitlines() if "**best of" in line]
    assert len(marked) == 1
    assert marked[0].startswith("| SAL | +0.200 [")
    assert marked[0].endswith(", p = 0.25; **best of 3** (p = 0.75) |")
    assert "confirmed with fresh seeds" in text
    write(many, tmp_path, "x", about)
    found = json.loads((tmp_path / "x.json").read_text())["differences"]
    assert {row["arm"]: row["best_of"] for row in found} == {"gcl": None, "pcl": None, "sal": 3}


def test_what_is_nearest_has_a_table_of_its_own():
    looks = {"nearest_same_scan": 0.9, "chance_nearest_same_scan": 0.47,
             "nearest_distance": 0.12, "chance_nearest_distance": 0.33}  # fmt: skip
    rows = [{"step": 1, "cosine_encoder": 0.1, **looks}]
    text = markdown(
        results(pretraining={"pcl": rows, "random": rows[:0]}),
        {"commands": ["c"], "conditions": "x"},
    )
    assert "| PCL | 0.90 (0.47) | 0.12 (0.33) |" in text
    assert text.count("Which slice is nearest") == 1
    plain = results(pretraining={"pcl": [{"step": 1, "cosine_encoder": 0.1}]})
    assert "nearest" not in markdown(plain, {"commands": ["c"], "conditions": "x"})


def test_only_what_both_arms_have_is_compared_and_gaps_are_said(tmp_path):
    made = results()
    part = replace(made, scores=tuple(s for s in made.scores if (s.arm, s.seed, s.fold) not in (
        ("pcl", 0, 1), ("random", 2, 0), ("pcl", 2, 1))))  # fmt: skip
    assert part.gaps("pcl", 2, "random").keys() == {(0, 0), (1, 0), (1, 1)}
    found = part.difference("pcl", 2, "random")
    assert (found.folds, found.seeds) == (3, 2)
    assert found.mean == pytest.approx((0.1 + 0.2) / 2)
    assert "1 of 6 missing" in markdown(part, {"commands": ["c"], "conditions": "x"})
    assert {p.stem for p in draw(part, tmp_path, "x", "conditions")} == {
        "x-classes", "x-differences",
    }  # fmt: skip


def test_histories_of_seeds_are_averaged_step_by_step():
    one = [{"step": 1, "gp": 3.0, "la": 0.5}, {"step": 2, "gp": 2.0}]
    two = [{"step": 1, "gp": 2.0, "la": 0.1}]
    assert averaged([one]) is one
    assert averaged([one, two]) == [{"step": 1, "gp": 2.5, "la": 0.3}, {"step": 2, "gp": 2.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seeds": (1, 1)}, "seeds must be different"), ({"seeds": (-1,)}, "seeds must be different"),
     ({"seeds": ()}, "seeds must be different"), ({"rotate_folds": 3}, "how many of the 2 folds"),
     ({"rotate_folds": -1}, "rotate_folds must be 0")],
)  # fmt: skip
def test_wrong_seeds_and_rotations_are_refused(changes, message, tmp_path):
    base = {
        "name": "table1", "out": tmp_path, "results": None, "arms": (), "labelled": (),
        "folds": (0, 1), "only_pretrain": False, "jobs": 1, "command": "x", "preset": "mini",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**base, **changes)


def test_seeds_from_the_command_line(phantom, tmp_path, capsys):
    small = ["crop=32", "model.width=4", "model.depth=4", "preprocess.spacing=4.0",
             "preprocess.size=32", "device=cpu", "precision=fp32"]  # fmt: skip
    options = [f"--{stage}.{setting}" for stage in ("pretrain", "finetune") for setting in small]
    options += ["--pretrain.slices=8", "--pretrain.optim.steps=2", "--jobs=1", "--threads=1"]
    out = tmp_path / "experiment"
    command = ["experiment", "collapse", "--preset=mini", f"--data={phantom}", f"--out={out}",
               "--endpoint=probe", "--labelled=2", "--arms", "random", "frame-roll",
               "--folds", "0", "1", "2", "--rotate_folds=1", *options]  # fmt: skip
    assert main([*command, "--baseline=random", "--seeds", "0", "2"]) == 0
    text = capsys.readouterr().out
    assert "seeds 0, 2, " in text
    assert "over 2 seeds of the mean over 1 folds, other ones of 3 for each" in text
    assert "## Paired differences from Random" in text
    assert {p.parent.name for p in out.glob("pretrain/*/encoder.safetensors")} == {
        "frame-roll", "frame-roll_s2",
    }  # fmt: skip
    runs = {f"{p.parent.parent.name}/{p.parent.name}" for p in out.glob("probe/*/*/results.json")}
    assert runs == {"random/m2_f0", "frame-roll/m2_f0", "random_s2/m2_f2", "frame-roll_s2/m2_f2"}
    document = json.loads((out / "results" / "collapse-probe.json").read_text())
    assert {(s["seed"], s["fold"]) for s in document["scores"]} == {(0, 0), (2, 2)}
    assert document["differences"][0]["seeds"] == 2
    assert main([*command, "--baseline=dino"]) == 2
    assert "no arm 'dino'" in capsys.readouterr().err
