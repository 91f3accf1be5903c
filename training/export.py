"""Pre-trained encoders and fine-tuned U-Nets as networks of other packages.

The levels of the encoder are double convolutions without bias, with a norm and LeakyReLU, and
maxima between them. A network takes the weights where its convolutions have the same shapes:

- MONAI's BasicUNet does, all of it, with five levels: its biases are 0, and of its last level up,
  which has twice the channels, one half is 0;
- the U-Net decoder of segmentation-models-pytorch takes the maps of any encoder, so ours comes
  whole before it;
- MONAI's UNet does not: its levels halve the resolution by strided convolutions, one for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .models import Encoder, UNet, UNetConfig, load_network
from .models.unet import SLOPE

Weights = str | Path | Encoder | UNet
LEVELS = 5  # of BasicUNet


def to_torch(weights: Weights) -> fx.GraphModule:
    """The network as a module of torch alone: nothing of this package is needed to load it again.

    Args:
        weights: file or run folder of an encoder or a U-Net, or the module itself.

    Returns:
        A module in eval mode, (B, 1, H, W) -> a tuple of maps, one for each scale, for an encoder;
        logits (B, K, H, W) for a U-Net. H and W must be multiples of 2^(levels − 1). Parameters
        keep their names, so `state_dict` is that of the network here. `torch.save(module, path)`
        and `torch.load(path, weights_only=False)` work where only torch is installed;
        `module.code` shows the computation.
    """
    network = _network(weights)
    traced = fx.Tracer().trace(_Plain(network))
    root = nn.Module()
    for name, child in network.named_children():
        root.add_module(name, child)
    for node in traced.nodes:
        node.type = (
            None  # annotations are text here, which older torch (seen with 2.13) cannot save
        )
        if node.op == "call_module":
            node.target = node.target.removeprefix("network.")
    return fx.GraphModule(root, traced, type(network).__name__).eval()


class _Plain(nn.Module):
    """Without the check of the input's size, which tracing cannot follow."""

    def __init__(self, network: Encoder | UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        if isinstance(self.network, UNet):
            return self.network.decoder(self.maps(self.network.encoder, images))
        return tuple(self.maps(self.network, images))

    @staticmethod
    def maps(encoder: Encoder, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for level in encoder.levels:
            x = level(encoder.pool(found[-1]) if found else x)
            found.append(x)
        return found


def to_monai(weights: Weights, out_channels: int | None = None) -> nn.Module:
    """A `monai.networks.nets.BasicUNet` with these weights, in eval mode.

    Args:
        weights: file or run folder of an encoder or a U-Net, or the module itself.
        out_channels: classes of the network, for an encoder: its decoder has random weights then.
            A fine-tuned U-Net brings its own, and the network computes what it does.

    Raises:
        ValueError: the network has not the five levels of BasicUNet, each with a norm, or
            `out_channels` is missing or not that of the U-Net.
        ImportError: MONAI is not installed.
    """
    from monai.networks.nets import BasicUNet

    network = _network(weights)
    classes = _classes(network, out_channels)
    config = network.config
    unet: Any = BasicUNet(**basic_unet(config, classes))
    encoder = network if isinstance(network, Encoder) else network.encoder
    ins = [unet.conv_0, *(getattr(unet, f"down_{i}").convs for i in range(1, LEVELS))]
    with torch.no_grad():
        for theirs, ours in zip(ins, encoder.levels, strict=True):
            _copy_level(theirs, ours)
        if isinstance(network, UNet):
            ups = [getattr(unet, f"upcat_{i}") for i in range(LEVELS - 1, 0, -1)]
            decoder = network.decoder
            for theirs, up, level in zip(ups, decoder.up, decoder.levels, strict=True):
                _copy_up(theirs.upsample.deconv, up)
                _copy_level(theirs.convs, level, after_up=True)
            unet.final_conv.load_state_dict(decoder.head.state_dict())
    module: nn.Module = unet.eval()
    return module


def basic_unet(config: UNetConfig, classes: int) -> dict[str, Any]:
    """Arguments of `monai.networks.nets.BasicUNet`, as JSON can hold them.

    Raises:
        ValueError: it has other than five levels, or one without a norm.
    """
    if config.depth != LEVELS:
        raise ValueError(
            f"MONAI's BasicUNet has {LEVELS} levels, but this network has {config.depth}; "
            f"pre-train with model.depth={LEVELS}, or use to_torch, which takes any"
        )
    if config.bottleneck != "norm":
        raise ValueError(
            "MONAI's BasicUNet has a norm at every level, but this network's deepest has none "
            "(model.bottleneck=plain, of the preset pcl); use to_torch, which takes any"
        )
    return {
        "spatial_dims": 2,
        "in_channels": config.in_channels,
        "out_channels": classes,
        "features": [*config.channels, config.width],
        "norm": [config.norm, {"affine": True}],
        "act": ["LeakyReLU", {"negative_slope": SLOPE, "inplace": True}],
    }


def _copy_level(theirs: Any, ours: Any, *, after_up: bool = False) -> None:
    """Two convolutions with their norms.

    after_up: behind skip and upsampled maps, which we hold the other way round.
    """
    for block, (conv, norm) in ((theirs.conv_0, ours[0:2]), (theirs.conv_1, ours[3:5])):
        weight = conv.weight
        if after_up and block is theirs.conv_0:
            half = weight.shape[1] // 2
            upsampled, skip = weight[:, :half], weight[:, half:]
            spare = block.conv.weight.shape[1] - 2 * half
            weight = torch.cat((skip, upsampled, upsampled.new_zeros(len(weight), spare, 3, 3)), 1)
        block.conv.weight.copy_(weight)
        block.conv.bias.zero_()
        block.adn.N.load_state_dict(norm.state_dict())


def _copy_up(theirs: nn.ConvTranspose2d, ours: nn.Module) -> None:
    """A transposed convolution; channels that we do not have stay 0."""
    assert isinstance(ours, nn.ConvTranspose2d)
    theirs.weight.zero_()
    theirs.weight[:, : ours.weight.shape[1]].copy_(ours.weight)
    if theirs.bias is not None and ours.bias is not None:
        theirs.bias.zero_()
        theirs.bias[: len(ours.bias)].copy_(ours.bias)


def to_smp(weights: Weights, classes: int, decoder_channels: tuple[int, ...] = ()) -> nn.Module:
    """A model of segmentation-models-pytorch: our encoder, their U-Net decoder and head.

    Args:
        weights: file or run folder of an encoder or a U-Net (whose decoder is left behind), or the
            module itself.
        classes: of the segmentation head.
        decoder_channels: of each level up, from the bottom; by default those of our encoder.

    Returns:
        A `segmentation_models_pytorch.base.SegmentationModel` with `encoder`, `decoder` and
        `segmentation_head`, in eval mode; only the encoder is pre-trained.

    Raises:
        ImportError: segmentation-models-pytorch is not installed.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ImportError(
            "to_smp needs segmentation-models-pytorch: pip install segmentation-models-pytorch"
        ) from error

    network = _network(weights)
    encoder = _SmpEncoder(network if isinstance(network, Encoder) else network.encoder)
    channels = decoder_channels or tuple(reversed(encoder.out_channels[1:-1]))
    model: Any = smp.base.SegmentationModel()
    model.encoder = encoder
    model.decoder = smp.decoders.unet.decoder.UnetDecoder(
        encoder_channels=encoder.out_channels,
        decoder_channels=channels,
        n_blocks=len(encoder.out_channels) - 2,
    )
    model.segmentation_head = smp.base.SegmentationHead(channels[-1], _count("classes", classes))
    model.classification_head = None
    model.name = "salkernels-unet"
    smp.base.initialization.initialize_decoder(model.decoder)
    smp.base.initialization.initialize_head(model.segmentation_head)
    found: nn.Module = model.eval()
    return found


class _SmpEncoder(nn.Module):
    """What their decoder expects of an encoder: the input, then the maps."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        config = encoder.config
        self.out_channels = [config.in_channels, *config.channels]
        self.output_stride = config.stride

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, *self.encoder(images)]


def _network(weights: Weights) -> Encoder | UNet:
    """In eval mode; a module that is given keeps its own parameters to itself."""
    if isinstance(weights, (str, Path)):
        return load_network(weights)[0]
    if not isinstance(weights, (Encoder, UNet)):
        raise TypeError(
            f"weights must be a file, a run folder, an Encoder or a UNet, got "
            f"{type(weights).__name__}"
        )
    fresh: Encoder | UNet
    if isinstance(weights, UNet):
        fresh = UNet(weights.config, weights.classes)
    else:
        fresh = Encoder(weights.config)
    fresh.load_state_dict(weights.state_dict())
    return fresh.eval()


def _classes(network: Encoder | UNet, given: int | None) -> int:
    if isinstance(network, UNet):
        if given not in (None, network.classes):
            raise ValueError(
                f"the U-Net has {network.classes} classes, got out_channels={given}; leave it out, "
                f"or export its encoder"
            )
        return network.classes
    if given is None:
        raise ValueError("an encoder has no classes: give out_channels, those of the new network")
    return _count("out_channels", given)


def _count(name: str, given: int) -> int:
    """A number of classes, if it can be one."""
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {given!r}")
    return given
