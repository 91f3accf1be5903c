"""The positional loss and the whole objective, against Eq. 2 and Eq. 3 of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from cases import F64, gp_oracle, oracle
from hypothesis import given
from hypothesis import strategies as st

import salkernels

ALL3 = torch.ones(3, 3, dtype=torch.bool)


@given(
    samples=st.integers(0, 7),
    dimensions=st.integers(1, 5),
    temperature=st.sampled_from([0.05, 0.1, 0.5, 1.0, 10.0]),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_eq_2_by_a_double_loop(samples, dimensions, temperature, density, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, dimensions, dtype=F64, generator=generator)
    positives = torch.rand(samples, samples, generator=generator) < density  # with its diagonal
    expected = gp_oracle(embeddings.tolist(), positives.tolist(), temperature)
    loss = salkernels.gp_loss(embeddings, positives, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_worked_example():
    """Two equal positives and one opposite: -log(e^1 / (e^1 + e^-1)) for each of the two."""
    embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=F64)
    positives = torch.zeros(3, 3, dtype=torch.bool)
    positives[0, 1] = positives[1, 0] = True
    expected = math.log(1 + math.exp(-2))
    assert salkernels.gp_loss(embeddings, positives, 1.0).item() == pytest.approx(expected)
    assert gp_oracle(embeddings.tolist(), positives.tolist(), 1.0) == pytest.approx(expected)


def test_default_temperature_is_a_tenth():
    embeddings = torch.randn(3, 4)
    assert torch.equal(
        salkernels.gp_loss(embeddings, ALL3), salkernels.gp_loss(embeddings, ALL3, 0.1)
    )


def test_the_diagonal_is_ignored():
    embeddings, none = torch.randn(3, 4), torch.zeros(3, 3, dtype=torch.bool)
    itself = torch.eye(3, dtype=torch.bool)
    assert torch.equal(
        salkernels.gp_loss(embeddings, ALL3), salkernels.gp_loss(embeddings, ALL3 & ~itself)
    )
    assert salkernels.gp_loss(embeddings, itself) == salkernels.gp_loss(embeddings, none) == 0


@pytest.mark.parametrize("samples", [0, 1, 4])
def test_no_positive_gives_zero_with_zero_gradient(samples):
    embeddings = torch.randn(samples, 4).requires_grad_()
    loss = salkernels.gp_loss(embeddings, torch.zeros(samples, samples, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_samples_without_a_positive_are_negatives_but_are_not_averaged():
    embeddings = torch.randn(4, 3, dtype=F64)
    positives = torch.zeros(4, 4, dtype=torch.bool)
    positives[0, 1] = True
    sim = torch.exp(torch.cosine_similarity(embeddings[:1], embeddings[1:]) / 0.1)
    expected = -torch.log(sim[0] / sim.sum())
    torch.testing.assert_close(salkernels.gp_loss(embeddings, positives), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fp32_math(dtype):
    embeddings = (10 * torch.randn(6, 8)).to(dtype).requires_grad_()
    positives = torch.rand(6, 6) > 0.5
    wide = embeddings.detach().float().requires_grad_()
    loss, expected = (salkernels.gp_loss(e, positives, 0.05) for e in (embeddings, wide))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(embeddings.grad, wide.grad.to(dtype))


def test_small_temperature_does_not_overflow():
    embeddings = torch.randn(4, 3).requires_grad_()
    loss = salkernels.gp_loss(embeddings, torch.ones(4, 4, dtype=torch.bool), 1e-4)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()


def test_a_dead_embedding_gets_no_gradient():
    """As a feature at or below eps: F.normalize would send it 1 / eps = 1e12."""
    embeddings = torch.randn(4, 3)
    embeddings[1] = 0
    embeddings.requires_grad_()
    salkernels.gp_loss(embeddings, torch.ones(4, 4, dtype=torch.bool)).backward()
    assert (embeddings.grad[1] == 0).all()
    assert embeddings.grad[[0, 2, 3]].any(dim=1).all()


def test_nan_is_not_dropped():
    embeddings = torch.randn(4, 3)
    embeddings[1, 0] = torch.nan
    assert salkernels.gp_loss(embeddings, torch.ones(4, 4, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("lambda_", [0, 1.0, 2.5])
@pytest.mark.parametrize("t", [0.2, 0.35])
def test_eq_3(lambda_, t):
    volume = torch.tensor([4, 4, 4, 9, 9])
    index = torch.tensor([1, 2, 6, 1, 2])
    slices = torch.tensor([10, 10, 10, 6, 6])
    features, embeddings = torch.randn(5, 3, 5, 4, dtype=F64), torch.randn(5, 6, dtype=F64)
    ids = range(5)
    near = [
        [abs(int(index[i]) / int(slices[i]) - int(index[j]) / int(slices[j])) < t for j in ids]
        for i in ids
    ]
    gp = gp_oracle(embeddings.tolist(), near, 0.2)
    losses = [
        oracle(features[i], features[j], (2, 2)).loss.item()
        for i in ids
        for j in ids
        if i != j
        and volume[i] == volume[j]
        and abs(int(index[i]) - int(index[j])) < t * int(slices[i])
    ]
    la = sum(losses) / len(losses)
    terms = salkernels.sal_loss(
        features, embeddings, volume, index, slices, 2, lambda_=lambda_, t=t, temperature=0.2
    )
    assert terms.gp.item() == pytest.approx(gp)
    assert terms.la.item() == pytest.approx(la if lambda_ else 0)
    assert terms.loss.item() == pytest.approx(gp + lambda_ * la)


def test_sal_without_any_pair_or_positive_is_zero():
    features, embeddings = torch.randn(2, 3, 4, 4), torch.randn(2, 6)
    one, two = torch.tensor([1, 2]), torch.tensor([10, 10])
    features.requires_grad_()
    embeddings.requires_grad_()
    terms = salkernels.sal_loss(features, embeddings, one, torch.tensor([0, 9]), two, 2)
    terms.loss.backward()
    assert terms.loss.item() == terms.gp.item() == terms.la.item() == 0
    assert not features.grad.any()
    assert not embeddings.grad.any()
