"""Feature maps of other packages' encoders through the losses, with gradients to their weights.

Random weights: pre-trained ones would have to be downloaded.
"""

from __future__ import annotations

import pytest
import torch

SLICES = (4, 1, 64, 64)


def slices() -> torch.Tensor:
    return torch.randn(SLICES, generator=torch.Generator().manual_seed(0))


def test_monai_unet_bottleneck(learns_from):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    unet = nets.UNet(
        spatial_dims=2, in_channels=1, out_channels=4, channels=(8, 16, 32), strides=(2, 2)
    )
    seen: list[torch.Tensor] = []
    # The encoder's output at 1/2: MONAI nests its levels, so a hook takes what one gives.
    unet.model[1].submodule[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    unet(slices())
    assert seen[0].shape == (4, 16, 16, 16)
    learns_from(unet, seen[0])


def test_monai_basic_unet_encoder(learns_from):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    unet = nets.BasicUNet(spatial_dims=2, in_channels=1, features=(8, 8, 16, 32, 64, 8))
    x = unet.conv_0(slices())
    for down in (unet.down_1, unet.down_2, unet.down_3):
        x = down(x)
    assert x.shape == (4, 32, 8, 8)
    learns_from(torch.nn.ModuleList([unet.conv_0, unet.down_1]), x)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "efficientnet_lite0"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_timm(name, channels_last, learns_from):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    encoder = timm.create_model(name, pretrained=False, features_only=True, in_chans=1)
    images = slices()
    if channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    maps = encoder(images)
    learns_from(encoder, maps[1])


def test_timm_vision_transformer(learns_from):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, in_chans=1, img_size=64, depth=2
    )
    (grid,) = vit.forward_intermediates(slices(), indices=[1], intermediates_only=True)
    assert grid.shape == (4, 192, 4, 4)
    learns_from(vit, grid)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_segmentation_models_pytorch(name, learns_from):
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    )
    model = smp.Unet(name, encoder_weights=None, in_channels=1, classes=4)
    maps = model.encoder(slices())
    learns_from(model.encoder, maps[3])  # 1/8 of the resolution, the paper's scale
    model.zero_grad()
    decoded = model.decoder(model.encoder(slices()))
    learns_from(model, decoded)
