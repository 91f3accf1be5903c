"""Fine-tuning: who trains and who tests, what it starts from, and which weights are scored."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from salkernels.training.config import OptimConfig
from salkernels.training.data.preprocess import PreprocessConfig
from salkernels.training.errors import RunError
from salkernels.training.evaluate import Scores
from salkernels.training.finetune import (
    BestOnTest,
    finetune,
    initial_model,
    segmentation_loss,
    split,
)
from salkernels.training.inputs import open_dataset
from salkernels.training.models import load_unet
from salkernels.training.pretrain import pretrain, subjects
from salkernels.training.runlog import read_metrics


@pytest.mark.parametrize("fold", range(3))
def test_labelled_and_held_out_subjects_are_apart_and_fixed(finetune_config, fold, tmp_path):
    config = finetune_config(fold=fold)
    cache = open_dataset(config)
    held, labelled = split(config, cache)
    assert len(labelled) == 2
    assert set(labelled) <= set(held.train)
    assert not set(held.train) & set(held.test)
    assert sorted(held.train + held.test) == cache.subjects
    # Nothing of a method or of its seed moves the draw; M = 0 takes the whole fold.
    other = finetune_config(fold=fold, seed=7, encoder=tmp_path, model=config.model)
    assert split(other, cache) == (held, labelled)
    assert split(finetune_config(fold=fold, labelled=0), cache)[1] == held.train
    draws = {split(finetune_config(fold=fold, split_seed=s), cache)[0].test for s in range(9)}
    assert len(draws) > 1


def test_pretraining_leaves_out_the_fold_that_finetuning_holds_out(
    pretrain_config, finetune_config
):
    cache = open_dataset(pretrain_config())
    assert subjects(pretrain_config(), cache) == tuple(cache.subjects)
    for fold in range(3):
        for seed in range(4):
            same = {"num_folds": 3, "split_seed": seed}
            seen = subjects(pretrain_config(leave_out_fold=fold, **same), cache)
            assert seen == split(finetune_config(fold=fold, **same), cache)[0].train


def test_an_encoder_that_saw_the_held_out_scans_is_refused(
    pretrain_config, finetune_config, tmp_path
):
    pretrain(pretrain_config(leave_out_fold=1, num_folds=3, optim=OptimConfig(steps=1)))
    encoder = tmp_path / "pretrain"
    model, about = initial_model(finetune_config(fold=1, encoder=encoder))
    assert about["leave_out_fold"] == 1
    for changes in ({"fold": 0}, {"split_seed": 1}, {"num_folds": 4}):
        config = finetune_config(**{"fold": 1, "encoder": encoder, **changes})
        with pytest.raises(RunError, match=r"seen in pre-training: patient\d+"):
            finetune(config)
    assert model.config == pretrain_config().model


def test_both_ways_to_start_differ_in_the_encoder_alone(pretrain_config, finetune_config, tmp_path):
    pretrain(pretrain_config(optim=OptimConfig(steps=2)))
    plain, nothing = initial_model(finetune_config())
    ready, about = initial_model(finetune_config(encoder=tmp_path / "pretrain"))
    assert nothing is None
    assert (about["method"], about["step"]) == ("sal", 2)
    differing = {
        name
        for name, value in plain.state_dict().items()
        if not torch.equal(value, ready.state_dict()[name])
    }
    assert differing
    assert all(name.startswith("encoder.") for name in differing)


def test_loss_is_cross_entropy_and_the_dice_of_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6, 5, dtype=torch.double)
    labels = torch.randint(0, 4, (3, 1, 6, 5))
    labels[0][labels[0] == 2] = 0  # a slice without class 2
    p = logits.softmax(dim=1)
    dice, entropy = [], []
    for k in range(4):
        overlap = sum(p[b, k][labels[b, 0] == k].sum() for b in range(3))
        dice.append(2 * overlap / (p[:, k].sum() + (labels == k).sum()))
    for b, r, c in itertools.product(range(3), range(6), range(5)):
        entropy.append(-p[b, labels[b, 0, r, c], r, c].log())
    expected = torch.stack(entropy).mean() + 1 - torch.stack(dice).mean()
    torch.testing.assert_close(segmentation_loss()(logits, labels), expected, atol=1e-6, rtol=0)


def test_the_encoder_has_a_rate_of_its_own(finetune_config):
    """At 0 its weights stay, while the decoder's move."""
    config = finetune_config(encoder_lr=0.0)
    before = {name: p.clone() for name, p in initial_model(config)[0].named_parameters()}
    finetune(config)
    after = dict(load_unet(config.out / "model.safetensors")[0].named_parameters())
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("encoder."), name


def test_the_last_weights_are_scored_by_default(finetune_config):
    finetune(finetune_config())
    out = finetune_config().out
    model, about = load_unet(out / "model.safetensors")
    state = torch.load(out / "checkpoints" / "last.pt", weights_only=True)["module"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    result = json.loads((out / "results.json").read_text())
    assert (result["select"], result["pretraining"]) == ("last", None)
    assert not any("dice_on_test" in row for row in read_metrics(out))
    assert about["labelled"] == result["labelled"]


def test_best_on_test_looks_at_the_last_step_too(finetune_config):
    """Also where select_every does not divide the steps, or is longer than the run."""
    config = finetune_config(select="best-on-test", select_every=100)
    scores = finetune(config)
    looks = [row for row in read_metrics(config.out) if "dice_on_test" in row]
    assert [row["step"] for row in looks] == [config.optim.steps]
    assert scores.mean == pytest.approx(looks[0]["dice_on_test"])


def test_best_on_test_keeps_the_best(finetune_config, monkeypatch):
    config = finetune_config(select="best-on-test", select_every=1)
    cache = open_dataset(config)
    model, _ = initial_model(config)
    means = iter([0.2, 0.6, 0.4])

    def scored(*_args, **_kwargs):
        return Scores(("LV",), [{"LV": next(means)}])

    monkeypatch.setattr("salkernels.training.finetune.evaluate", scored)
    best = BestOnTest(model, cache, split(config, cache)[0], None, config)
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.decoder.head.bias, step)
        best.look(step)
    best.restore()
    assert model.decoder.head.bias[0] == 2


def test_a_run_killed_before_its_first_checkpoint_can_go_on(finetune_config):
    config = finetune_config(select="best-on-test", select_every=1)
    finetune(config)
    for name in ("last.pt", "previous.pt"):
        (config.out / "checkpoints" / name).unlink(missing_ok=True)
    expected = (config.out / "model.safetensors").read_bytes()
    finetune(replace(config, resume=True))  # from the start: best_on_test alone is no state
    assert (config.out / "model.safetensors").read_bytes() == expected


def test_a_canvas_that_the_network_cannot_segment_is_refused_before_training(finetune_config):
    with pytest.raises(ValueError, match=r"preprocess\.size must be a multiple of 8 .*got 36"):
        finetune_config(preprocess=PreprocessConfig(spacing=4.0, size=36))
