"""SAL in a plain loop: any encoder, two views of each slice, one loss."""

import tempfile
from itertools import pairwise

import torch
from slices import Slices, TwoScans, phantom_files
from torch import Tensor, nn
from torch.utils.data import DataLoader

import salkernels


class Model(nn.Module):
    """An encoder, whose maps the alignment loss takes, and a projection for the positional one.

    The paper has a trainable linear layer E before the alignment loss, which can collapse.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        channels = [1, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for ins, outs in pairwise(channels):
            layers += [nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.encoder = nn.Sequential(*layers)
        self.projection = nn.Linear(channels[-1], 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(images)  # (S, C, H/8, W/8)
        return maps, self.projection(maps.mean(dim=(2, 3)))


def augment(images: Tensor) -> Tensor:
    """Another contrast, brightness and noise for each slice; its pixels stay where they are."""
    gain, bias = torch.rand(2, len(images), 1, 1, 1, device=images.device)
    return (0.8 + 0.4 * gain) * images + 0.4 * (bias - 0.5) + 0.05 * torch.randn_like(images)


def main(steps: int = 30) -> list[float]:
    """Trains for some steps; returns the loss of each."""
    with tempfile.TemporaryDirectory() as folder:
        data = Slices(phantom_files(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # channels_last is the layout that the loss reads fastest.
    model = Model().to(device, memory_format=torch.channels_last)
    criterion = salkernels.SALLoss(window_size=2, lambda_=1.0, t=0.35)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in DataLoader(data, batch_sampler=TwoScans(data, n=16, steps=steps)):
        batch = {key: value.to(device) for key, value in batch.items()}
        # Both views of all slices: the other view of a slice is one of its partners.
        images = torch.cat((augment(batch["image"]), augment(batch["image"])))
        images = images.contiguous(memory_format=torch.channels_last)
        volume, index, depth = (batch[key].repeat(2) for key in ("volume", "index", "num_slices"))
        features, embeddings = model(images)
        terms = criterion(features, embeddings, volume, index, depth)
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        losses.append(terms.loss.item())
        print(f"loss {terms.loss:.3f} = GP {terms.gp:.3f} + LA {terms.la:.3f}")
    return losses


if __name__ == "__main__":
    main()
