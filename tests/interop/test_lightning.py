"""The losses inside Lightning's automatic optimisation: on a CPU, in fp32 and bf16 autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import salkernels

lightning = pytest.importorskip(
    "lightning", reason="lightning is not installed: pip install lightning"
)


class Pretraining(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(16, 24, 3, padding=1),
        )
        self.project = nn.Linear(24, 16)
        self.criterion = salkernels.SALLoss(window_size=2, t=0.35)
        self.losses: list[float] = []
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch, _index):
        images, volume, index, depth = batch
        features = self.encoder(images)
        embeddings = self.project(features.mean(dim=(2, 3)))
        terms = self.criterion(features, embeddings, volume, index, depth)
        self.dtypes |= {features.dtype, terms.loss.dtype}
        self.losses.append(terms.loss.item())
        self.log("loss", terms.loss)
        return terms.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


def batches(number: int) -> list:
    """The same eight slices of two volumes each time: a loss that falls shows that it learns."""
    images = torch.randn(8, 1, 24, 24, generator=torch.Generator().manual_seed(4))
    volume = torch.tensor([0] * 4 + [1] * 4)
    return [(images, volume, torch.arange(4).repeat(2), torch.full((8,), 8))] * number


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_automatic_optimisation(precision, tmp_path):
    torch.manual_seed(0)
    module = Pretraining()
    before = module.encoder[0].weight.detach().clone()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(batches(20), batch_size=None)
    trainer.fit(module, loader)
    assert len(module.losses) == 20
    assert module.losses[-1] < module.losses[0]
    assert not torch.equal(module.encoder[0].weight, before)
    half = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert module.dtypes == {half, torch.float32}, "features in the half type, loss in fp32"
