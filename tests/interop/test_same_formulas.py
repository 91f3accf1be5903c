"""Where another package has the same formula, it gives the same number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import salkernels


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("samples", [2, 3, 16])
def test_gp_loss_with_the_other_view_is_nt_xent_of_lightly(samples, temperature):
    """GP with one positive, the other view of the slice, is the loss of SimCLR."""
    loss = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    views = torch.randn(2, samples, 32)
    positives = torch.eye(samples, dtype=torch.bool).repeat(2, 2)  # the diagonal is ignored
    ours = views.clone().requires_grad_()
    theirs = views.clone().requires_grad_()
    value = salkernels.gp_loss(ours.flatten(0, 1), positives, temperature)
    expected = loss.NTXentLoss(temperature=temperature)(theirs[0], theirs[1])
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, ours)
    (expected_grad,) = torch.autograd.grad(expected, theirs)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_the_segmentation_loss_is_monai_s_soft_dice_and_cross_entropy():
    losses = pytest.importorskip("monai.losses", reason="monai is not installed")
    from salkernels.training.finetune import segmentation_loss

    logits = torch.randn(5, 4, 12, 10, requires_grad=True)
    labels = torch.randint(0, 4, (5, 1, 12, 10))
    labels[0] = 0  # a slice without any structure
    dice = losses.DiceLoss(to_onehot_y=True, softmax=True, batch=True)(logits, labels)
    expected = dice + torch.nn.functional.cross_entropy(logits, labels[:, 0])
    value = segmentation_loss()(logits, labels)
    torch.testing.assert_close(value, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(v, logits) for v in (value, expected))
    torch.testing.assert_close(grad, expected_grad)

    # And the formula: 1 - 2 |a b| / (|a| + |b|), over the whole batch, mean over the classes.
    truth = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1).float()
    guess = logits.softmax(dim=1)
    overlap, size = ((x).sum(dim=(0, 2, 3)) for x in (guess * truth, guess + truth))
    torch.testing.assert_close(dice, (1 - 2 * overlap / size).mean(), rtol=1e-4, atol=1e-5)


def test_the_dice_of_a_scan_is_that_of_monai_s_metric():
    metrics = pytest.importorskip("monai.metrics", reason="monai is not installed")
    from salkernels.training.data.datasets import DATASETS
    from salkernels.training.evaluate import dice_per_class

    rng = np.random.default_rng(0)
    guess, truth = rng.integers(0, 4, (2, 9, 8, 5)).astype(np.uint8)
    guess[guess == 3] = 0  # a class that is missed
    ours = dice_per_class(guess, truth, DATASETS["acdc"])
    metric = metrics.DiceMetric(include_background=False, reduction="none", num_classes=4)
    metric(torch.from_numpy(guess)[None, None], torch.from_numpy(truth)[None, None])
    assert ours == pytest.approx(metric.aggregate()[0].tolist())
    for label, value in enumerate(ours, start=1):
        a, b = guess == label, truth == label
        assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
