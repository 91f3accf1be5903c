"""Losses of the pre-training methods against loops in double precision and closed forms."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from salkernels.training.methods import METHODS, PCLConfig, Views
from salkernels.training.methods.contrast import ContrastConfig
from salkernels.training.methods.gcl import GCL, GCLConfig, partition_loss
from salkernels.training.methods.pcl import PCL
from salkernels.training.methods.pirl import PIRL, PIRLConfig, nce, pieces
from salkernels.training.methods.rotation import Rotation, turn
from salkernels.training.methods.simclr import SimCLR
from salkernels.training.models import UNetConfig

MODEL = UNetConfig(width=4, depth=3)


def corpus(total=24, unseen=()):
    samples = torch.tensor([i for i in range(total) if i not in unseen])
    return SimpleNamespace(num_samples=total, samples=samples)


def views(index, depth=6, seed=0):
    """Two views of slices (scan, slice) of scans of `depth` slices."""
    generator = torch.Generator().manual_seed(seed)
    volume, slices = (
        torch.tensor(column).repeat_interleave(2) for column in zip(*index, strict=True)
    )
    images = torch.randn(len(volume), 1, 24, 24, generator=generator)
    depths = torch.full_like(volume, depth)
    return Views(images, volume, slices, depths, depth * volume + slices, generator)


BATCH = [(0, 0), (0, 2), (0, 5), (1, 1), (1, 2), (1, 4)]
TWICE = [(0, 0), (0, 0), (0, 5), (1, 1), (1, 2), (1, 2)]  # scans with fewer than n/2 slices


def embeddings(count=12, dim=5):
    return torch.randn(count, dim, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def cosines(x):
    return [[float(F.cosine_similarity(a, b, dim=0)) for b in x] for a in x]


def contrast(scores, positives):
    """Mean over samples of the mean over positives of −log of the softmax without oneself."""
    terms = []
    for i, row in enumerate(scores):
        total = sum(math.exp(s) for k, s in enumerate(row) if k != i)
        mine = [-math.log(math.exp(row[j]) / total) for j in positives(i) if j != i]
        if mine:
            terms.append(sum(mine) / len(mine))
    return sum(terms) / len(terms)


def test_methods_are_registered_by_the_names_of_the_tables():
    paper = ["random", "rotation", "pirl", "simclr", "gcl", "pcl", "ccrop", "sal"]
    assert [*METHODS] == [*paper, "densecl"]
    assert {name for name, kind in METHODS.items() if not kind.trains} == {"random"}
    assert {name for name, kind in METHODS.items() if kind.geometry == "shared"} == {"sal"}


def test_simclr_is_the_cross_entropy_of_the_other_view():
    method, x = SimCLR(MODEL, ContrastConfig(temperature=0.2), None), embeddings()
    batch = views(BATCH)
    scores = torch.tensor(cosines(x), dtype=torch.double) / 0.2
    scores.fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(scores, torch.arange(12) ^ 1)
    got = method.contrast(x, batch.sample, batch.position)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_simclr_does_not_repel_a_slice_that_was_drawn_twice():
    method, x = SimCLR(MODEL, ContrastConfig(temperature=0.5), None), embeddings()
    batch = views(TWICE)
    scores = [[s / 0.5 for s in row] for row in cosines(x)]
    same = [[j for j in range(12) if batch.sample[i] == batch.sample[j]] for i in range(12)]
    assert {len(row) for row in same} == {2, 4}
    got = method.contrast(x, batch.sample, batch.position).item()
    assert got == pytest.approx(contrast(scores, same.__getitem__), abs=1e-10)


@pytest.mark.parametrize("index", [BATCH, TWICE])
def test_pcl_pulls_near_positions_of_either_scan(index):
    method, x, batch = (
        PCL(MODEL, PCLConfig(temperature=0.3, t=0.35), None),
        embeddings(),
        views(index),
    )
    scores = [[s / 0.3 for s in row] for row in cosines(x)]
    place = [slice_ / 6 for _, slice_ in index for _ in range(2)]
    near = [[j for j in range(12) if abs(place[i] - place[j]) < 0.35] for i in range(12)]
    got = method.contrast(x, batch.sample, batch.position).item()
    assert got == pytest.approx(contrast(scores, near.__getitem__), abs=1e-10)


@pytest.mark.parametrize(("index", "partitions"), [(BATCH, 4), (BATCH, 3), (TWICE, 2)])
def test_gcl_contrasts_each_pair_with_other_partitions_only(index, partitions):
    config = GCLConfig(temperature=0.3, partitions=partitions)
    method, x, batch = GCL(MODEL, config, None), embeddings(), views(index)
    scores = cosines(x)
    part = [slice_ * partitions // 6 for _, slice_ in index for _ in range(2)]
    terms = []
    for i, j in itertools.permutations(range(12), 2):
        if part[i] == part[j]:
            others = sum(math.exp(scores[i][k] / 0.3) for k in range(12) if part[k] != part[i])
            own = math.exp(scores[i][j] / 0.3)
            terms.append(-math.log(own / (own + others)))
    got = method.contrast(x, batch.sample, batch.position).item()
    assert got == pytest.approx(sum(terms) / len(terms), abs=1e-5)  # it computes in fp32


def test_gcl_without_negatives_or_without_positives_is_zero_with_zero_gradient():
    for same in (torch.ones(4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)):
        x = torch.randn(4, 3, requires_grad=True)
        loss = partition_loss(x, same, 0.1)
        loss.backward()
        assert loss == 0
        assert torch.equal(x.grad, torch.zeros(4, 3))


def test_autocast_does_not_round_the_cosines():
    """exp(cosine / τ) of cosines in bf16 would be off by some per cent."""
    x = F.normalize(torch.randn(16, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    same = torch.arange(16)[:, None] // 4 == torch.arange(16)[None, :] // 4
    negatives = x.roll(1, 0)[:, None].expand(-1, 5, -1)
    for loss in (
        lambda: partition_loss(x, same, 0.07),
        lambda: nce(x.roll(3, 0), x, negatives, 0.07),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            low = loss()
        torch.testing.assert_close(low, loss(), atol=0, rtol=0)


def test_turns_are_counted_counter_clockwise_and_equally_frequent():
    images = torch.arange(4 * 9.0).view(4, 1, 3, 3)
    turned = turn(images, torch.tensor([0, 1, 2, 3]))
    for k, image in enumerate(turned[:, 0]):
        for row, column in itertools.product(range(3), repeat=2):
            r, c = row, column
            for _ in range(k):  # where it was a quarter turn earlier: the top row was on the right
                r, c = c, 2 - r
            assert image[row, column] == images[k, 0, r, c]
    drawn = Rotation(MODEL, None, None).draw(views(BATCH))
    assert torch.bincount(drawn, minlength=4).tolist() == [3, 3, 3, 3]


def test_rotation_is_cross_entropy_over_the_turns_that_were_made(monkeypatch):
    method, batch = Rotation(MODEL, None, None).eval(), views(BATCH)
    turns = torch.tensor([3, 1, 0, 2] * 3)
    monkeypatch.setattr(method, "draw", lambda _: turns)
    outcome = method(batch)
    losses, right = [], 0
    for image, k in zip(batch.images, turns.tolist(), strict=True):
        deepest = method.encoder(torch.rot90(image[None], k, (2, 3)))[-1]
        logits = method.classifier.layer(deepest.mean(dim=(2, 3)))[0].double()
        losses.append(logits.exp().sum().log() - logits[k])
        right += int(logits.argmax() == k)
    torch.testing.assert_close(outcome.loss.double(), sum(losses) / 12, atol=1e-5, rtol=0)
    assert outcome.terms["accuracy"] == pytest.approx(right / 12)


@pytest.mark.parametrize("shape", [(24, 24), (32, 32), (26, 40)])
def test_pieces_lie_in_the_middle_of_their_thirds(shape):
    height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cut = pieces(torch.stack((rows, columns))[None].float(), stride=4)
    side = min(shape) // 3 // 4 * 4
    assert cut.shape == (1, 9, 2, side, side)
    for k, piece in enumerate(cut[0]):
        # Pixel centres: the piece's middle is that of its third, to half a pixel of rounding.
        middle = piece.mean(dim=(1, 2)) + 0.5
        third = torch.tensor([(k // 3 + 0.5) * height / 3, (k % 3 + 0.5) * width / 3])
        assert (middle - third).abs().max() <= 1
        assert piece[0, 1, 0] - piece[0, 0, 0] == 1  # not transposed


def test_every_piece_is_in_the_jigsaw_once_in_an_order_of_the_image():
    method, images = PIRL(MODEL, PIRLConfig(), corpus()), views(BATCH).images
    ordered = pieces(images, 4)
    shuffled = method.shuffled(images, torch.Generator().manual_seed(3))
    orders = []
    for mine, all_ in zip(shuffled, ordered, strict=True):
        orders.append(tuple(next(k for k in range(9) if torch.equal(p, all_[k])) for p in mine))
        assert sorted(orders[-1]) == [*range(9)]
    assert len(set(orders)) > 8


def test_nce_against_loops():
    x = F.normalize(embeddings(3 * 6), dim=1).view(3, 6, 5)
    own, features, negatives = x[:, 0], x[:, 1], x[:, 2:]
    got = nce(own, features, negatives, 0.2)
    for b in range(3):
        scores = [math.exp(float(features[b] @ v) / 0.2) for v in (own[b], *negatives[b])]
        h = [s / sum(scores) for s in scores]
        expected = -math.log(h[0]) - sum(math.log(1 - p) for p in h[1:])
        assert float(got[b]) == pytest.approx(expected, abs=1e-10)


def test_nce_stays_finite_when_a_negative_takes_all():
    own, features = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]], requires_grad=True)
    loss = nce(own, features, torch.tensor([[[0.0, 1]]]), 0.01).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_pirl_joins_both_losses_and_moves_the_bank_after_them():
    method = PIRL(MODEL, PIRLConfig(weight=0.3, momentum=0.75, negatives=7), corpus()).eval()
    batch, before = views(BATCH), method.bank.clone()
    drawn, used = method.draw, []
    method.draw = lambda *arguments: used.append(drawn(*arguments)) or used[0]
    state = batch.generator.get_state()
    outcome = method(batch)
    batch.generator.set_state(state)
    sample = batch.sample[0::2]
    with torch.no_grad():
        f = F.normalize(method.slice_head(method.encoder(batch.images[0::2])[-1]), dim=1)
        g = F.normalize(method.jigsaw(batch.images[1::2], batch.generator), dim=1)
        losses = [nce(before[sample], v, before[used[0]], 0.07).mean() for v in (g, f)]
        torch.testing.assert_close(outcome.terms["jigsaw"], losses[0])
        torch.testing.assert_close(outcome.terms["slice"], losses[1])
        torch.testing.assert_close(outcome.loss, 0.3 * losses[0] + 0.7 * losses[1])
    for entry in range(24):
        expected = before[entry]
        if entry in sample:
            own = f[sample.tolist().index(entry)]
            expected = F.normalize(0.75 * before[entry] + 0.25 * own, dim=0)
        torch.testing.assert_close(method.bank[entry], expected)


def test_a_slice_held_twice_moves_its_entry_by_the_mean():
    method = PIRL(MODEL, PIRLConfig(momentum=0.5, projection_dim=2), corpus(3))
    method.bank.copy_(torch.tensor([[1.0, 0], [1, 0], [1, 0]]))
    method.remember(torch.tensor([2, 0, 2]), torch.tensor([[0.0, 1], [1, 0], [-1, 0]]))
    half = torch.tensor([0.5 - 0.25, 0.25])
    torch.testing.assert_close(method.bank[2], half / half.norm())
    torch.testing.assert_close(method.bank[:2], torch.tensor([[1.0, 0], [1, 0]]))


def test_no_gradient_reaches_the_bank_and_every_head_learns():
    method = PIRL(MODEL, PIRLConfig(), corpus())
    method(views(BATCH)).loss.backward()
    assert not method.bank.requires_grad
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_negatives_are_all_seen_others_with_equal_chance():
    unseen = {0, 5, 9}
    method = PIRL(MODEL, PIRLConfig(negatives=10), corpus(12, unseen))
    sample = torch.tensor([1, 4, 11])
    generator = torch.Generator().manual_seed(4)
    drawn = torch.cat([method.draw(sample, generator) for _ in range(500)], dim=1)
    assert drawn.shape == (3, 500 * 8)  # no more than there are others
    for own, row in zip(sample.tolist(), drawn, strict=True):
        counts = torch.bincount(row, minlength=12)
        others = [i for i in range(12) if i != own and i not in unseen]
        assert counts.nonzero().flatten().tolist() == others
        # Chi-square with 7 degrees of freedom: above 24.3 in 0.1 % of draws.
        assert ((counts[others] - 500.0) ** 2 / 500).sum() < 24.3


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ContrastConfig, {"temperature": 0}, "temperature must be > 0, got 0"),
        (ContrastConfig, {"projection_dim": 0}, "projection_dim"),
        (GCLConfig, {"partitions": 1}, "at least 2, got 1"),
        (PCLConfig, {"t": 0}, r"\(0, 1\], got 0"),
        (PCLConfig, {"t": 1.1}, r"\(0, 1\], got 1.1"),
        (PIRLConfig, {"temperature": -1}, "pirl.temperature"),
        (PIRLConfig, {"weight": 1.5}, r"pirl.weight must be in \[0, 1\]"),
        (PIRLConfig, {"momentum": -0.1}, "pirl.momentum"),
        (PIRLConfig, {"negatives": 0}, "pirl.negatives"),
    ],
)
def test_impossible_settings_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)
