"""The losses on the encoder of a MONAI U-Net, with MONAI's transforms making the views."""

import tempfile

import torch
from monai.data import list_data_collate
from monai.networks.nets import BasicUNet
from monai.transforms import Compose, RandAdjustContrastd, RandGaussianNoised, RandScaleIntensityd
from slices import Slices, TwoScans, phantom_files
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import salkernels


class TwoViews(Dataset[list[dict[str, Tensor]]]):
    """Both views of a slice; `list_data_collate` puts the views of all slices into one batch."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices
        self.views = Compose(
            [
                RandScaleIntensityd("image", factors=0.2, prob=1.0),
                RandAdjustContrastd("image", gamma=(0.8, 1.25), prob=1.0),
                RandGaussianNoised("image", std=0.05, prob=1.0),
            ]
        )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, item: int) -> list[dict[str, Tensor]]:
        return [self.views(self.slices[item]) for _ in range(2)]


def main(steps: int = 30) -> BasicUNet:
    """Trains the contracting path for some steps; returns the network, ready for fine-tuning."""
    with tempfile.TemporaryDirectory() as folder:
        slices = Slices(phantom_files(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = BasicUNet(
        spatial_dims=2, in_channels=1, out_channels=4, features=(16, 16, 32, 64, 128, 16)
    ).to(device)
    encoder = [unet.conv_0, unet.down_1, unet.down_2, unet.down_3, unet.down_4]
    projection = nn.Linear(128, 64).to(device)
    trained = nn.ModuleList([*encoder, projection])
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    sampler = TwoScans(slices, n=16, steps=steps)
    for batch in DataLoader(TwoViews(slices), batch_sampler=sampler, collate_fn=list_data_collate):
        batch = {key: torch.as_tensor(value).to(device) for key, value in batch.items()}
        maps = [batch["image"]]
        for level in encoder:
            maps.append(level(maps[-1]))
        features = maps[4]  # scale 4, at 1/8 of the resolution
        embeddings = projection(maps[5].mean(dim=(2, 3)))
        terms = salkernels.sal_loss(
            features, embeddings, batch["volume"], batch["index"], batch["num_slices"], 2
        )
        optimiser.zero_grad()
        terms.loss.backward()
        optimiser.step()
        print(f"loss {terms.loss:.3f} = GP {terms.gp:.3f} + LA {terms.la:.3f}")
    return unet


if __name__ == "__main__":
    main()
