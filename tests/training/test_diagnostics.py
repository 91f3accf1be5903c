"""What every run tells of itself: effective rank, chance levels, drift."""

from __future__ import annotations

import math

import pytest
import torch

from salkernels.training.figures import curves
from salkernels.training.methods import METHODS, SAL, SALConfig
from salkernels.training.methods.base import drift, effective_rank, mean_cosine
from salkernels.training.methods.contrast import alike
from salkernels.training.models import UNetConfig
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import read_metrics

MODEL = UNetConfig(width=4, depth=4)


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_the_rank_of_equally_frequent_orthogonal_directions_is_their_number(kept):
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
    pixels = turn[:kept].repeat(6, 1) * torch.linspace(0.1, 9, 6 * kept)[:, None]
    maps = pixels.T.reshape(1, 7, 2, 3 * kept)
    assert effective_rank(maps).item() == pytest.approx(kept, abs=1e-6)
    assert effective_rank(torch.cat((maps, -maps))).item() == pytest.approx(kept, abs=1e-6)


def test_two_signs_are_seen_by_the_rank_and_not_by_the_cosine():
    line = torch.randn(1, 8, 1, 1) * torch.tensor([1.0, -1.0]).repeat(32).view(1, 1, 8, 8)
    assert abs(mean_cosine(line).item()) < 0.02
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-6)
    assert 6 < effective_rank(torch.randn(4, 8, 16, 16)).item() <= 8
    assert effective_rank(torch.zeros(1, 3, 2, 2)).isfinite()
    row = {"la_pairs": 0.4, "la_control": 0.5, "cosine_embedding": 0.0, "cosine_encoder": 0.3}
    flat = SAL(MODEL, SALConfig(), None).warnings([row, {**row, "rank_embedding": 1.02}])
    assert set(flat) == {"flat embedding"}
    assert "effective rank 1.02 < 1.5" in flat["flat embedding"]


def looks(*cosines):
    return [{"cosine_encoder": cosine} for cosine in cosines]


@pytest.mark.parametrize(
    ("cosines", "said"),
    [
        ([0.475] * 5 + [0.62] * 5, True),
        ([0.8] * 2 + [0.475] * 5 + [0.62] * 5, True),  # from its lowest, not from its start
        ([0.475] * 9 + [0.9], False),  # one look is one batch
        ([0.2] * 5 + [0.45] * 5, False),  # far from anything
        ([0.62] * 20, False),  # high, but at rest
        ([0.475] * 5 + [0.55] * 5, False),
        ([], False),
        ([0.1, 0.9], False),
    ],
)
def test_drift_is_a_rise_of_means_of_looks(cosines, said):
    found = drift(looks(*cosines))
    assert set(found) == ({"drifting encoder"} if said else set())
    if said:
        assert "rose from 0.47 to 0.62" in found["drifting encoder"].replace("0.48", "0.47")


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_sal_tells_of_drift_too(lambda_):
    row = {"la_pairs": 0.4, "la_control": 0.5, "cosine_embedding": 0.4}
    history = [{**row, **look} for look in looks(*[0.4] * 5, *[0.7] * 5)]
    assert set(SAL(MODEL, SALConfig(lambda_=lambda_), None).warnings(history)) == {
        "drifting encoder"
    }


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.trains])
def test_chance_is_what_a_run_logs_beside_its_loss(pretrain_config, method):
    config = pretrain_config(method=method, crop=32 if method != "pirl" else 24)
    pretrain(config)
    row = next(row for row in read_metrics(config.out) if "cosine_encoder" in row)
    samples = 2 * config.slices
    known = {
        "sal": {"chance_gp": math.log(samples - 1)},
        "pcl": {"chance_loss": math.log(samples - 1)},
        "simclr": {"chance_loss": math.log(samples - 1)},
        "ccrop": {"chance_loss": math.log(samples - 1)},
        "rotation": {"chance_loss": math.log(4)},
    }
    for name, level in known.get(method, {}).items():
        assert row[name] == pytest.approx(level, rel=1e-5)
    if method == "gcl":  # the log of 1 and of all samples of other parts
        assert 0 < row["chance_loss"] < math.log(samples)
    if method == "densecl":  # a pixel's own match against both views of three slices
        assert row["chance_global"] == pytest.approx(math.log(samples - 1), rel=1e-5)
        assert row["chance_dense"] == pytest.approx(math.log(samples - 1), rel=1e-5)
    if method == "pirl":
        others = 72 - 1  # slices of the phantom
        level = math.log(1 + others) - others * math.log(1 - 1 / (1 + others))
        for term in ("loss", "jigsaw", "slice"):
            assert row[f"chance_{term}"] == pytest.approx(level, rel=1e-5)
    assert 1 <= row["rank_encoder"] <= MODEL.channels[-1]
    curves(config.out)


def test_embeddings_that_are_alike_have_no_gradient():
    made = alike(torch.randn(5, 3, requires_grad=True))
    assert made.shape == (5, 1)
    assert not made.requires_grad
    assert (made == 1).all()
