"""SAL's remedies against collapse: centring, stop-gradient, normalised and orthogonal E."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from salkernels import wla_loss
from salkernels.training.augment import AugmentConfig, augment, shown, undo
from salkernels.training.methods import SAL, SALConfig, Views, first, second, side_by_side
from salkernels.training.methods.sal import alignment, centred
from salkernels.training.models import UNetConfig
from salkernels.training.models.heads import Embedding

MODEL = UNetConfig(width=4, depth=4)


def views():
    """Two views of two slices of each of two scans."""
    generator = torch.Generator().manual_seed(0)
    volume, index = torch.tensor([[3, 3, 5, 5], [1, 2, 0, 1]]).repeat_interleave(2, dim=1)
    images = torch.randn(8, 1, 32, 32, generator=generator)
    return Views(images, volume, index, torch.full((8,), 6), 6 * volume + index, generator)


def maps(height=5, width=7, dtype=torch.double):
    generator = torch.Generator().manual_seed(0)
    return 3 + torch.randn(3, 4, height, width, dtype=dtype, generator=generator)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])  # most leave ragged windows at the edges
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_centring_by_window_against_a_loop(window, layout):
    x = maps()
    got = centred(x.contiguous(memory_format=layout), "window", window)
    for top, left in itertools.product(range(0, 5, window), range(0, 7, window)):
        inside = (..., slice(top, top + window), slice(left, left + window))
        expected = x[inside] - x[inside].mean(dim=(2, 3), keepdim=True)
        torch.testing.assert_close(got[inside], expected)


def test_centring_by_batch_image_and_not_at_all():
    x = maps()
    assert centred(x, "none", 2) is x
    batch, image = centred(x, "batch", 2), centred(x, "image", 2)
    for channel in range(4):
        torch.testing.assert_close(batch[:, channel], x[:, channel] - x[:, channel].mean())
        for sample in range(3):
            mine = x[sample, channel]
            torch.testing.assert_close(image[sample, channel], mine - mine.mean())


@pytest.mark.parametrize("centre", ["batch", "image", "window"])
def test_centring_of_bf16_leaves_no_common_direction(centre):
    # A mean of 100.3 is rounded to 100.5 in bf16: all pixels would keep −0.2 in common.
    x = (torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1)) + 100.3).bfloat16()
    got = centred(x, centre, 4)
    assert got.dtype == torch.bfloat16
    means = {"batch": (0, 2, 3), "image": (2, 3)}
    rest = F.avg_pool2d(got.float(), 4) if centre == "window" else got.float().mean(means[centre])
    assert rest.abs().max() < 0.01


@pytest.mark.parametrize("centre", ["none", "batch", "image", "window"])
def test_la_of_the_method_is_that_of_the_centred_maps(centre):
    method = SAL(MODEL, SALConfig(centre=centre, window_size=3), corpus=None).eval()
    batch = views()
    outcome = method(batch)
    pairs = method.pairs(batch)
    expected = centred(outcome.maps["embedding"].double(), centre, 3)
    i, j = pairs.nonzero(as_tuple=True)
    torch.testing.assert_close(
        outcome.terms["la"].double(), wla_loss(expected[i], expected[j], 3), atol=1e-5, rtol=0
    )
    assert method.monitor(batch, outcome)["la_pairs"] == pytest.approx(
        outcome.terms["la"].item(), abs=1e-5
    )


def test_stop_gradient_moves_the_query_and_not_its_match():
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    pairs = torch.tensor([[False, True], [False, False]])  # 0 asks, 1 answers
    both, stopped = (alignment(x, None, pairs, 2, stop_gradient=stop) for stop in (False, True))
    torch.testing.assert_close(both, stopped)
    full, half = (torch.autograd.grad(loss, x)[0] for loss in (both, stopped))
    torch.testing.assert_close(full[0], half[0])
    assert full[1].abs().sum() > 0
    assert half[1].abs().sum() == 0


def test_stop_gradient_of_many_pairs_and_of_none():
    x = torch.randn(4, 4, 5, 5, dtype=torch.double, requires_grad=True)
    pairs = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    loss = alignment(x, None, pairs, 2, stop_gradient=True)
    loss.backward()
    parts = [wla_loss(x[i : i + 1], x[j : j + 1].detach(), 2) for i, j in pairs.nonzero().tolist()]
    expected = torch.stack(parts).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x)[0])
    none = alignment(x, None, torch.zeros_like(pairs), 2, stop_gradient=True)
    assert none == 0
    assert torch.autograd.grad(none, x)[0].abs().sum() == 0


def test_normalised_kernels_keep_their_norm_while_they_learn():
    method = SAL(MODEL, SALConfig(embedding="normalised", embedding_dim=6), corpus=None)
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1.0, weight_decay=0.1)
    before = method.embedding.layer.weight.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        method(views()).terms["la"].backward()
        optimiser.step()
    after = method.embedding.layer.weight.detach()
    assert after.shape == (6, 32, 1, 1)
    for weight in (before, after):
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.ones(6))
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize(("dim", "keeps"), [(8, True), (12, True), (3, False)])
def test_orthogonal_embedding_leaves_cosines_alone_unless_it_is_smaller(dim, keeps):
    x = torch.randn(2, 8, 5, 5)
    embedded = Embedding("orthogonal", 8, dim)(x)
    pairs = torch.tensor([[False, True], [True, False]])
    losses = [float(alignment(maps, None, pairs, 2)) for maps in (x, embedded)]
    assert (losses[0] == pytest.approx(losses[1], abs=1e-5)) == keeps


def test_no_threshold_is_refused():
    with pytest.raises(ValueError, match=r"sal\.t is 0"):
        SALConfig(t=0)


def in_frames(images, geometry, seed=0):
    """Two views each of slices of two scans, with random geometry."""
    group = torch.tensor([0, 0, 1, 1]).repeat(2) if geometry == "shared" else None
    config = AugmentConfig(brightness=0, contrast=1, gamma=1, bias=0, noise=0, flip=0.5)
    generator = torch.Generator().manual_seed(seed)
    images, _, frame = augment(images.repeat(2, 1, 1, 1), 32, config, generator, group=group)
    return views()._replace(images=side_by_side(images), frame=side_by_side(frame))


def test_a_common_frame_lets_windows_of_independent_views_correspond():
    coarse = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(1))
    maps = F.interpolate(coarse, size=(48, 48), mode="bicubic", align_corners=False)
    seen_maps = torch.cat(
        [in_frames(maps[:, channel, None], "independent").images for channel in range(5)], 1
    )  # the same geometry for each channel
    settings = SALConfig(common_frame=True, window_size=2)
    method = SAL(MODEL, settings, corpus=None)
    batch = in_frames(maps[:, :1], "independent")
    maps_in_frame, seen = method.aligned(seen_maps, batch)
    one, two = first(maps_in_frame), second(maps_in_frame)
    whole = method.aligned(torch.ones(8, 1, 32, 32), batch)[0].squeeze(1) > 0.999
    assert (seen | ~whole).all()
    assert (method.aligned(torch.ones(8, 1, 32, 32), batch)[0].squeeze(1)[seen] >= 0.24).all()
    both = first(whole) & second(whole)
    same = F.cosine_similarity(one, two)[both]
    astray = F.cosine_similarity(first(seen_maps), second(seen_maps))[both]
    assert same.mean() > 0.98 > 0.6 > astray.mean()


def test_la_with_a_common_frame_is_that_of_the_maps_brought_back():
    method = SAL(MODEL, SALConfig(common_frame=True, window_size=3, centre="image"), None).eval()
    images = torch.randn(4, 1, 48, 48, generator=torch.Generator().manual_seed(2))
    batch = in_frames(images, "independent")
    outcome = method(batch)
    back = undo(centred(outcome.maps["embedding"], "image", 3), batch.frame)
    i, j = method.pairs(batch).nonzero(as_tuple=True)
    seen = shown(batch.frame, *back.shape[2:])
    assert 0.3 < seen.float().mean() < 1
    expected = wla_loss(back[i].double(), back[j].double(), 3, valid=(seen[i], seen[j]))
    torch.testing.assert_close(outcome.terms["la"].double(), expected, atol=1e-5, rtol=0)
    assert method.monitor(batch, outcome)["la_pairs"] == pytest.approx(expected.item(), abs=1e-5)
    outcome.terms["la"].backward()
    assert method.embedding.layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_what_only_one_view_shows_takes_no_part(stop_gradient):
    """Pixels beyond a view used to count as "no match": a constant that told nothing."""
    settings = SALConfig(common_frame=True, embedding="none", stop_gradient=stop_gradient)
    method = SAL(MODEL, settings, None)
    batch = in_frames(torch.randn(4, 1, 32, 32), "independent")
    maps = torch.ones(8, 3, 16, 16)  # all pixels that a view shows match each other
    features, valid = method.aligned(maps, batch)
    pairs = method.pairs(batch)
    assert method.align(features, valid, pairs).item() == pytest.approx(0, abs=1e-6)
    assert method.align(features, None, pairs) > 0.05


def test_what_a_common_frame_cannot_undo_is_an_error(pretrain_config):
    with pytest.raises(ValueError, match="centre=window centres"):
        SALConfig(common_frame=True, centre="window")
    with pytest.raises(ValueError, match="affine transforms only"):
        pretrain_config(sal=SALConfig(common_frame=True), augment=AugmentConfig(elastic=0.01))
