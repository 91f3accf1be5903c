"""The U-Net, its heads, and their weights on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from salkernels.training.models import (
    Embedding,
    Encoder,
    Projection,
    UNet,
    UNetConfig,
    load_encoder,
    load_unet,
    save_encoder,
    save_unet,
)

SMALL = UNetConfig(width=4, depth=5)


def test_encoder_returns_one_map_per_scale():
    maps = Encoder(SMALL)(torch.randn(2, 1, 32, 48))
    assert [tuple(m.shape) for m in maps] == [
        (2, 4 * 2**s, 32 // 2**s, 48 // 2**s) for s in range(5)
    ]


def test_scale_four_is_an_eighth_of_the_input():
    assert Encoder(UNetConfig())(torch.randn(1, 1, 96, 96))[4 - 1].shape == (1, 128, 12, 12)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_unet_keeps_the_plane(norm, depth):
    model = UNet(UNetConfig(width=4, depth=depth, norm=norm, in_channels=2), classes=3)
    assert model(torch.randn(2, 2, 32, 48)).shape == (2, 3, 32, 48)


def test_every_level_has_two_convolutions_and_every_parameter_a_gradient():
    model = UNet(SMALL, 4)
    convolutions = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 2 * SMALL.depth
    model(torch.randn(2, 1, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_size_that_does_not_fit_names_the_multiple():
    with pytest.raises(ValueError, match=r"multiples of 16, got \(40, 32\)"):
        Encoder(SMALL)(torch.randn(1, 1, 40, 32))


@pytest.mark.parametrize(("field", "value"), [("width", 0), ("in_channels", 0), ("depth", 1)])
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        UNetConfig(**{field: value})


def test_embedding_kinds():
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(Embedding("none", 8, 8)(x), x)
    linear, frozen = Embedding("linear", 8, 6), Embedding("orthogonal", 8, 8)
    assert linear(x).shape == (2, 6, 3, 5)
    assert any(p.requires_grad for p in linear.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    # A rotation: it keeps every length and so every cosine.
    torch.testing.assert_close(frozen(x).norm(dim=1), x.norm(dim=1))


def test_projection_is_linear_in_the_pooled_map():
    head, x = Projection(6, 4), torch.randn(3, 6, 5, 7)
    torch.testing.assert_close(head(x), head.layer(x.flatten(2).mean(-1)))


def test_encoder_round_trip_with_statistics(tmp_path):
    encoder = Encoder(SMALL)
    encoder(torch.randn(4, 1, 32, 32))  # moves the running statistics
    save_encoder(tmp_path / "e.safetensors", encoder, {"method": "sal", "step": 7})
    loaded, about = load_encoder(tmp_path / "e.safetensors")
    assert about == {"method": "sal", "step": 7}
    assert loaded.config == SMALL
    x = torch.randn(1, 1, 32, 32)
    for a, b in zip(encoder.eval()(x), loaded.eval()(x), strict=True):
        assert torch.equal(a, b)


def test_encoder_of_a_unet_file(tmp_path):
    model = UNet(SMALL, 4)
    save_unet(tmp_path / "m.safetensors", model, {})
    encoder, _ = load_encoder(tmp_path / "m.safetensors")
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)
    loaded, _ = load_unet(tmp_path / "m.safetensors")
    assert loaded.classes == 4


def test_bad_weight_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"x\.safetensors is not a file"):
        load_encoder(path)
    save_encoder(path, Encoder(SMALL), {})
    with pytest.raises(ValueError, match=r"fine-tuned U-Net is needed"):
        load_unet(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load_encoder(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not written by this package"):
        load_encoder(path)
