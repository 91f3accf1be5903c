"""A pre-trained encoder leaves the package: read by plain safetensors, exported to other packages.

How shapes meet, and why MONAI's UNet does not fit: see `salkernels.training.export`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai", reason="monai is not installed: pip install 'salkernels[training]'")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from dataclasses import asdict  # noqa: E402

from salkernels.training import predict, to_bundle, to_monai, to_smp, to_torch  # noqa: E402
from salkernels.training.data.phantom import write_phantom  # noqa: E402
from salkernels.training.data.preprocess import PreprocessConfig  # noqa: E402
from salkernels.training.errors import RunError  # noqa: E402
from salkernels.training.models import (  # noqa: E402
    Encoder,
    UNet,
    UNetConfig,
    save_encoder,
    save_unet,
)

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
    assert about["model"] == asdict(CONFIG)
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


def unet(config=CONFIG) -> UNet:
    """Fine-tuned, as far as its batch norms tell: they have statistics of their own."""
    torch.manual_seed(4)
    model = UNet(config, 4)
    for _ in range(3):
        model(torch.randn(4, 1, 64, 64) * 2 + 1)
    nn.init.normal_(model.decoder.up[-1].bias)  # biases of their own too
    return model.eval()


PLAIN = Encoder(UNetConfig(width=4, bottleneck="plain"))


@pytest.mark.parametrize(
    "config", [CONFIG, UNetConfig(width=4, depth=3, norm="instance"), PLAIN.config]
)
def test_as_plain_torch(config, tmp_path):
    model = unet(config)
    for network in (model, model.encoder):
        plain = to_torch(network)
        expected, found = network(IMAGES), plain(IMAGES)
        assert isinstance(found, Tensor) == isinstance(network, UNet)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        assert plain.state_dict().keys() == network.state_dict().keys()
    program = torch.export.export(to_torch(model), (IMAGES,))
    torch.testing.assert_close(program.module()(IMAGES), model(IMAGES))
    torch.save(to_torch(model), tmp_path / "plain.pt")
    # torch 2.13 cannot save annotations that are text.
    assert not any(isinstance(node.type, str) for node in to_torch(model).graph.nodes)
    torch.save((IMAGES, model(IMAGES)), tmp_path / "expected.pt")
    code = """
import sys, torch
sys.modules["salkernels"] = None  # it is not there
images, expected = torch.load(sys.argv[1] + "/expected.pt")
model = torch.load(sys.argv[1] + "/plain.pt", weights_only=False)
assert torch.equal(model(images), expected)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_in_a_unet_of_segmentation_models_pytorch(exported):
    pytest.importorskip(
        "segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed"
    )
    path, expected = exported
    model = to_smp(path.parent, classes=4)
    with torch.no_grad():
        for ours, theirs in zip(model.eval().encoder(IMAGES)[1:], expected, strict=True):
            assert torch.equal(ours, theirs)
    assert_trains(model, model.encoder.encoder.levels[0][0].weight)
    narrow = to_smp(unet(UNetConfig(width=4, depth=3)), 2, decoder_channels=(16, 8))
    assert narrow(IMAGES).shape == (2, 2, 64, 64)


