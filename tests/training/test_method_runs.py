"""Every method through `pretrain()`: what it writes, that it learns, that it resumes exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salkernels.training import engine
from salkernels.training.augment import AugmentConfig, Augmented
from salkernels.training.checkpoint import load_checkpoint
from salkernels.training.config import OptimConfig, PretrainConfig
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.data.sampling import TwoSubjects
from salkernels.training.device import step_generator
from salkernels.training.errors import Stopped
from salkernels.training.finetune import initial_model
from salkernels.training.inputs import open_dataset, subjects
from salkernels.training.methods import METHODS, SALConfig
from salkernels.training.methods.base import Method, Outcome, Views
from salkernels.training.models import UNetConfig, load_encoder
from salkernels.training.pretrain import CollapseWatch, Slices, pretrain
from salkernels.training.runlog import read_metrics
from salkernels.training.views import make_views

TRAINED = [name for name, kind in METHODS.items() if kind.trains]
TERMS = {
    "rotation": {"loss", "accuracy"},
    "pirl": {"loss", "jigsaw", "slice"},
    "sal": {"loss", "gp", "la"},
    "densecl": {"loss", "global", "dense"},
}
WATCHED = {
    "sal": {"la_pairs", "la_control", "cosine_embedding", "cosine_encoder", "rank_embedding",
            "rank_encoder", "chance_gp"},
}  # fmt: skip


@pytest.fixture
def config_of(pretrain_config, monkeypatch):
    """Configurations of a method; pictures are not drawn unless a test undoes that."""
    monkeypatch.setattr("salkernels.training.pretrain.pretraining_figures", lambda *_: None)
    canvas = PreprocessConfig(spacing=4.0, size=40)  # room for crops that are not in the middle
    small = UNetConfig(width=4, depth=3)
    sal = SALConfig(scale=3)
    base = {"preprocess": canvas, "model": small, "sal": sal, "crop": 32, "slices": 4}
    return lambda method, **changes: pretrain_config(method=method, **{**base, **changes})


def stop_at(monkeypatch, step):
    import signal

    original = engine.step_generator

    def counting(seed, now, device, part=0):
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return original(seed, now, device, part)

    monkeypatch.setattr(engine, "step_generator", counting)
    return lambda: monkeypatch.setattr(engine, "step_generator", original)


@pytest.mark.parametrize("method", TRAINED)
def test_interrupted_equals_uninterrupted(config_of, monkeypatch, tmp_path, method):
    # ContrastiveCrop finds its boxes before steps 1, 2, 3 and 4 of 5: before and after the stop.
    make = {"optim": OptimConfig(lr=0.01, steps=5), "precision": "fp32"}
    straight, broken = (config_of(method, out=tmp_path / n, **make) for n in ("straight", "broken"))
    pretrain(straight)
    undo = stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        pretrain(broken)
    undo()
    pretrain(replace(broken, resume=True))
    states = [load_checkpoint(config.out)["module"] for config in (straight, broken)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert {"pirl": "bank", "ccrop": "boxes"}.get(method, "encoder.levels.0.0.weight") in states[0]
    rows = read_metrics(straight.out)
    assert rows == read_metrics(broken.out)
    assert set(rows[1]) == {"step", "lr"} | TERMS.get(method, {"loss"})
    watched = WATCHED.get(method, {"cosine_encoder", "rank_encoder", "chance_loss"})
    watched = watched | {"nearest_same_scan", "nearest_distance"}
    assert [row["step"] for row in rows if watched <= set(row)] == [1, 4, 5]
    assert METHODS[method].watched in watched
    before, after = (load_encoder(straight.out / f)[0] for f in (
        "encoder_initial.safetensors", "encoder.safetensors",
    ))  # fmt: skip
    for first, last in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.equal(first, last)


def test_the_random_start_is_that_of_fine_tuning_without_an_encoder(config_of, finetune_config):
    config = config_of("random", seed=3)
    path = pretrain(config)
    pretrain(replace(config, resume=True))  # nothing to go on from, and nothing to do
    assert read_metrics(config.out) == []
    encoder, about = load_encoder(path)
    assert (about["method"], about["step"]) == ("random", 0)
    plain = finetune_config(seed=3, model=config.model)
    for start in (plain, replace(plain, encoder=config.out)):
        model, _ = initial_model(start)
        expected = initial_model(plain)[0].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    state = initial_model(plain)[0].encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    other = initial_model(replace(plain, seed=4))[0].encoder.state_dict()
    assert not all(torch.equal(v, other[k]) for k, v in encoder.state_dict().items())
    with pytest.raises(RuntimeError, match="not trained"):
        METHODS["random"](config.model, None, None)(None)


@pytest.mark.parametrize("method", TRAINED)
def test_the_loss_falls_on_one_batch_seen_again_and_again(config_of, method):
    config = config_of(method, slices=8)
    cache = open_dataset(config)
    corpus = Slices(cache, cache.subjects)
    batch = TwoSubjects(cache, cache.subjects, 8, 0)[0]
    torch.manual_seed(0)
    module = METHODS[method](config.model, getattr(config, method, None), corpus)
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    cpu, losses = torch.device("cpu"), []
    for _ in range(40):
        views = make_views(batch, config, cpu, step_generator(0, 0, cpu), module.centres)
        loss = module(views).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # With several positives the loss of a sample is at least the logarithm of their number.
    assert losses[-1] < 0.85 * losses[0], losses


@pytest.mark.parametrize("method", TRAINED)
def test_bf16_gives_nearly_the_loss_of_fp32(config_of, method):
    config = config_of(method, slices=8)
    cache = open_dataset(config)
    corpus, cpu = Slices(cache, cache.subjects), torch.device("cpu")
    batch = TwoSubjects(cache, cache.subjects, 8, 0)[0]
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        module = METHODS[method](config.model, getattr(config, method, None), corpus)
        views = make_views(batch, config, cpu, step_generator(0, 0, cpu), module.centres)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(module(views).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], atol=0.02, rtol=0.02)


def test_views_are_shared_where_the_method_wants_windows_to_correspond(config_of, monkeypatch):
    cpu = torch.device("cpu")
    seen = []
    monkeypatch.setattr(
        "salkernels.training.views.augment",
        lambda images, *_, group, centres: (
            seen.append((group, centres)) or Augmented(images, None, torch.zeros(len(images), 2, 3))
        ),
    )
    for method in TRAINED:
        for geometry in ("auto", "shared", "independent"):
            config = config_of(method, augment=AugmentConfig(geometry=geometry))
            cache = open_dataset(config)
            batch = TwoSubjects(cache, cache.subjects, 4, 0)[0]
            module = METHODS[method](
                config.model, getattr(config, method, None), Slices(cache, cache.subjects)
            )
            make_views(batch, config, cpu, step_generator(0, 0, cpu), module.centres)
            group, centres = seen.pop()
            shared = geometry == "shared" or (geometry == "auto" and method == "sal")
            assert (group is not None) == shared
            if shared:
                assert torch.equal(group[:4], group[4:])
                assert len(group.unique()) == 2
            # 32 of 40 pixels leave a fifth of half the canvas, 2 · 0.1 of the field less: 0.16.
            assert (centres is not None) == (method == "ccrop")
            if centres is not None:
                assert 0.05 < centres.abs().max() <= 0.2


def test_room_for_centres_where_the_crop_is_the_whole_slice(config_of):
    config = config_of("ccrop", crop=40)
    cache = open_dataset(config)
    rooms = []
    make_views(
        TwoSubjects(cache, cache.subjects, 4, 0)[0],
        config,
        torch.device("cpu"),
        step_generator(0, 0, torch.device("cpu")),
        lambda sample, room, generator: rooms.append(room),
    )
    assert rooms == [pytest.approx(0.2)]  # the largest shift of the other methods


def test_a_fold_left_out_is_not_remembered_or_looked_at(config_of):
    config = config_of("pirl", leave_out_fold=1, num_folds=3)
    cache = open_dataset(config)
    seen = subjects(config, cache)
    samples = Slices(cache, seen).samples.tolist()
    expected = [
        cache.volumes[scan].offset + index
        for subject in seen
        for scan in cache.of_subject(subject)
        for index in range(cache.num_slices(scan))
    ]
    assert samples == sorted(expected)
    assert 0 < len(samples) < len(cache.images)
    canvas = Slices(cache, seen).canvases(torch.tensor(samples[5:7]))
    assert torch.equal(canvas[:, 0], torch.from_numpy(cache.images[samples[5:7]]))
    pretrain(config)
    bank = load_checkpoint(config.out)["module"]["bank"]
    torch.manual_seed(config.seed)
    initial = METHODS["pirl"](config.model, config.pirl, Slices(cache, seen)).bank
    moved = (bank != initial).any(dim=1).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= set(samples)


class Bland(Method):
    """A method whose pixels all point in one direction from the second look on."""

    def __init__(self):
        super().__init__()

    def forward(self, views):
        raise NotImplementedError


def test_a_collapsed_encoder_is_said_once_in_every_method(tmp_path, capsys):
    watch = CollapseWatch(Bland(), tmp_path)
    spread, one = torch.randn(4, 8, 3, 3), torch.zeros(4, dtype=torch.int64)
    views = Views(spread, one, one, one + 1, one, torch.Generator())  # of a single slice
    for maps, warned in ((spread, 0), (spread + 100, 1), (spread + 100, 1)):
        figures_now = watch(views, Outcome(torch.zeros(()), {}, {"encoder": maps}))
        assert set(figures_now) == {"cosine_encoder", "rank_encoder"}
        text = (tmp_path / "warnings.txt").read_text() if warned else ""
        assert text.count("collapsed encoder: ") == warned
    assert "lower optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "byol"}, "unknown method 'byol'; expected one of random, rotation, pirl"),
        ({"method": "pirl", "crop": 32}, "at least 48 pixels for an encoder of stride 16, got 32"),
        ({"method": "sal", "crop": 16, "sal": SALConfig(window_size=3)}, "larger than the 2 x 2"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**changes)


def test_the_settings_of_sal_do_not_matter_to_other_methods():
    assert PretrainConfig(method="simclr", crop=16, sal=SALConfig(window_size=3)).crop == 16
