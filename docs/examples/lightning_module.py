"""The same as a LightningModule; Lightning brings precision, devices, checkpoints and loggers."""

import tempfile

import lightning
import torch
from plain_pytorch import Model, augment
from slices import Slices, TwoScans, phantom_files
from torch import Tensor
from torch.utils.data import DataLoader

import salkernels


class Pretraining(lightning.LightningModule):
    """SAL on batches of `Slices`; each process pairs the slices of its own batch."""

    def __init__(self, window_size: int = 2, lambda_: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Model().to(memory_format=torch.channels_last)
        self.criterion = salkernels.SALLoss(window_size, lambda_=lambda_)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        images = torch.cat((augment(batch["image"]), augment(batch["image"])))
        volume, index, depth = (batch[key].repeat(2) for key in ("volume", "index", "num_slices"))
        features, embeddings = self.model(images.contiguous(memory_format=torch.channels_last))
        terms = self.criterion(features, embeddings, volume, index, depth)
        self.log_dict({"gp": terms.gp, "la": terms.la}, batch_size=len(images))
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 30, **trainer: object) -> lightning.Trainer:
    """Trains for some steps; `trainer` goes to `lightning.Trainer`."""
    with tempfile.TemporaryDirectory() as folder:
        data = Slices(phantom_files(folder))
    # Lightning would replace the sampler with its own for several devices.
    fitted = lightning.Trainer(max_steps=steps, use_distributed_sampler=False, **trainer)
    fitted.fit(Pretraining(), DataLoader(data, batch_sampler=TwoScans(data, n=16, steps=steps)))
    return fitted


if __name__ == "__main__":
    main()
