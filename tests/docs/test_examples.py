"""The examples of the documentation run, and are what its pages show."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

import salkernels

pytest.importorskip("nibabel", reason="the training extra is not installed")

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch.manual_seed(0)


def test_five_lines():
    names = runpy.run_path(str(EXAMPLES / "five_lines.py"))
    assert names["features"].grad.abs().sum() > 0
    assert names["pairs"].sum() > 0


def test_own_penalty():
    names = runpy.run_path(str(EXAMPLES / "own_penalty.py"))
    features, pairs = names["features"], names["pairs"]
    assert names["squared_hinge"] > 0
    assert features.grad.abs().sum() > 0
    torch.testing.assert_close(names["mae"], salkernels.wla_set_loss(features, pairs, 2))
    expected = salkernels.wla_set_loss(features, pairs, 2, valid=names["valid"], reduction="none")
    counts = names["takes_part"].sum(dim=(1, 2))
    torch.testing.assert_close(names["mean"], (expected[pairs] * counts).sum() / counts.sum())
    cosine = torch.cosine_similarity(
        names["matched"], features[names["query"]].movedim(1, 3), dim=-1
    )
    taking_part = names["takes_part"]
    torch.testing.assert_close(cosine[taking_part], names["max_sim"][taking_part])

    # Keys of another set, pair by pair; and what is learnt has a gradient.
    i, j = names["near"].nonzero(as_tuple=True)
    torch.testing.assert_close(
        names["against_bank"], salkernels.wla_loss(features[i], names["bank"][j], 2)
    )
    torch.testing.assert_close(names["one_by_one"].mean(), names["halfway"])
    assert names["temperature"].grad != 0
    assert names["log_variance"].grad != 0
    assert len(names["figure"].axes) == 4  # three panels and a colour bar


def test_tokens_and_volumes():
    names = runpy.run_path(str(EXAMPLES / "tokens_and_volumes.py"))
    tokens, volumes = names["tokens"], names["volumes"]
    assert (tokens.grad[:, 0] == 0).all()  # the class token
    assert tokens.grad[:, 1:].abs().sum(dim=2).min() > 0
    # Token 1 + 14 r + c is the pixel (r, c), and slice d of scan b the map b D + d.
    assert torch.equal(names["maps"][2, :, 3, 5], tokens[2, 1 + 3 * 14 + 5])
    assert torch.equal(names["slices"][13], volumes[1, :, 3])
    assert torch.equal(names["coronal"][12 + 5], volumes[1, :, :, 5])
    assert volumes.grad.abs().sum() > 0


def test_batches_are_halves_of_two_scans(tmp_path):
    from slices import Slices, TwoScans, phantom_files

    data = Slices(phantom_files(tmp_path / "phantom"))
    for batch in TwoScans(data, n=6, steps=3):
        volumes = [data[item]["volume"] for item in batch]
        assert len(set(volumes)) == 2
        assert volumes == [volumes[0]] * 3 + [volumes[3]] * 3


def test_plain_pytorch():
    from plain_pytorch import main

    losses = main(steps=3)
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)


def test_use_elsewhere():
    pytest.importorskip("segmentation_models_pytorch", reason="the interop extra is not installed")
    names = runpy.run_path(str(EXAMPLES / "use_elsewhere.py"))
    maps, ready, images = names["maps"], names["ready"], names["ready"].slices
    with torch.inference_mode():
        for ours, theirs in zip(names["again"](images), maps, strict=True):
            torch.testing.assert_close(ours, theirs)
        whole, (fine_tuned, _) = names["whole"](images), names["model"]
        torch.testing.assert_close(whole, fine_tuned(images), atol=1e-4, rtol=1e-4)
    assert names["logits"].shape == (len(images), 3, 64, 64)
    assert names["unet"](images).shape == names["logits"].shape
    assert names["labels"].shape == ready.geometry.native_shape


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed (the interop extra)")
    from lightning_module import main

    monkeypatch.chdir(tmp_path)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = main(steps=2, accelerator="cpu", enable_checkpointing=False, **quiet)
    assert trainer.global_step == 2
    assert set(trainer.logged_metrics) >= {"gp", "la"}


def test_monai():
    pytest.importorskip("monai", reason="monai is not installed")
    from monai_unet import main

    before = torch.random.get_rng_state()
    unet = main(steps=1)
    torch.random.set_rng_state(before)
    fresh = main(steps=0)
    moved = [
        name
        for (name, one), other in zip(unet.named_parameters(), fresh.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert any(name.startswith("conv_0") for name in moved)
    assert not any(name.startswith(("upcat", "final")) for name in moved)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_shown_on_a_page(path):
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    assert f'--8<-- "docs/examples/{path.name}' in pages
