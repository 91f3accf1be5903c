"""The linear probe: its closed form, its maps, whole runs, and experiments that score with it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from salkernels.training.cli import main
from salkernels.training.config import OptimConfig, ProbeConfig
from salkernels.training.data.preprocess import IGNORE
from salkernels.training.errors import RunError
from salkernels.training.experiment.cells import probing
from salkernels.training.models import Encoder, UNetConfig
from salkernels.training.pretrain import pretrain
from salkernels.training.probe import LinearProbe, Moments, enlarged, probe


def pixels(count=400, channels=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(count, channels, generator=generator) + torch.arange(channels)
    labels = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]), count, True, generator=generator)
    return x + labels[:, None], labels.to(torch.uint8)[:count]


def solved(parts, classes=3, ridge=0.1, balance=0.7):
    moments = Moments(parts[0][0].shape[1], classes, torch.device("cpu"))
    for x, labels in parts:
        moments.add(x, labels)
    return moments.solve(ridge, balance)


@pytest.mark.parametrize("balance", [0.0, 0.7, 1.0])
def test_the_closed_form_is_the_minimum_of_the_weighted_squares(balance):
    x, labels = pixels()
    ridge, wide = 0.1, x.double()
    y = F.one_hot(labels.long(), 3).double()
    w = labels.bincount(minlength=3).double()[labels.long()] ** -balance
    w = w / w.sum()
    mean = w @ wide
    deviation = (w @ (wide - mean).square()).sqrt()
    got, bias = solved([(x, labels)], ridge=ridge, balance=balance)
    weight = (got * deviation[:, None]).requires_grad_()
    offset = (bias + mean @ got).requires_grad_()
    guess = (wide - mean) / deviation @ weight + offset
    loss = (w[:, None] * (y - guess).square()).sum() + ridge * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, offset)):
        assert gradient.abs().max() < 1e-10


def test_parts_order_and_unlabelled_pixels_do_not_matter():
    x, labels = pixels()
    whole = solved([(x, labels)])
    unlabelled = (torch.full((7, 5), 1e3), torch.full((7,), IGNORE, dtype=torch.uint8))
    in_parts = solved([(x[250:], labels[250:]), unlabelled, (x[:250], labels[:250])])
    for one, other in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(one, other)


def test_constant_channels_and_absent_classes_tell_nothing():
    x, labels = pixels()
    padded = torch.cat((x, torch.full((len(x), 1), 1e4), torch.zeros(len(x), 1)), dim=1)
    weight, bias = solved([(padded, labels)], classes=4)
    expected = solved([(x, labels)])
    assert weight[5:].abs().max() == 0
    assert weight[:, 3].abs().max() == bias[3].abs() == 0
    torch.testing.assert_close(weight[:5, :3], expected[0])
    torch.testing.assert_close(bias[:3], expected[1])


def test_scores_are_linear_in_the_enlarged_features():
    encoder = Encoder(UNetConfig(width=4, depth=3)).eval()
    weight, bias = torch.randn(4 + 8 + 16, 3), torch.randn(3)
    images = torch.randn(2, 1, 16, 24)
    with torch.no_grad():
        features = torch.cat([enlarged(m, (16, 24)) for m in encoder(images)], dim=1)
        expected = torch.einsum("bchw,ck->bkhw", features, weight) + bias[:, None, None]
        got = LinearProbe(encoder, weight, bias)(images)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def probe_config(finetune_config, tmp_path):
    def make(**changes):
        base = probing(finetune_config())
        shared = {name: getattr(base, name) for name in ("data", "cache", "crop", "device",
                  "preprocess", "model", "num_folds", "labelled", "precision")}  # fmt: skip
        return ProbeConfig(**{**shared, "out": tmp_path / "probe", **changes})

    return make


def test_a_probe_of_an_encoder_is_the_same_twice_and_leaves_it_alone(
    pretrain_config, probe_config, tmp_path
):
    encoder = pretrain(pretrain_config(method="pcl", optim=OptimConfig(steps=3)))
    before = encoder.read_bytes()
    first = probe(probe_config(encoder=encoder.parent))
    again = probe(probe_config(encoder=encoder.parent, out=tmp_path / "again", threads=1))
    assert first.rows == again.rows
    assert first.mean > 0.1
    assert encoder.read_bytes() == before
    result = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert (result["endpoint"], result["ridge"], len(result["labelled"])) == (
        "frozen probe",
        0.1,
        2,
    )
    assert result["pretraining"]["method"] == "pcl"
    assert not set(result["labelled"]) & set(result["held_out"])
    with pytest.raises(RunError, match="already holds a run"):
        probe(probe_config(encoder=encoder.parent))


def test_an_untrained_encoder_is_that_of_the_seed(probe_config, tmp_path):
    one, other = (probe(probe_config(seed=seed, out=tmp_path / f"s{seed}")).mean for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ridge": 0.0}, "ridge must be"), ({"balance": 1.5}, "balance must be"),
     ({"labelled": -1}, "labelled must be"), ({"fold": 5}, "fold must be")],
)  # fmt: skip
def test_wrong_settings_are_refused(settings, message, probe_config):
    with pytest.raises(ValueError, match=message):
        probe_config(**settings)


def test_an_experiment_with_the_probe_as_endpoint(phantom, tmp_path, capsys):
    small = ["crop=32", "model.width=4", "model.depth=4", "preprocess.spacing=4.0",
             "preprocess.size=32", "device=cpu", "precision=fp32"]  # fmt: skip
    options = [f"--{stage}.{setting}" for stage in ("pretrain", "finetune") for setting in small]
    options += ["--pretrain.slices=8", "--pretrain.optim.steps=3"]
    out = tmp_path / "experiment"
    command = ["experiment", "table1", "--preset=mini", f"--data={phantom}", f"--out={out}",
               "--labelled=2", "--folds", "0", "1", "--threads=1", "--endpoint=probe",
               "--arms", "random", "pcl", *options]  # fmt: skip
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "# Table 1: ways to start, on ACDC (frozen probe)" in text
    assert "**Frozen probe**: ridge regression" in text
    assert "paper, M" not in text
    assert "| PCL | 0." in text
    assert {p.name for p in (out / "results").glob("*.png")} == {
        "table1-probe-classes.png", "table1-probe-differences.png",
    }  # fmt: skip
    document = json.loads((out / "results" / "table1-probe.json").read_text())
    assert document["endpoint"] == "probe"
    assert not (out / "finetune").exists()
    before = {p: p.stat().st_mtime_ns for p in out.glob("p*/**/results.json")}
    assert len(before) == 4
    # What fine-tuning would be like is nothing to a probe: its cells are done.
    assert main([*command, "--finetune.optim.lr=0.5"]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
