"""A pre-trained encoder leaves the package: read by plain safetensors and torch, used elsewhere.

The levels of the encoder are double convolutions without bias, with BatchNorm and LeakyReLU, and
maxima between them. A network takes the weights where its convolutions have the same shapes:

- the decoder of segmentation-models-pytorch takes the maps of any encoder, so all of ours fits
  before it; into one of its own encoders (ResNet and so on) it does not;
- MONAI's BasicUNet has the same convolutions (with a bias, zero here); its norm and slope must be
  set to ours. Then its encoder computes the same;
- MONAI's UNet does not fit: its levels halve the resolution by strided convolutions, one for each.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai", reason="monai is not installed: pip install 'salkernels[training]'")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from salkernels.training.models import Encoder, UNetConfig, save_encoder  # noqa: E402

CONFIG = UNetConfig(width=8, depth=5)
IMAGES = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exported(tmp_path):
    """encoder.safetensors, as a pre-training run leaves it, and the maps it gives for IMAGES."""
    torch.manual_seed(3)
    encoder = Encoder(CONFIG)
    for _ in range(3):  # BatchNorm has statistics of its own then
        encoder(torch.randn(4, 1, 64, 64) * 2 + 1)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, {"method": "sal"})
    with torch.no_grad():
        return path, encoder.eval()(IMAGES)


class PlainEncoder(nn.Module):
    """The encoder in plain torch, from the shapes in the file alone."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in sorted({int(name.split(".")[1]) for name in weights}):
            blocks: list[nn.Module] = []
            for conv in (0, 3):
                out, into, *_ = weights[f"levels.{level}.{conv}.weight"].shape
                blocks += [nn.Conv2d(into, out, 3, padding=1, bias=False)]
                blocks += [nn.BatchNorm2d(out), nn.LeakyReLU(0.01)]
            self.levels.append(nn.Sequential(*blocks))
        self.load_state_dict(weights)
        self.channels = [level[0].out_channels for level in self.levels]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for level in self.levels:
            x = level(nn.functional.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps


def test_plain_torch_reads_it_back(exported):
    path, expected = exported
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["salkernels"])
    assert about["kind"] == "encoder"
    assert about["model"] == {"in_channels": 1, "width": 8, "depth": 5, "norm": "batch"}
    plain = PlainEncoder(safetensors.load_file(path)).eval()
    with torch.no_grad():
        for ours, theirs in zip(plain(IMAGES), expected, strict=True):
            assert torch.equal(ours, theirs)


def assert_trains(model: nn.Module, first: nn.Parameter) -> None:
    """One step of fine-tuning moves the encoder's weights."""
    model.train()
    before = first.detach().clone()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(IMAGES)
    assert logits.shape == (2, 4, 64, 64)
    labels = torch.randint(0, 4, (2, 64, 64))
    nn.functional.cross_entropy(logits, labels).backward()
    optimiser.step()
    assert not torch.equal(first, before)


def test_in_a_unet_of_segmentation_models_pytorch(exported):
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    )
    path, expected = exported
    model = SmpUNet(PlainEncoder(safetensors.load_file(path)), smp)
    with torch.no_grad():
        for ours, theirs in zip(model.eval().encoder(IMAGES), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert_trains(model, model.encoder.levels[0][0].weight)


class SmpUNet(nn.Module):
    """Their decoder and head behind our encoder."""

    def __init__(self, encoder: PlainEncoder, smp) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = smp.decoders.unet.decoder.UnetDecoder(
            encoder_channels=[1, *encoder.channels], decoder_channels=[64, 32, 16, 8], n_blocks=4
        )
        self.head = smp.base.SegmentationHead(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder([x, *self.encoder(x)]))  # it drops the first map


def test_in_monai_basic_unet(exported):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    path, expected = exported
    unet = nets.BasicUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=4,
        features=(8, 16, 32, 64, 128, 8),
        norm=("batch", {"affine": True}),
        act=("LeakyReLU", {"negative_slope": 0.01, "inplace": True}),
    )
    levels = [unet.conv_0, *(getattr(unet, f"down_{i}").convs for i in range(1, 5))]
    plain = PlainEncoder(safetensors.load_file(path))
    for theirs, ours in zip(levels, plain.levels, strict=True):
        for block, (conv, norm) in ((theirs.conv_0, ours[0:2]), (theirs.conv_1, ours[3:5])):
            block.conv.weight.data.copy_(conv.weight.data)
            block.conv.bias.data.zero_()
            block.adn.N.load_state_dict(norm.state_dict())
    unet.eval()
    with torch.no_grad():
        x = unet.conv_0(IMAGES)
        for level in range(1, 5):
            x = getattr(unet, f"down_{level}")(x)
    torch.testing.assert_close(x, expected[-1], rtol=1e-4, atol=1e-5)
    assert_trains(unet, unet.conv_0.conv_0.conv.weight)


def test_monai_unet_does_not_fit():
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    unet = nets.UNet(
        spatial_dims=2, in_channels=1, out_channels=4, channels=CONFIG.channels, strides=(2,) * 4
    )
    ours = [tuple(p.shape) for p in Encoder(CONFIG).parameters() if p.dim() == 4]
    theirs = [tuple(p.shape) for p in unet.parameters() if p.dim() == 4]
    # The two convolutions of the first level: it has one, and the second is of the next level.
    assert ours[:2] == [(8, 1, 3, 3), (8, 8, 3, 3)]
    assert theirs[:2] == [(8, 1, 3, 3), (16, 8, 3, 3)]
