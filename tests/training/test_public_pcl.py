"""The public code of PCL as settings: loss, views, batches, fine-tuning, score."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from salkernels.training.augment import AugmentConfig, augment, placement
from salkernels.training.cli import _build, make_parser
from salkernels.training.config import FinetuneConfig, OptimConfig, PretrainConfig
from salkernels.training.data.phantom import write_phantom
from salkernels.training.data.sampling import AnySlices, Shard
from salkernels.training.evaluate import Overlap, Scores, write_scores
from salkernels.training.experiment.cells import with_settings
from salkernels.training.experiment.tables import TABLES
from salkernels.training.finetune import finetune, segmentation_loss
from salkernels.training.inputs import open_dataset
from salkernels.training.methods import METHODS
from salkernels.training.models import (
    Encoder,
    UNet,
    UNetConfig,
    load_encoder,
    save_encoder,
)
from salkernels.training.optimiser import make_optimiser
from salkernels.training.pretrain import pretrain

STILL = AugmentConfig(
    rotation=0, scale=1, shift=0, brightness=0, contrast=1, gamma=1, bias=0, noise=0
)


def preset(kind, command):
    arguments = [command, "--preset=pcl"]
    return _build(kind, make_parser(arguments).parse_args(arguments)[command])


def sup_con(unit, position, threshold, temperature, base):
    """The loss of the public code, sample by sample."""
    total = 0.0
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if j != i]
        scores = {j: float(unit[i] @ unit[j]) / temperature for j in others}
        norm = math.log(sum(math.exp(s) for s in scores.values()))
        near = [j for j in others if abs(position[i] - position[j]) < threshold]
        total -= temperature / base * sum(scores[j] - norm for j in near) / len(near)
    return total / len(unit)


def test_the_loss_of_the_preset_is_that_of_the_public_code():
    config = preset(PretrainConfig, "pretrain")
    assert config.method == "pcl"
    settings = config.pcl
    method = METHODS["pcl"](UNetConfig(width=2), settings, None)
    embeddings = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([0.0, 0.0, 0.2, 0.2, 0.5, 0.5, 0.9, 0.9], dtype=torch.float64)
    expected = sup_con(
        F.normalize(embeddings.double(), dim=1), position.tolist(), 0.35, 0.1, base=0.07
    )
    loss = settings.loss_scale * method.contrast(embeddings, torch.arange(8), position)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    shapes = [tuple(p.shape) for p in method.projection.parameters()]
    assert shapes == [(32, 32), (32,), (512, 32), (512,)]  # hidden: as many as the encoder gives


@pytest.mark.parametrize("name", ["simclr", "gcl", "pcl", "ccrop"])
def test_the_scale_is_of_loss_and_chance(pretrain_config, name):
    from salkernels.training.device import step_generator
    from salkernels.training.pretrain import Slices
    from salkernels.training.views import make_views

    base = pretrain_config(method=name)
    cache = open_dataset(base)
    outcomes = []
    for scale in (1.0, 3.0):
        config = replace(base, **{name: replace(base.settings, loss_scale=scale)})
        torch.manual_seed(0)
        method = METHODS[name](config.model, config.settings, Slices(cache, cache.subjects))
        batch = AnySlices(cache, cache.subjects, 8, 0)[0]
        cpu = torch.device("cpu")
        outcomes.append(method(make_views(batch, config, cpu, step_generator(0, 0, cpu))))
    one, three = outcomes
    assert three.loss.item() == pytest.approx(3 * one.loss.item(), rel=1e-5)
    assert three.chance["loss"].item() == pytest.approx(3 * one.chance["loss"].item(), rel=1e-5)
    with pytest.raises(ValueError, match="loss_scale"):
        replace(base.settings, loss_scale=0.0)


def zooms(config, count=4000):
    theta, _ = placement(torch.zeros(count, 1, 8, 8), 8, config, torch.Generator().manual_seed(0))
    return theta[:, :, :2].det().abs().sqrt()


def test_zoom_is_even_in_the_factor_or_in_its_logarithm():
    linear = zooms(replace(STILL, scale=1.3, zoom="linear"))
    assert 0.7 <= linear.min() < 0.71
    assert 1.29 < linear.max() <= 1.3
    assert linear.mean().item() == pytest.approx(1, abs=0.01)
    log = zooms(replace(STILL, scale=1.3))
    assert 1 / 1.3 - 1e-6 <= log.min() < 0.775
    assert log.log().mean().item() == pytest.approx(0, abs=0.01)
    with pytest.raises(ValueError, match="below 2"):
        AugmentConfig(scale=2.0, zoom="linear")


def test_a_share_of_the_views_is_shown_as_it_is():
    config = replace(STILL, rotation=180, scale=1.3, elastic=0.01, probability=0.67, flip=0.5)
    images = torch.randn(2000, 1, 8, 8)
    theta, bend = placement(images, 8, config, torch.Generator().manual_seed(0))
    still = (theta[:, :, :2].abs() - torch.eye(2)).abs().amax((1, 2)) < 1e-6
    assert still.double().mean().item() == pytest.approx(0.33, abs=0.03)
    assert torch.equal(still, (bend == 0).all(dim=(1, 2, 3)))
    signs = theta[still][:, [0, 1], [0, 1]].sign()
    assert len(signs.unique(dim=0)) == 4  # mirrored or not along each axis, also without the rest
    with pytest.raises(ValueError, match=r"augment\.probability"):
        AugmentConfig(probability=1.5)


def test_probability_one_draws_what_it_drew_before():
    """Recorded runs go on with the numbers that they had."""
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    config = AugmentConfig(elastic=0.02)
    views = augment(images, 16, config, torch.Generator().manual_seed(0)).views
    generator = torch.Generator().manual_seed(0)
    parameters = torch.rand(3, 4, generator=generator)
    bend = torch.randn(3, 2, 5, 5, generator=generator)
    theta, coarse = placement(images, 16, config, torch.Generator().manual_seed(0))
    angle = (2 * parameters[:, 0] - 1) * math.radians(30)
    assert torch.allclose(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]), angle, atol=1e-6)
    assert torch.allclose(coarse, 0.04 * bend)
    assert torch.isfinite(views).all()


def test_more_nodes_bend_more_sharply():
    def field(nodes):
        config = replace(STILL, elastic=0.02, elastic_nodes=nodes)
        bend = placement(torch.zeros(50, 1, 8, 8), 8, config, torch.Generator().manual_seed(0))[1]
        assert bend.shape == (50, 2, nodes, nodes)
        smooth = F.interpolate(bend, size=(64, 64), mode="bicubic", align_corners=True)
        return smooth.std().item(), smooth.diff(dim=3).std().item()

    (few, slope), (many, steeper) = field(5), field(10)
    assert many == pytest.approx(few, rel=0.15)
    assert steeper > 1.7 * slope
    with pytest.raises(ValueError, match="elastic_nodes"):
        AugmentConfig(elastic_nodes=1)


def test_slices_come_once_per_pass_from_all_scans_in_order(pretrain_config):
    cache = open_dataset(pretrain_config())
    seen = cache.subjects[:4]
    total = sum(cache.num_slices(scan) for s in seen for scan in cache.of_subject(s))
    assert total % 8 == 0
    data = AnySlices(cache, seen, 8, seed=3)
    passes = [[data[i] for i in range(k * total // 8, (k + 1) * total // 8)] for k in (0, 1)]
    drawn = [Counter(s for batch in one for s in batch.sample.tolist()) for one in passes]
    assert drawn[0] == drawn[1]
    assert set(drawn[0].values()) == {1}
    assert len(drawn[0]) == total
    assert passes[0][0].sample.tolist() != passes[1][0].sample.tolist()
    for batch in passes[0]:
        keys = list(zip(batch.volume.tolist(), batch.slice_index.tolist(), strict=True))
        assert keys == sorted(keys)  # a scan lies together
    # Two processes share the batches of one.
    halves = [AnySlices(cache, seen, 8, 3, shard=Shard(rank, 2)) for rank in (0, 1)]
    for step in (0, 1):
        got = [half[step].sample.tolist() for half in halves]
        assert got == [data[2 * step].sample.tolist(), data[2 * step + 1].sample.tolist()]


@pytest.mark.parametrize("method", ["pcl", "sal"])
def test_pretraining_on_any_slices(pretrain_config, method):
    optim = OptimConfig(steps=1, epochs=2)
    config = pretrain_config(method=method, sampling="slices", slices=16, optim=optim)
    pretrain(config)
    cache = open_dataset(config)
    slices = len(cache.images)
    assert load_encoder(config.out)[1]["step"] == math.ceil(2 * slices / 16)
    pretrain(replace(config, resume=True))  # the recorded settings are those that were given


def test_fine_tuning_lasts_as_long_as_there_are_subjects(finetune_config, tmp_path):
    lengths = {}
    for labelled in (1, 2, 4):
        config = finetune_config(
            labelled=labelled, out=tmp_path / str(labelled), optim=OptimConfig(steps=8, epochs=2)
        )
        finetune(config)
        lengths[labelled] = json.loads((config.out / "results.json").read_text())["steps"]
    slices = 12  # of a subject: two frames of six
    assert lengths == {1: 8, 2: 2 * 2 * slices // 4, 4: 2 * 4 * slices // 4}
    with pytest.raises(ValueError, match=r"optim\.epochs"):
        OptimConfig(epochs=-1)


def test_adam_and_plain_momentum_decay_what_they_are_told_to():
    layer = torch.nn.Linear(3, 2)
    groups = [{"params": list(layer.parameters())}]
    adam = make_optimiser(groups, OptimConfig(name="adam", weight_decay=0.1, decay_all=True))
    assert type(adam) is torch.optim.Adam
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.1]
    sgd = make_optimiser(groups, OptimConfig(nesterov=False, weight_decay=0.1))
    assert [group["nesterov"] for group in sgd.param_groups] == [False, False]
    assert sorted(group["weight_decay"] for group in sgd.param_groups) == [0.0, 0.1]


def test_cross_entropy_alone():
    logits, labels = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 1, 8, 8))
    expected = F.cross_entropy(logits, labels[:, 0])
    assert segmentation_loss("ce")(logits, labels).item() == pytest.approx(expected.item())
    assert segmentation_loss()(logits, labels) > expected + 0.1


def test_pooled_dice_is_that_of_all_voxels(tmp_path):
    rows = [
        {"subject": s, "frame": "f", "role": "ED", "RV": both / own, "LV": math.nan}
        for s, both, own in (("large", 90, 100), ("small", 1, 5))
    ]
    overlaps = [[Overlap(90, 200), Overlap(0, 0)], [Overlap(1, 10), Overlap(0, 3)]]
    scores = Scores(("RV", "LV"), rows, overlaps)
    assert scores.mean == pytest.approx((0.9 + 0.2) / 2)
    scores.pooled = True
    assert scores.per_class() == {"RV": pytest.approx(182 / 210), "LV": 0.0}
    write_scores(tmp_path, scores, {})
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["mean_dice"] == result["mean_dice_pooled"] == pytest.approx(91 / 210)
    assert result["dice_over"] == "voxels of all scans"


def test_pooled_dice_is_reported_and_selected_by(finetune_config, monkeypatch):
    """The kept weights are those of the best pooled Dice, whatever the mean over scans."""
    looks = [(0.9, Overlap(10, 100)), (0.1, Overlap(40, 100)), (0.5, Overlap(20, 100))]
    count = iter([*looks, looks[1]])

    def scored(*_, **__):
        mean, overlap = next(count)
        row = {"subject": "a", "frame": "f", "role": "ED", "RV": mean}
        return Scores(("RV",), [row], [[overlap]])

    monkeypatch.setattr("salkernels.training.finetune.evaluate", scored)
    config = finetune_config(
        select="best-on-test", select_every=1, dice="pooled", optim=OptimConfig(steps=3)
    )
    assert finetune(config).mean == pytest.approx(0.8)
    from salkernels.training.models import load_unet

    best = load_unet(config.out / "checkpoints" / "best_on_test.safetensors")[1]
    assert best["step"] == 2
    assert best["dice"] == pytest.approx(0.8)


def test_a_plain_bottleneck_has_no_norm(tmp_path):
    plain = UNetConfig(width=4, depth=3, bottleneck="plain")
    encoder = Encoder(plain)
    kinds = [[type(m).__name__ for m in level] for level in encoder.levels]
    assert kinds[-1] == ["Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert kinds[0] == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 2
    assert UNet(plain, 3)(torch.randn(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    save_encoder(tmp_path / "e.safetensors", encoder, {})
    assert load_encoder(tmp_path / "e.safetensors")[0].config == plain


def test_the_preset_says_what_the_code_says():
    pretraining, finetuning = preset(PretrainConfig, "pretrain"), preset(FinetuneConfig, "finetune")
    assert (pretraining.slices, pretraining.sampling, pretraining.cine) == (32, "slices", True)
    assert pretraining.crop == finetuning.preprocess.size == 352
    for config in (pretraining, finetuning):
        assert (config.augment.flip, config.augment.probability) == (0.5, 0.67)
        assert (config.augment.noise, config.augment.gamma, config.augment.bias) == (0, 1, 0)
        assert (config.optim.warmup, config.optim.clip, config.optim.weight_decay) == (0, 0, 1e-5)
    assert pretraining.geometry == "independent"
    assert finetuning.optim.lr * finetuning.optim.final_lr == pytest.approx(5e-6)
    assert (finetuning.loss, finetuning.select, finetuning.dice) == (
        "ce", "best-on-test", "pooled",
    )  # fmt: skip
    # 100 patients with 27 frames of 9.5 slices, on average, make 240,000 steps.
    steps = pretraining.optim.for_slices(round(100 * 27 * 9.5), 32).steps
    assert 230_000 < steps < 250_000


def test_the_elastic_displacement_of_the_preset_is_about_that_of_the_code():
    """White noise in [-1, 1], smoothed over 15.5 pixels, times 225: size and slope."""
    from scipy.ndimage import gaussian_filter

    config = preset(PretrainConfig, "pretrain").augment
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (4, 352, 352))
    theirs = np.stack([225 * gaussian_filter(one, 15.5, mode="constant") for one in noise])
    only = replace(STILL, elastic=config.elastic, elastic_nodes=config.elastic_nodes)
    bend = placement(torch.zeros(8, 1, 8, 8), 8, only, torch.Generator().manual_seed(0))[1]
    ours = F.interpolate(bend, size=(352, 352), mode="bicubic", align_corners=True).numpy()
    ours = ours * 352 / 2  # the grid spans [-1, 1]
    assert ours.std() == pytest.approx(theirs.std(), rel=0.15)
    slopes = [np.diff(displacement, axis=-1).std() for displacement in (ours, theirs)]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.15)


def test_slices_of_a_batch_may_be_of_one_scan():
    """Two slices of one scan and no other: methods by position still have a pair."""
    cache = SimpleNamespace(
        of_subject=lambda s: [0], num_slices=lambda i: 4,
        volumes=[SimpleNamespace(name="a", offset=0, labelled=True)],
    )  # fmt: skip
    batch = AnySlices(cache, ["a"], 4, 0, read=False)[0]
    assert batch.sample.tolist() == [0, 1, 2, 3]


def test_tables_say_how_long_and_by_which_score(finetune_config):
    from salkernels.training.experiment.experiment import _length, _score

    config = finetune_config(dice="pooled", select="best-on-test")
    assert _length(OptimConfig(steps=500)) == "500 steps"
    passes = OptimConfig(steps=500, epochs=30)
    assert _length(passes) == "30 passes over the slices (at least 500 steps)"
    assert _score(finetune_config()) == "3D Dice of the last weights"
    best = "Dice pooled over voxels of the best (on the held-out subjects) weights"
    assert _score(config) == best


def test_every_command_takes_the_preset(tmp_path):
    where = [f"--data={tmp_path}", f"--out={tmp_path}", "--preset=pcl"]
    parsed = make_parser(arguments := ["experiment", "table1", *where]).parse_args(arguments)
    stages = parsed.experiment
    assert (stages.pretrain.pcl.projection_dim, stages.finetune.dice) == (512, "pooled")
    parsed = make_parser(arguments := ["probe", *where]).parse_args(arguments)
    assert parsed.probe.preprocess.spacing == 1.25


def test_an_encoder_of_the_cine_starts_fine_tuning_on_labelled_frames(
    pretrain_config, finetune_config, tmp_path
):
    data = write_phantom(tmp_path / "data", subjects=6, slices=4, cine_frames=4)
    own = {"data": data, "cache": tmp_path / "cache"}
    optim = OptimConfig(steps=1, epochs=1)
    encoder = pretrain_config(method="pcl", cine=True, sampling="slices", optim=optim, **own)
    pretrain(encoder)
    scans = len(open_dataset(encoder).volumes)
    assert scans > 6 * 2
    assert load_encoder(encoder.out)[1]["step"] == math.ceil(scans * 4 / 8)
    assert 0 <= finetune(finetune_config(encoder=encoder.out, **own)).mean <= 1


def test_the_arm_with_grey_values_as_they_are():
    arm, simclr = (TABLES["collapse"].arm(name) for name in ("simclr-grey", "simclr"))
    assert arm.method == simclr.method == "simclr"
    assert dict(simclr.settings) == {}
    augment = with_settings(PretrainConfig(), arm.settings).augment
    assert augment == replace(PretrainConfig().augment, brightness=0, contrast=1, gamma=1, bias=0,
                              noise=0)  # fmt: skip
