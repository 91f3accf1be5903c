"""DenseCL: its loss against a loop, its matches against a search, what it contrasts."""

from __future__ import annotations

import math

import pytest
import torch
from test_methods import BATCH, MODEL, TWICE, views
from torch.nn import functional as F

from salkernels.training.experiment.tables import PAPER, TABLES
from salkernels.training.methods.densecl import (
    DenseCL,
    DenseCLConfig,
    dense_loss,
    matches,
    other_view,
)


def method(**settings):
    torch.manual_seed(0)
    return DenseCL(MODEL, DenseCLConfig(**settings), None).eval()


def test_the_match_is_the_most_similar_pixel_of_the_whole_other_view():
    features = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    found = matches(features)
    assert found.shape == (6, 12)
    flat = F.normalize(features, dim=1).flatten(2)
    for i in range(6):
        similar = flat[i].T @ flat[i ^ 1]
        assert torch.equal(found[i], similar.argmax(dim=1))


def test_other_views():
    assert other_view(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("index", [BATCH, TWICE])
def test_the_dense_loss_against_a_loop(index):
    """No slice is its own negative, also where a batch holds it twice."""
    batch = views(index)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(12, 4, 2, 3, generator=generator)
    match = torch.randint(0, 6, (12, 6), generator=generator)
    vectors = F.normalize(pixels.double(), dim=1).flatten(2)
    means = F.normalize(pixels.double().mean(dim=(2, 3)), dim=1)
    losses = []
    for i in range(12):
        for p in range(6):
            query = vectors[i, :, p]
            positive = math.exp(query @ vectors[i ^ 1, :, match[i, p]] / 0.3)
            negatives = [
                math.exp(query @ means[k] / 0.3)
                for k in range(12)
                if batch.sample[k] != batch.sample[i]
            ]
            losses.append(-math.log(positive / (positive + sum(negatives))))
    got = dense_loss(pixels, match, batch.sample, 0.3)
    assert got.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_of_a_step_weighs_slices_and_pixels(weight):
    chosen = method(weight=weight, loss_scale=2.0)
    outcome = chosen(views(BATCH))
    terms = outcome.terms
    expected = 2 * ((1 - weight) * terms["global"] + weight * terms["dense"])
    torch.testing.assert_close(outcome.loss, expected)
    for level in ("global", "dense"):
        assert outcome.chance[level].item() == pytest.approx(math.log(11), rel=1e-5)


def test_pixels_are_matched_by_the_encoder_and_contrasted_by_the_head():
    """A head that is turned round changes no match; another encoder map does."""
    chosen, batch = method(scale=2), views(BATCH)
    features = chosen.encoder(batch.images)[1]
    expected = dense_loss(chosen.dense(features), matches(features), batch.sample, 0.2)
    torch.testing.assert_close(chosen(batch).terms["dense"], expected)
    assert chosen(batch).maps["encoder"].shape == features.shape
    assert method()(batch).maps["encoder"].shape[1] == MODEL.channels[-1]


def test_both_heads_and_the_encoder_learn():
    chosen = method()
    chosen(views(BATCH)).loss.backward()
    for name, parameter in chosen.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, r"densecl\.weight"),
        ({"scale": -1}, r"densecl\.scale"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseCLConfig(**settings)


def test_a_scale_that_the_encoder_lacks_is_refused():
    with pytest.raises(ValueError, match="3 levels"):
        method(scale=4)


def test_it_is_no_row_of_the_papers_tables_but_an_arm_of_the_study():
    assert "densecl" not in PAPER
    assert all(arm.method != "densecl" for arm in TABLES["table1"].arms)
    assert TABLES["collapse"].arm("densecl").method == "densecl"
