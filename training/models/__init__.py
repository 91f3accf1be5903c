"""The 2D U-Net whose encoder is pre-trained, and the heads of pre-training."""

from .heads import Embedding, EmbeddingKind, Projection
from .unet import Encoder, UNet, UNetConfig
from .weights import describe, load_encoder, load_network, load_unet, save_encoder, save_unet

__all__ = [
    "Embedding",
    "EmbeddingKind",
    "Encoder",
    "Projection",
    "UNet",
    "UNetConfig",
    "describe",
    "load_encoder",
    "load_network",
    "load_unet",
    "save_encoder",
    "save_unet",
]
