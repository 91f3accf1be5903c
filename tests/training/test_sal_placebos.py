"""SAL's placebos: what LA compares, keys that are rolled, and a threshold of its own."""

from __future__ import annotations

import pytest
import torch

from salkernels import wla_loss
from salkernels.training.augment import AugmentConfig, augment, shown, undo
from salkernels.training.experiment.tables import TABLES
from salkernels.training.inputs import NOTES
from salkernels.training.methods import SAL, SALConfig, Views
from salkernels.training.methods.sal import alignment, rolled
from salkernels.training.models import UNetConfig
from salkernels.training.pretrain import pretrain
from salkernels.training.settings import read_settings

MODEL = UNetConfig(width=4, depth=4)


def views():
    """Two views of slices 0, 1 and 3 of one scan of ten, and 0, 2 and 9 of a scan of twenty."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.tensor([3, 3, 3, 5, 5, 5]).repeat_interleave(2)
    index = torch.tensor([0, 1, 3, 0, 2, 9]).repeat_interleave(2)
    depth = torch.tensor([10, 10, 10, 20, 20, 20]).repeat_interleave(2)
    images = torch.randn(12, 1, 32, 32, generator=generator)
    config = AugmentConfig(brightness=0, contrast=1, gamma=1, bias=0, noise=0)
    images, _, frame = augment(images, 32, config, generator)
    return Views(images, volume, index, depth, 20 * volume + index, generator, frame)


def pairs(**settings):
    return SAL(MODEL, SALConfig(**settings), None).pairs(views())


def test_pairs_against_a_loop():
    batch = views()
    near, same, other = (pairs(pairs=kind, t_la=0.15) for kind in ("near", "same", "other"))
    for i in range(12):
        for j in range(12):
            one = batch.volume[i] == batch.volume[j]
            apart = abs(batch.slice_index[i] - batch.slice_index[j])
            away = abs(batch.position[i] - batch.position[j])
            assert near[i, j] == (i != j and one and apart < 0.15 * batch.num_slices[i])
            assert same[i, j] == (i != j and i // 2 == j // 2)
            assert other[i, j] == (not one and away < 0.15)
    assert other.any()
    assert not (near & other).any()
    assert (same & near).equal(same)


def test_a_threshold_of_las_own_leaves_gp_alone():
    batch = views()
    torch.manual_seed(0)
    wide = SAL(MODEL, SALConfig(), None).eval()
    torch.manual_seed(0)
    close = SAL(MODEL, SALConfig(t_la=0.15), None).eval()
    a, b = wide(batch).terms, close(batch).terms
    assert a["gp"] == b["gp"]
    assert a["la"] != b["la"]
    assert pairs().equal(pairs(t_la=0.35))
    assert pairs().sum() > pairs(t_la=0.15).sum()


def test_rolled_keys_are_those_half_a_map_away():
    x = torch.randn(3, 4, 6, 7, dtype=torch.double, requires_grad=True)
    valid = torch.rand(3, 6, 7) > 0.3
    chosen = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    got = alignment(x, valid, chosen, 3, roll=True)
    rows, columns = (torch.arange(6) - 3) % 6, (torch.arange(7) - 3) % 7
    keys, there = x[:, :, rows][..., columns], valid[:, rows][..., columns]
    torch.testing.assert_close(keys, rolled(x))
    i, j = chosen.nonzero(as_tuple=True)
    expected = wla_loss(x[i], keys[j], 3, valid=(valid[i], there[j]))
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][2].abs().sum() > 0  # a key only: both sides learn
    stopped = alignment(x, valid, chosen, 3, stop_gradient=True, roll=True)
    torch.testing.assert_close(stopped, got)
    assert torch.autograd.grad(stopped, x)[0][2].abs().sum() == 0


@pytest.mark.parametrize(("height", "width", "window"), [(6, 6, 3), (8, 8, 2), (7, 9, 3)])
def test_rolled_windows_never_meet_their_own_place(height, width, window):
    rows, columns = (rolled(torch.arange(n).repeat(2 * n, 1)[:, :n])[0] for n in (height, width))
    for places, side in ((rows, height), (columns, width)):
        for start in range(0, side, window):
            mine = set(range(start, min(start + window, side)))
            assert not mine & set(places[start : start + window].tolist())


def test_the_frame_and_the_roll_go_together_and_the_watch_sees_true_pairs():
    settings = SALConfig(embedding="none", common_frame=True, roll=True, pairs="other")
    method = SAL(MODEL, settings, None).eval()
    batch = views()
    outcome = method(batch)
    back = undo(outcome.maps["embedding"], batch.frame).double()
    seen = shown(batch.frame, *back.shape[2:])
    i, j = method.pairs(batch).nonzero(as_tuple=True)
    trained = wla_loss(back[i], rolled(back)[j], 2, valid=(seen[i], rolled(seen)[j]))
    torch.testing.assert_close(outcome.terms["la"].double(), trained, atol=1e-5, rtol=0)
    i, j = method.neighbours(batch).nonzero(as_tuple=True)
    true = wla_loss(back[i], back[j], 2, valid=(seen[i], seen[j]))
    watched = method.monitor(batch, outcome)
    assert watched["la_pairs"] == pytest.approx(true.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": "far"}, r"sal\.pairs must be one of near, same, other, got 'far'"),
        ({"t_la": 0.0}, r"sal\.t_la is a fraction"),
        ({"t_la": 1.5}, r"sal\.t_la is a fraction"),
    ],
)
def test_placebos_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SALConfig(**settings)


def test_a_window_of_more_than_half_a_map_cannot_be_rolled_away(pretrain_config):
    pretrain_config(sal=SALConfig(roll=True, window_size=2))  # of 4 x 4
    pretrain_config(sal=SALConfig(window_size=3))
    with pytest.raises(ValueError, match=r"sal\.roll moves keys by 2 pixels"):
        pretrain_config(sal=SALConfig(roll=True, window_size=3))


def test_a_run_records_its_placebo_and_names_scans_without_pairs(pretrain_config):
    config = pretrain_config(sal=SALConfig(pairs="other", roll=True, t_la=0.15))
    pretrain(config)
    recorded = read_settings(config.out / "config.yaml")["sal"]
    assert (recorded["pairs"], recorded["roll"], recorded["t_la"]) == ("other", True, 0.15)
    notes = (config.out / NOTES).read_text()  # scans of six slices: 0.15 · 6 is less than one
    assert "sal.t_la 0.15 times the number of slices is at most 1 in 12 of 12 scans" in notes
    assert "sal.t 0.35" not in notes


def test_the_placebo_arms_differ_from_the_frame_in_one_setting():
    frame = TABLES["collapse"].arm("sal-noE-frame").settings
    changes = {
        name: dict(TABLES["collapse"].arm(name).settings.items() - frame.items())
        for name in ("frame-same", "frame-other", "frame-roll", "frame-adjacent")
    }
    assert changes == {
        "frame-same": {"sal.pairs": "same"},
        "frame-other": {"sal.pairs": "other"},
        "frame-roll": {"sal.roll": True},
        "frame-adjacent": {"sal.t_la": 0.15},
    }