def test_the_encoder_in_monai_basic_unet(exported):
    path, expected = exported
    model = to_monai(path, out_channels=4)
    with torch.no_grad():
        x = model.conv_0(IMAGES)
        for level in range(1, 5):
            x = getattr(model, f"down_{level}")(x)
    torch.testing.assert_close(x, expected[-1], rtol=1e-4, atol=1e-5)
    assert_trains(model, model.conv_0.conv_0.conv.weight)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_whole_network_in_monai_basic_unet(norm):
    model = unet(UNetConfig(width=4, depth=5, norm=norm))
    exported = to_monai(model)
    torch.testing.assert_close(exported(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
    before = model.encoder.levels[0][0].weight.clone()
    assert_trains(exported, exported.conv_0.conv_0.conv.weight)
    assert torch.equal(model.encoder.levels[0][0].weight, before)  # weights of its own


def test_monai_unet_does_not_fit():
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    theirs = nets.UNet(
        spatial_dims=2, in_channels=1, out_channels=4, channels=CONFIG.channels, strides=(2,) * 4
    )
    ours = [tuple(p.shape) for p in Encoder(CONFIG).parameters() if p.dim() == 4]
    shapes = [tuple(p.shape) for p in theirs.parameters() if p.dim() == 4]
    # The two convolutions of the first level: it has one, and the second is of the next level.
    assert ours[:2] == [(8, 1, 3, 3), (8, 8, 3, 3)]
    assert shapes[:2] == [(8, 1, 3, 3), (16, 8, 3, 3)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: to_monai(Encoder(CONFIG)), ValueError, "give out_channels"),
        (lambda: to_monai(UNet(CONFIG, 4), 3), ValueError, "has 4 classes, got out_channels=3"),
        (lambda: to_monai(UNet(UNetConfig(depth=4), 3)), ValueError, "5 levels, but this network"),
        (
            lambda: to_monai(PLAIN, 3),
            ValueError,
            "a norm at every level",
        ),
        (lambda: to_torch(nn.Conv2d(1, 1, 1)), TypeError, "got Conv2d"),
        (lambda: to_smp("nowhere", 2), ValueError, "nowhere is not a file"),
    ],
)
def test_what_cannot_be_exported(call, error, words):
    with pytest.raises(error, match=words):
        call()


def fine_tuned(folder, **changes):
    """The run folder of a U-Net whose labels depend on the image."""
    settings = PreprocessConfig(spacing=2.5, size=32, **changes)
    about = {
        "preprocess": asdict(settings),
        "spacing": "recorded",
        "class_names": ["background", "a", "b", "c"],
        "pretraining": {"method": "sal"},
    }
    folder.mkdir()
    save_unet(folder / "model.safetensors", unet(), about)
    return folder


@pytest.mark.parametrize("window", [None, (20.0, 200.0)])
def test_a_monai_bundle_runs_without_this_package(window, tmp_path):
    """On a scan that is smaller than the canvas along one axis, and larger along the other."""
    pytest.importorskip("fire", reason="fire is not installed (the interop extra)")
    run = fine_tuned(tmp_path / "m2", window=window)
    source = sorted(
        write_phantom(tmp_path / "data", subjects=2, slices=3).rglob("*_frame01.nii.gz")
    )
    stored = nib.load(source[0])
    array = np.asarray(stored.dataobj)[:, 25:70]
    scan = tmp_path / "scans" / "one.nii.gz"
    scan.parent.mkdir()
    nib.save(nib.Nifti1Image(array, stored.affine, stored.header), scan)
    bundle = to_bundle(str(run), tmp_path / "bundle")
    (bundle / "salkernels.py").write_text("raise ImportError('it is not there')")
    options = [f"--dataset_dir={scan.parent}", f"--output_dir={tmp_path / 'labels'}"]
    command = [sys.executable, "-m", "monai.bundle", "run", "--device=cpu"]
    command += ["--config_file=configs/inference.json", *options]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "labels").iterdir()
    assert written.name == "one_pred.nii.gz"
    labels = nib.load(written)
    expected = predict(run, scan, device="cpu")
    assert labels.shape == expected.shape == (96, 45, 3)
    assert len(np.unique(expected)) > 1
    # Where two classes are equally likely, rounding decides.
    assert (np.asarray(labels.dataobj) != expected).mean() < 1e-3
    assert np.allclose(labels.affine, stored.affine)
    assert labels.get_data_dtype() == np.uint8
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] == "b"
    assert "--config_file configs/inference.json" in (bundle / "docs" / "README.md").read_text()


def test_bundles_that_cannot_be_written(tmp_path):
    run = fine_tuned(tmp_path / "m2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunError, match="full is not empty"):
        to_bundle(run, tmp_path / "full")
    with pytest.raises(RunError, match="file is a file"):
        to_bundle(run, tmp_path / "full" / "file")
    with pytest.raises(ValueError, match="as stored, not in RAS"):
        to_bundle(fine_tuned(tmp_path / "ras", orientation="RAS"), tmp_path / "b")
    assert not (tmp_path / "b").exists()
