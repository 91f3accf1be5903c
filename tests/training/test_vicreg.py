"""VICReg's terms on E's output: closed forms, what they see, what SAL makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from test_sal_placebos import MODEL, views
from torch.nn import functional as F

from salkernels.training.experiment.tables import TABLES
from salkernels.training.methods import SAL, SALConfig
from salkernels.training.methods.vicreg import EPS, variance_covariance
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import read_metrics

D = 6
FLAT = 1 - math.sqrt(EPS)  # of a dimension that does not vary


def terms(vectors):
    """Of vectors (N, D) as pixels of two maps."""
    maps = torch.as_tensor(vectors).float().view(2, -1, 1, vectors.shape[1]).movedim(-1, 1)
    return [term.item() for term in variance_covariance(maps)]


def directions(count=4000):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(0))


def test_one_direction_and_one_line_and_all_directions():
    line = torch.ones(1000, D)
    line[::2] *= -1
    assert terms(torch.ones(1000, D)) == [pytest.approx(FLAT), pytest.approx(0, abs=1e-6)]
    assert terms(line) == [0, pytest.approx(D - 1, rel=5e-3)]  # the cosine's mean is 0
    axis = line * torch.eye(D)[0]
    assert terms(axis) == [pytest.approx(FLAT * (D - 1) / D), pytest.approx(0, abs=1e-4)]
    assert terms(directions()) == [pytest.approx(0, abs=0.02), pytest.approx(0, abs=0.02)]


def test_neither_size_nor_a_large_mean_gets_round_them():
    """As they would of raw features: the variance of all dimensions is 1 here, cosines are .99."""
    spread = directions()
    assert terms(7 * spread) == pytest.approx(terms(spread), abs=1e-5)
    pulled = spread + 10 * torch.ones(D)
    unit = F.normalize(pulled, dim=1)
    assert (unit @ unit.T).mean() > 0.98
    assert terms(pulled)[0] > 0.7


def test_against_a_loop():
    vectors = directions(40).double()
    unit = math.sqrt(D) * vectors / vectors.norm(dim=1, keepdim=True)
    means = [sum(v[d] for v in unit) / 40 for d in range(D)]
    cov = [
        [float(sum((v[d] - means[d]) * (v[e] - means[e]) for v in unit) / 39) for e in range(D)]
        for d in range(D)
    ]
    variance = sum(max(0.0, 1 - math.sqrt(cov[d][d] + EPS)) for d in range(D)) / D
    covariance = sum(cov[d][e] ** 2 for d in range(D) for e in range(D) if d != e) / D
    assert terms(vectors) == [
        pytest.approx(variance, rel=1e-4),
        pytest.approx(covariance, rel=1e-4),
    ]


@pytest.mark.parametrize("lambda_", [0.0, 0.5])
def test_the_loss_of_a_step_has_them_by_their_weights(lambda_):
    def step(**settings):
        torch.manual_seed(0)
        return SAL(MODEL, SALConfig(lambda_=lambda_, **settings), None).eval()(views())

    plain, spread = step(), step(variance=2.0, covariance=0.3)
    assert set(spread.terms) - set(plain.terms) == {"variance", "covariance"}
    variance, covariance = variance_covariance(spread.maps["embedding"])
    torch.testing.assert_close(spread.terms["variance"], variance)
    torch.testing.assert_close(spread.loss, plain.loss + 2 * variance + 0.3 * covariance)
    assert spread.terms["loss"] is spread.loss


def test_e_takes_part_without_la_where_they_do():
    assert SAL(MODEL, SALConfig(lambda_=0.0), None).leaves_parameters_out
    chosen = SAL(MODEL, SALConfig(lambda_=0.0, covariance=1.0), None)
    assert not chosen.leaves_parameters_out
    chosen(views()).loss.backward()
    assert all(p.grad is not None for p in chosen.parameters())


def test_gradient_descent_on_e_does_not_collapse_under_them():
    """On features that stay, as in the test of the contrast; with Eq. 1 alone cosines end at 1."""
    generator = torch.Generator().manual_seed(0)
    batch = views()
    features = torch.randn(12, 8, 6, 6, generator=generator)
    features = features + torch.randn(1, 8, 1, 1, generator=generator)
    cosines = {}
    for weight in (0.0, 1.0):
        chosen = SAL(MODEL, SALConfig(), None)
        embedding = torch.nn.Conv2d(8, 8, 1, bias=False)
        torch.nn.init.eye_(embedding.weight[:, :, 0, 0])
        optimiser = torch.optim.Adam(embedding.parameters(), lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            embedded = embedding(features)
            variance, covariance = variance_covariance(embedded)
            loss = chosen.align(embedded, None, chosen.pairs(batch))
            (loss + weight * (variance + 0.04 * covariance)).backward()
            optimiser.step()
        unit = F.normalize(embedding(features).detach(), dim=1).movedim(1, -1).flatten(0, 2)
        cosines[weight] = float((unit @ unit.T).mean())
    assert cosines[0.0] > 0.9
    assert cosines[1.0] < 0.3


def test_a_run_logs_them(pretrain_config):
    config = pretrain_config(sal=SALConfig(variance=1.0, covariance=0.04))
    pretrain(config)
    for row in read_metrics(config.out):
        total = row["gp"] + row["la"] + row["variance"] + 0.04 * row["covariance"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["variance", "covariance"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_weights_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"sal\.{name} is a weight"):
        SALConfig(**{name: value})


def test_the_arm_differs_from_sal_in_these_weights_alone():
    arm = TABLES["collapse"].arm("sal-vicreg")
    assert arm.method == "sal"
    assert dict(arm.settings) == {"sal.variance": 1.0, "sal.covariance": 0.04}
