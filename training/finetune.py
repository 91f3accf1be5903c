"""Fine-tuning a U-Net on a few labelled subjects, and its Dice on the fold's held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import augment
from .callable_module import make_callable
from .config import FinetuneConfig, LabelledConfig, SegmentationLoss, require_kind
from .data.cache import VolumeCache, require_labels
from .data.manifest import dataset_info
from .data.review import (
    notices,
    require_classes,
    require_scale_of_encoder,
    spacing_recorded,
)
from .data.sampling import LabelledSlices, Shard, SliceBatch
from .data.splits import Fold, folds_of, labelled_subset, pick
from .device import Device
from .engine import Look, fit
from .errors import RunError
from .evaluate import Scores, evaluate, write_scores
from .identity import (
    Identity,
    contents,
    encoder_identity,
    for_results,
    of_weights,
    require_unseen,
    split_of,
)
from .inputs import open_dataset, tell
from .locks import sole_use
from .models import UNet, load_encoder, load_unet, save_unet
from .models.weights import ENCODER, MODEL, weights_file
from .plugins import used_by
from .progress import say
from .resident import resident, without_loaders
from .runlog import RunLog
from .steps import Task
from .transfer import to_device


def finetune(config: FinetuneConfig) -> Scores:
    """Fine-tunes a U-Net on a few labelled subjects and scores it, as the command `finetune` does.

    Args:
        config: such as `FinetuneConfig.preset("desk", data="acdc", encoder="runs/sal", labelled=2,
            out="runs/m2")`.

    Returns:
        The `Scores` on the held-out subjects, with `scores.mean`, `scores.per_class()`, and a row
        for each scan. The model is in `config.out`/model.safetensors.

    Raises:
        RunError: `config.out` holds another run; the encoder does not fit.
        DataError: the data cannot be read, or lack labels.
    """
    require_kind(config, FinetuneConfig)
    device = Device.of(config)
    cache = open_dataset(config)
    start = Start.of(config, cache)
    with sole_use(config.out):
        run = Finetuning(config, device, cache, start)
        tell(config.out, notices(cache))
        run.fit()
        return run.finish()


@dataclass
class Start:
    """What every use of labels starts from, once it is known to be good.

    model: with random weights, or with the pre-trained encoder.
    pretraining: how that was trained; None without one.
    believed: what the run believes in.
    """

    fold: Fold
    labelled: tuple[str, ...]
    model: UNet
    pretraining: dict[str, Any] | None
    believed: Identity

    @classmethod
    def of(cls, config: LabelledConfig, cache: VolumeCache) -> Start:
        """Raises DataError or RunError where labels, classes, scale or encoder do not do."""
        fold, labelled = split(config, cache)
        require_labels(cache, [*labelled, *fold.test])
        require_classes(cache, labelled)
        require_classes(cache, fold.test)
        model, pretraining = initial_model(config)
        if pretraining is not None:
            require_scale_of_encoder(cache, pretraining.get("spacing"), str(config.encoder))
        return cls(fold, labelled, model, pretraining, identity(config, cache, pretraining))


class Finetuning:
    """One run of fine-tuning."""

    def __init__(
        self, config: FinetuneConfig, device: Device, cache: VolumeCache, start: Start
    ) -> None:
        self.device, self.cache, self.start = device, cache, start
        self.log = RunLog(config, "finetune", device.describe(), start.believed)
        self.data = LabelledSlices(
            cache, start.labelled, config.batch_size, config.seed,
            Shard(accumulate=config.optim.accumulate),
        )  # fmt: skip
        step = config.batch_size * config.optim.accumulate
        optim = config.optim.for_slices(len(self.data.pool), step)
        self.config = config = replace(config, optim=optim)
        self.model = start.model
        device.to(self.model)
        if config.compile:
            self.model.compile()  # in place: the keys of the weights stay
        self.store = resident(cache, config, device.device, labels=True)
        self.data.read = self.store is None
        self.criterion = segmentation_loss(config.loss)
        self.best = BestOnTest(self.model, cache, start.fold, device.exact(), config)

    def fit(self) -> None:
        """Runs all steps; afterwards the model has the weights to keep."""
        config = self.config
        selects = config.select == "best-on-test"
        fit(
            self.model,
            [
                {"params": list(self.model.encoder.parameters()), "scale": config.encoder_lr},
                {"params": list(self.model.decoder.parameters())},
            ],
            Task(self.prepare, self.loss),
            self.data,
            without_loaders(config, self.store),
            self.log,
            self.device,
            Look(self.best.due, self.best.look) if selects else None,
        )
        self.log.close()
        if selects:
            self.best.restore()

    def prepare(self, batch: SliceBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented slices and their labels."""
        if self.store is not None:
            batch = self.store.fill(batch)
        images, labels, _ = augment(
            to_device(batch.images, self.device.device),
            self.config.crop,
            self.config.augment,
            generator,
            labels=to_device(batch.labels, self.device.device),
        )
        assert labels is not None  # they went in
        return images, labels

    def loss(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The segmentation loss."""
        images, labels = given
        with self.device.autocast():
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
        loss: Tensor = self.criterion(logits.float(), labels[:, None].long())
        return loss, {"loss": loss}

    def finish(self) -> Scores:
        """Writes the model, its Dice on the held-out subjects, and the figures."""
        config, start = self.config, self.start
        about = {
            **about_model(config, self.cache, start.fold, start.labelled),
            "pretraining": start.pretraining and for_results(start.pretraining),
            "identity": self.log.identity.plain(),
        }
        save_unet(config.out / MODEL, self.model, about)
        exact = self.device.exact()
        scores = evaluate(self.model, self.cache, start.fold.test, exact, progress=True)
        scores.pooled = config.dice == "pooled"
        write_scores(config.out, scores, for_results(about))
        finetuning_figures(config.out, self.model, self.cache, start.fold.test, exact)
        return scores


def finetuning_figures(
    out: Path, model: UNet, cache: VolumeCache, subjects: Sequence[str], device: Device
) -> None:
    """All figures of a run."""
    from .figures import finetuning  # matplotlib takes seconds, when it is used

    say("drawing figures")
    finetuning(out, model, cache, subjects, device)


def identity(
    config: LabelledConfig, cache: VolumeCache, pretraining: dict[str, Any] | None
) -> Identity:
    """What fine-tuning believes in; the encoder must not have seen whom it must not.

    pretraining: the description of the encoder, where there is one.
    """
    fold, labelled = split(config, cache)
    believed = Identity(
        cache.info.name,
        contents(cache),
        with_labels=labelled,
        held_out=fold.test,
        split=split_of(config, "fold", "num_folds", "split_seed"),
        plugins=used_by(config),
    )
    if config.encoder is None or pretraining is None:
        return believed
    path = weights_file(config.encoder, ENCODER, MODEL)
    seen = require_unseen(believed, fold.test, path, pretraining, allow=config.allow_mismatch)
    inherited = of_weights(path, pretraining)
    marks = (*(inherited.mismatches if inherited else ()), *seen)
    encoder = encoder_identity(path, pretraining)
    return replace(believed, encoder=encoder, mismatches=tuple(dict.fromkeys(marks)))


def segmentation_loss(kind: SegmentationLoss = "dice+ce") -> torch.nn.Module:
    """Cross-entropy + soft Dice: logits (B, K, H, W), labels (B, 1, H, W); background counts too.

    kind: "ce" leaves the Dice out.

    Dice is that of the batch as a whole. Taken per slice, a class that a slice does not hold would
    cost nearly 1 whatever the prediction, and many slices lack one.
    """
    from monai.losses import DiceCELoss  # MONAI takes seconds, when it is used

    weight = 1.0 if kind == "dice+ce" else 0.0
    return DiceCELoss(to_onehot_y=True, softmax=True, batch=True, lambda_dice=weight)


def split(config: LabelledConfig, cache: VolumeCache) -> tuple[Fold, tuple[str, ...]]:
    """The fold, and its M labelled training subjects: the same for every method."""
    folds = folds_of(cache, config.num_folds, config.split_seed, config.splits)
    fold = pick(folds, config.fold, "fold")
    train = [subject for subject in fold.train if subject in cache.labelled_subjects]
    require_labels(cache, train or fold.train)
    count = config.labelled or len(train)
    return fold, labelled_subset(train, count, config.fold, config.split_seed)


def initial_model(config: LabelledConfig) -> tuple[UNet, dict[str, Any] | None]:
    """A U-Net with random weights, or with the pre-trained encoder, and how that was trained.

    The decoder is the same in both cases: seeded, and drawn after the encoder's random weights.
    """
    torch.manual_seed(config.seed)
    info = dataset_info(config.dataset, config.data_folder())
    model = UNet(config.model, info.num_classes)
    about = None
    if config.encoder is not None:
        path = weights_file(config.encoder, ENCODER, MODEL)
        encoder, about = load_encoder(path)
        if encoder.config != config.model:
            raise RunError(
                f"the encoder in {path} is {asdict(encoder.config)}, but this run's model is "
                f"{asdict(config.model)}; pass the preset or the model.* settings it was "
                f"pre-trained with"
            )
        model.encoder.load_state_dict(encoder.state_dict())
    return model, about


class BestOnTest:
    """Keeps the weights that did best on the held-out subjects, as some published code does.

    They lie in the run folder, so that an interrupted run does not forget them.
    """

    def __init__(
        self, model: UNet, cache: VolumeCache, fold: Fold, device: Device, config: FinetuneConfig
    ) -> None:
        self.model, self.cache, self.fold, self.device = model, cache, fold, device
        self.every, self.steps = config.select_every, config.optim.steps
        self.pooled = config.dice == "pooled"
        self.path = config.out / "checkpoints" / "best_on_test.safetensors"
        self.best = load_unet(self.path)[1]["dice"] if self.path.exists() else -1.0

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def look(self, step: int) -> dict[str, float]:
        scores = evaluate(self.model, self.cache, self.fold.test, self.device, progress=False)
        scores.pooled = self.pooled
        self.model.train()
        if not scores.mean <= self.best:  # NaN, where no class is held out, is kept too
            self.best = scores.mean
            save_unet(self.path, self.model, {"dice": scores.mean, "step": step})
        return {"dice_on_test": scores.mean}

    def restore(self) -> None:
        self.model.load_state_dict(load_unet(self.path)[0].state_dict())


def about_model(
    config: FinetuneConfig, cache: VolumeCache, fold: Fold, labelled: tuple[str, ...]
) -> dict[str, Any]:
    """What a reader of the model or its results must know."""
    training = {"steps": config.optim.steps, "select": config.select}
    return about_labelled(config, cache, fold, labelled) | training


def about_labelled(
    config: LabelledConfig, cache: VolumeCache, fold: Fold, labelled: tuple[str, ...]
) -> dict[str, Any]:
    """What a reader of scores must know, however they came about."""
    return {
        "dataset": config.dataset,
        "class_names": list(cache.info.class_names),
        "preprocess": asdict(config.preprocess),
        "spacing": spacing_recorded(cache),
        "encoder": str(config.encoder) if config.encoder is not None else None,
        "fold": config.fold,
        "num_folds": config.num_folds,
        "split_seed": config.split_seed,
        "labelled": list(labelled),
        "held_out": list(fold.test),
        "seed": config.seed,
    }


make_callable(__name__)  # so that `salkernels.training.finetune` is this module, and the function
