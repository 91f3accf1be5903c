"""Interoperation with other packages: each test needs the real one and skips without it."""

from __future__ import annotations

import pytest
import torch

import salkernels


@pytest.fixture
def learns_from():
    """Checks that the losses of feature maps reach the parameters of the network behind them."""

    def check(network: torch.nn.Module, features: torch.Tensor) -> None:
        """features: (S, C, H, W) of four slices, the output of `network`."""
        samples, channels, height, width = features.shape
        assert samples == 4
        pairs = salkernels.slice_pairs(
            torch.zeros(4, dtype=torch.long), torch.arange(4), torch.full((4,), 4), 0.6
        )
        la = salkernels.wla_set_loss(features, pairs, 2)
        assert 0 < la.item() < 2
        assert la.item() == pytest.approx(
            salkernels.wla_set_loss(features, pairs, 2, backend="reference").item(), abs=1e-5
        )
        embeddings = features.mean(dim=(2, 3))
        positives = salkernels.positional_positives(torch.arange(4) / 4, 0.3)
        (la + salkernels.gp_loss(embeddings, positives)).backward()
        reached = [p.grad for p in network.parameters() if p.grad is not None]
        assert reached
        assert all(grad.isfinite().all() for grad in reached)
        assert sum(float(grad.abs().sum()) for grad in reached) > 0
        first = next(network.parameters())
        assert first.grad is not None, "the first layer of the network got no gradient"
        assert first.grad.any()

    return check
