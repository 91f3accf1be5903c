"""A pre-trained encoder and a fine-tuned U-Net in other people's code, by way of a phantom."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from salkernels.training.data.nifti import read_image
from salkernels.training.data.phantom import write_phantom

folder = tempfile.TemporaryDirectory()
root = Path(folder.name)
acdc = write_phantom(root / "acdc", subjects=5, slices=4)
runs = root / "runs"
scan = sorted(acdc.rglob("*_frame01.nii.gz"))[0]

# --8<-- [start:train]
from salkernels.training import FinetuneConfig, PretrainConfig, finetune, pretrain

# What `--preset phantom` gives, with changes; "desk" or "acdc" for real scans.
config = PretrainConfig.preset("phantom", data=acdc, out=runs / "sal", optim__steps=4)
pretrain(config)  # writes runs/sal/encoder.safetensors
scores = finetune(
    FinetuneConfig.preset(
        "phantom", data=acdc, encoder=runs / "sal", out=runs / "m2", labelled=2, optim__steps=4
    )
)
print(f"Dice {scores.mean:.3f}", scores.per_class())
# --8<-- [end:train]

# --8<-- [start:predict]
from salkernels.training import load_unet, predict

voxels = read_image(scan).array  # (X, Y, Z) from anywhere, slices along the last axis
labels = predict(runs / "m2", voxels, spacing=(1.5, 1.5, 10))  # (X, Y, Z) uint8, the same grid

model = load_unet(runs / "m2")  # once, for many scans
several = [predict(model, path) for path in (scan, scan)]
# --8<-- [end:predict]

# --8<-- [start:encoder]
from salkernels.training import load_encoder, prepare

encoder, about = load_encoder(runs / "sal")  # eval mode; the folder of a run, or a file of weights
ready = prepare(scan, runs / "sal")  # the preprocessing of the training, from the file alone
with torch.inference_mode():
    maps = encoder(ready.slices)  # (Z, 1, size, size) -> a map for each scale, from fine to coarse
features = maps[-1].mean(dim=(2, 3))  # (Z, C): one vector for each slice
print(about["method"], about["preprocess"])
# --8<-- [end:encoder]

# --8<-- [start:torch]
from salkernels.training import to_torch

plain = to_torch(runs / "sal")  # a torch.fx.GraphModule: print(plain.code)
torch.save(plain, root / "encoder.pt")
again = torch.load(root / "encoder.pt", weights_only=False)  # needs torch, and nothing else
# --8<-- [end:torch]

# --8<-- [start:monai]
from salkernels.training import to_bundle, to_monai

unet = to_monai(runs / "sal", out_channels=3)  # BasicUNet: pre-trained encoder, new decoder
whole = to_monai(runs / "m2")  # BasicUNet that computes what the fine-tuned U-Net does
to_bundle(runs / "m2", root / "bundle")
# --8<-- [end:monai]

# --8<-- [start:smp]
from salkernels.training import to_smp

segmenter = to_smp(runs / "sal", classes=3)
logits = segmenter(ready.slices)  # (Z, 3, size, size)
# --8<-- [end:smp]

assert np.array_equal(several[0], labels)
folder.cleanup()
