"""SAL with LA as a contrast: its negatives, placebos, what a run logs, and the arms."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from test_sal_placebos import MODEL, views
from torch.nn import functional as F

from salkernels import wla_contrast
from salkernels.training.augment import shown, undo
from salkernels.training.experiment.plots import COLOURS, look
from salkernels.training.experiment.tables import TABLES
from salkernels.training.methods import SAL, SALConfig
from salkernels.training.methods.base import Outcome, retrieval
from salkernels.training.methods.sal import contrast, rolled
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import read_metrics


def method(**settings):
    torch.manual_seed(0)
    return SAL(MODEL, SALConfig(loss="contrast", **settings), None).eval()


@pytest.mark.parametrize(("t", "t_la"), [(0.35, None), (0.35, 0.15), (0.15, 0.35)])
def test_negatives_against_a_loop(t, t_la):
    batch = views()
    chosen = method(t=t, t_la=t_la)
    negatives, pairs = chosen.negatives(batch), chosen.pairs(batch)
    for i in range(12):
        for j in range(12):
            away = abs(batch.position[i] - batch.position[j])
            if i != j:
                assert negatives[i, j] == (away >= max(t, t_la or 0))
    assert not (negatives & pairs).any()
    across = batch.volume[:, None] != batch.volume
    assert (negatives & across).any()
    assert (negatives & ~across).any()
    assert SAL(MODEL, SALConfig(), None).negatives(batch) is None


@pytest.mark.parametrize("kind", ["near", "same", "other"])
@pytest.mark.parametrize("roll", [False, True])
def test_the_loss_of_a_step_is_gp_and_the_weighted_contrast(kind, roll):
    chosen = method(
        embedding="none", common_frame=True, lambda_=0.2, pairs=kind, roll=roll,
        contrast_temperature=0.3,
    )  # fmt: skip
    batch = views()
    outcome = chosen(batch)
    back = undo(outcome.maps["embedding"], batch.frame).double()
    seen = shown(batch.frame, *back.shape[2:])
    keys, there = (rolled(back), rolled(seen)) if roll else (back, seen)
    pairs, negatives = chosen.pairs(batch), chosen.negatives(batch)
    expected = wla_contrast(back, pairs, negatives, 2, 0.3, keys=keys, valid=(seen, there))
    assert set(outcome.terms) == {"loss", "gp", "contrast"}
    torch.testing.assert_close(outcome.terms["contrast"].double(), expected, atol=1e-4, rtol=0)
    total = outcome.terms["gp"] + 0.2 * outcome.terms["contrast"]
    torch.testing.assert_close(outcome.loss, total)


def test_stopped_keys_get_no_gradient():
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    pairs, negatives = torch.zeros(2, 4, 4, dtype=torch.bool)
    pairs[0, 1], negatives[0, 2] = True, True
    both, stopped = (contrast(x, None, pairs, negatives, 2, 0.1, stop_gradient=s) for s in (0, 1))
    torch.testing.assert_close(both, stopped)
    touched = [
        torch.autograd.grad(loss, x)[0].abs().sum(dim=(1, 2, 3)) > 0 for loss in (both, stopped)
    ]
    assert touched[0].tolist() == [True, True, True, False]
    assert touched[1].tolist() == [True, False, False, False]


def test_gradient_descent_on_e_collapses_under_eq_1_and_not_under_the_contrast():
    """What the whole loss is for, on features that stay: E alone cannot bring it down by making
    all pixels alike."""
    generator = torch.Generator().manual_seed(0)
    batch = views()
    features = torch.randn(12, 8, 6, 6, generator=generator)
    features = features + torch.randn(1, 8, 1, 1, generator=generator)
    cosines = {}
    for loss in ("mae", "contrast"):
        chosen = SAL(MODEL, SALConfig(loss=loss), None)
        pairs, negatives = chosen.pairs(batch), chosen.negatives(batch)
        embedding = torch.nn.Conv2d(8, 8, 1, bias=False)
        torch.nn.init.eye_(embedding.weight[:, :, 0, 0])
        optimiser = torch.optim.Adam(embedding.parameters(), lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            chosen.align(embedding(features), None, pairs, negatives).backward()
            optimiser.step()
        unit = F.normalize(embedding(features), dim=1).movedim(1, -1).flatten(0, 2)
        cosines[loss] = float((unit @ unit.T).mean())
    assert cosines["mae"] > 0.9
    assert cosines["contrast"] < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, r"sal\.loss must be one of mae, contrast, got 'mse'"),
        ({"contrast_temperature": 0.0}, r"sal\.contrast_temperature must be .* > 0, got 0"),
        ({"contrast_temperature": math.inf}, r"sal\.contrast_temperature .* got inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SALConfig(**settings)


def test_a_run_logs_the_contrast_beside_its_chance(pretrain_config):
    config = pretrain_config(sal=SALConfig(loss="contrast", lambda_=0.2, contrast_temperature=0.2))
    pretrain(config)
    rows = read_metrics(config.out)
    assert all("la" not in row for row in rows)
    watched = [row for row in rows if "chance_contrast" in row]
    assert watched
    for row in watched:
        assert 0 < row["contrast"] < row["chance_contrast"] + 1
        # At most all other samples, all pixels of a window.
        assert 0 < row["chance_contrast"] < math.log(1 + 2 * config.slices * 4)
        assert 0 <= row["nearest_same_scan"] <= 1
        assert 0 < row["nearest_distance"] < 1


def test_retrieval_against_a_loop():
    batch = views()
    maps = torch.randn(12, 5, 2, 3, generator=torch.Generator().manual_seed(1))
    found = retrieval(Outcome(maps.sum(), {}, {"encoder": maps}), batch)
    pooled = maps.mean(dim=(2, 3)).numpy()
    same, apart, any_same, any_apart = [], [], [], []
    for i in range(12):
        others = [j for j in range(12) if batch.sample[j] != batch.sample[i]]
        cosines = [
            float(pooled[i] @ pooled[j] / np.linalg.norm(pooled[i]) / np.linalg.norm(pooled[j]))
            for j in others
        ]
        rows = [
            (bool(batch.volume[i] == batch.volume[j]),
             abs(float(batch.position[i]) - float(batch.position[j])))
            for j in others
        ]  # fmt: skip
        best = rows[int(np.argmax(cosines))]
        same.append(best[0])
        apart.append(best[1])
        any_same.append(np.mean([row[0] for row in rows]))
        any_apart.append(np.mean([row[1] for row in rows]))
    assert found == pytest.approx(
        {
            "nearest_same_scan": np.mean(same),
            "nearest_distance": np.mean(apart),
            "chance_nearest_same_scan": np.mean(any_same),
            "chance_nearest_distance": np.mean(any_apart),
        }
    )


def test_retrieval_of_features_that_tell_one_thing():
    batch = views()

    def of(values):
        angles = values * math.pi / 2
        maps = torch.stack((angles.cos(), angles.sin()), dim=1)[..., None, None]
        return retrieval(Outcome(maps.sum(), {}, {}, deepest=maps), batch)

    scan = (batch.volume == 5).double()
    assert of(scan + 1e-3 * torch.rand(12))["nearest_same_scan"] == 1
    by_level = of(batch.position + 1e-6 * scan)
    assert by_level["nearest_distance"] < 0.12 < by_level["chance_nearest_distance"]


def test_retrieval_where_there_is_one_slice():
    batch = views()
    alone = batch._replace(sample=torch.zeros(12, dtype=torch.int64))
    maps = torch.randn(12, 5, 2, 2)
    assert retrieval(Outcome(maps.sum(), {}, {"encoder": maps}), alone) == {}
    assert retrieval(Outcome(maps.sum(), {}), batch) == {}


def test_the_arms_differ_from_the_frame_as_their_names_say():
    frame = TABLES["collapse"].arm("sal-noE-frame").settings
    pull = {"sal.loss": "contrast", "sal.lambda_": 0.2}
    changes = {
        arm.name: dict(arm.settings.items() - frame.items())
        for arm in TABLES["collapse"].arms
        if arm.name.startswith("contrast")
    }
    assert changes == {
        "contrast": pull,
        "contrast-E": {**pull, "sal.embedding": "linear"},
        "contrast-same": {**pull, "sal.pairs": "same"},
        "contrast-other": {**pull, "sal.pairs": "other"},
        "contrast-roll": {**pull, "sal.roll": True},
    }


def test_every_arm_has_a_look_of_its_own():
    most = max(len(table.arms) for table in TABLES.values())
    assert most > 20
    assert most <= len(COLOURS), "two arms of one colour: add colours"
    shades = [mpl.colors.to_rgb(colour) for colour in COLOURS]
    for i, a in enumerate(shades):
        assert all(np.linalg.norm(np.subtract(a, b)) > 0.05 for b in shades[:i])
    looks = [look(number) for number in range(2 * len(COLOURS))]
    assert len(set(looks)) == len(looks)
