"""SAL as a method: its loss from the paper's parts, and the watch on collapse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from salkernels import wla_set_loss
from salkernels.training.methods import SAL, SALConfig, Views
from salkernels.training.methods.base import mean_cosine
from salkernels.training.models import UNetConfig

MODEL = UNetConfig(width=4, depth=4)


def views(samples=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    volume = torch.tensor([3, 3, 5, 5]).repeat(samples // 4)
    index = torch.randint(0, 6, (samples,), generator=generator)
    images = torch.randn(samples, 1, 32, 32, generator=generator)
    depth = torch.full((samples,), 6)
    return Views(images, volume, index, depth, 6 * volume + index, torch.Generator())


def naive(method, batch, t, tau, window):
    """Eq. 1 to 3 with loops over samples, windows and pixels, in double precision."""
    maps = method.encoder(batch.images)
    local = F.normalize(method.embedding(maps[3]).double(), dim=1)
    unit = F.normalize(method.projection(maps[-1]).double(), dim=1)
    count, _, height, width = local.shape
    gp, la = [], []
    for i in range(count):
        position = [batch.slice_index[j].item() / 6 for j in range(count)]
        positives = [j for j in range(count) if j != i and abs(position[i] - position[j]) < t]
        scores = torch.stack([(unit[i] @ unit[j] / tau).exp() for j in range(count)])
        if positives:
            total = scores.sum() - scores[i]
            gp.append(-torch.stack([(scores[j] / total).log() for j in positives]).mean())
        for j in range(count):
            near = abs(int(batch.slice_index[i]) - int(batch.slice_index[j])) < t * 6
            if i == j or batch.volume[i] != batch.volume[j] or not near:
                continue
            losses = []
            for r, c in itertools.product(range(height), range(width)):
                top, left = r // window * window, c // window * window
                part = local[j, :, top : top + window, left : left + window].flatten(1)
                losses.append((1 - (local[i, :, r, c] @ part).max()).abs())
            la.append(torch.stack(losses).mean())
    return torch.stack(gp).mean(), torch.stack(la).mean()


@pytest.mark.parametrize("window", [2, 3])
def test_loss_is_equation_three(window):
    torch.manual_seed(0)
    config = SALConfig(window_size=window, lambda_=2.5, t=0.4, temperature=0.2)
    method = SAL(MODEL, config, corpus=None).eval()
    batch = views()
    outcome = method(batch)
    gp, la = naive(method, batch, 0.4, 0.2, window)
    torch.testing.assert_close(outcome.terms["gp"].double(), gp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outcome.terms["la"].double(), la, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outcome.loss.double(), gp + 2.5 * la, atol=1e-5, rtol=1e-5)


def test_every_part_learns_and_a_frozen_embedding_does_not():
    for kind, learns in (("linear", True), ("orthogonal", False)):
        method = SAL(MODEL, SALConfig(embedding=kind), corpus=None)
        method(views()).loss.backward()
        assert (method.embedding.layer.weight.grad is not None) == learns
        assert all(p.grad is not None for p in method.encoder.parameters())
        for linear in (method.projection.layer[0], method.projection.layer[2]):
            assert linear.weight.grad.abs().sum() > 0


def test_lambda_zero_leaves_the_embedding_alone():
    method = SAL(MODEL, SALConfig(lambda_=0), corpus=None)
    outcome = method(views())
    assert outcome.terms["la"] == 0
    outcome.loss.backward()
    assert method.embedding.layer.weight.grad is None


def test_monitor_tells_true_pairs_from_other_scans():
    method = SAL(MODEL, SALConfig(embedding="none"), corpus=None).eval()
    batch = views()
    # Every sample of a scan shows the same image, so true pairs match perfectly.
    base = torch.randn(2, 1, 32, 32)
    images = torch.where((batch.volume == 3)[:, None, None, None], base[:1], base[1:])
    batch = batch._replace(images=images, slice_index=torch.zeros_like(batch.slice_index))
    figures = method.monitor(batch, method(batch))
    assert figures["la_pairs"] < 1e-5
    assert figures["la_control"] > 1e-3
    assert figures["cosine_embedding"] == pytest.approx(figures["cosine_encoder"], abs=1e-6)


def test_the_control_takes_near_positions_of_other_scans():
    method = SAL(MODEL, SALConfig(embedding="none", t=0.4), corpus=None).eval()
    batch = views()._replace(num_slices=torch.tensor([6, 6, 9, 9]).repeat(2))
    outcome = method(batch)
    count = len(batch.images)
    control = torch.zeros(count, count, dtype=torch.bool)
    for i, j in itertools.product(range(count), repeat=2):
        positions = [int(batch.slice_index[k]) / int(batch.num_slices[k]) for k in (i, j)]
        other = batch.volume[i] != batch.volume[j]
        control[i, j] = bool(other) and abs(positions[0] - positions[1]) < 0.4
    assert 0 < control.sum() < 32  # some of the pairs, not all
    expected = wla_set_loss(outcome.maps["embedding"], control, 2)
    assert method.monitor(batch, outcome)["la_control"] == pytest.approx(expected.item())


def test_mean_cosine_against_all_pairs():
    x = torch.randn(3, 5, 2, 2, dtype=torch.double)
    rows = F.normalize(x.permute(0, 2, 3, 1).reshape(-1, 5), dim=1)
    pairs = [a @ b for a, b in itertools.permutations(rows, 2)]
    torch.testing.assert_close(
        mean_cosine(x).double(), torch.stack(pairs).mean(), atol=1e-6, rtol=0
    )
    assert mean_cosine(torch.ones(2, 3, 4, 4)) == pytest.approx(1)


def figures(**changes):
    healthy = {"la_pairs": 0.4, "la_control": 0.5, "cosine_embedding": 0.4, "cosine_encoder": 0.3}
    return {**healthy, **changes}


def test_warnings_come_when_features_collapse():
    method = SAL(MODEL, SALConfig(), corpus=None)
    assert method.warnings([]) == {}
    assert method.warnings([figures(), figures(la_pairs=0.1)]) == {}
    assert set(method.warnings([figures(), figures(cosine_embedding=0.95)])) == {
        "collapsed embedding"
    }
    assert set(method.warnings([figures(), figures(cosine_encoder=0.95)])) == {"collapsed encoder"}
    # Single batches of a healthy run differ by a factor of two.
    assert method.warnings([figures(), figures(la_pairs=0.1, la_control=0.24)]) == {}
    history = [figures(), figures(la_pairs=0.05, la_control=0.1)]
    fallen = method.warnings(history)
    assert set(fallen) == {"control falls"}
    assert "0.500 to 0.100" in fallen["control falls"]
    # The advice is something that the run does not do already.
    assert "sal.embedding" in fallen["control falls"]
    fixed = SAL(MODEL, SALConfig(embedding="orthogonal"), corpus=None).warnings(history)[
        "control falls"
    ]
    assert "sal.embedding" not in fixed
    assert "smaller sal.lambda_" in fixed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "at least 1"),
        ({"lambda_": -1}, "lambda_"),
        ({"t": 1.5}, r"\[0, 1\]"),
        ({"temperature": 0}, "temperature"),
        ({"scale": 0}, "scale"),
        ({"projection_dim": 0}, "projection_dim"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SALConfig(**changes)


def test_scale_beyond_the_encoder():
    with pytest.raises(ValueError, match="has 4 levels"):
        SAL(MODEL, SALConfig(scale=5), corpus=None)
