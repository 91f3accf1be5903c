"""The pictures of a run folder: curves, slices, matches before and after, segmentations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.nn import functional as F

from salkernels import align, match_pixels

from .augment import centre_crop
from .data.cache import VolumeCache
from .data.datasets import read_scan
from .data.preprocess import for_display
from .data.sampling import TwoSubjects
from .data.text import unmarked
from .device import Device, step_generator
from .evaluate import dice_per_class, segment
from .inputs import subjects
from .methods import METHODS, Method
from .models import Encoder, UNet, load_encoder
from .runlog import CONFIG, read_metrics
from .settings import damaged, read_record, read_settings
from .views import make_views

if TYPE_CHECKING:
    from .config import PretrainConfig

CLASS_COLOURS = ("#4fc3f7", "#ffb300", "#ef5350", "#66bb6a", "#ab47bc", "#8d6e63", "#26a69a")
MOST_DOTS = 16  # on a side of a picture of matches
MOST_SLICES = 16  # of a scan at once through a network: a CT has hundreds
Array = npt.NDArray[Any]


def pretraining(out: Path, cache: VolumeCache, config: PretrainConfig, method: Method) -> None:
    """All figures of a pre-training run, in `out/figures`."""
    curves(out)
    input_slices(out, cache, config, method)
    matches(out, cache, config)


def finetuning(
    out: Path, model: UNet, cache: VolumeCache, subjects: Sequence[str], device: Device
) -> None:
    """All figures of a fine-tuning run, in `out/figures`."""
    curves(out)
    overlays(out, {"prediction": model}, cache, subjects, device)


def curves(out: Path) -> None:
    """Losses, the watch on collapse and the learning rate against the step."""
    rows = read_metrics(out)
    if not rows:
        return
    panels = [
        _loss_panel(out),
        ("share of turns told right", [("accuracy", "")]),
        (
            "LA: slices of one scan, and a control",
            [
                ("la", "same scan, mean of the steps"),
                ("la_pairs", "same scan, one batch"),
                ("la_control", "different scans, one batch (control)"),
            ],
        ),
        (
            "mean cosine of arbitrary pixels",
            [("cosine_embedding", "after E"), ("cosine_encoder", "encoder")],
        ),
        ("effective rank", [("rank_embedding", "after E"), ("rank_encoder", "encoder")]),
        ("held-out Dice (used to select)", [("dice_on_test", "mean")]),
        ("learning rate", [("lr", "")]),
    ]
    shown = [
        (title, series)
        for title, series in panels
        if any(name in row for row in rows for name, _ in series)
    ]
    figure = _figure(4.2 * len(shown), 3.9)
    for axes, (title, series) in zip(_row(figure, len(shown)), shown, strict=True):
        for name, label in series:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                line = axes.plot(*zip(*points, strict=True), label=label or None, lw=1.5)[0]
                _chance(axes, rows, name, line.get_color())
        if title.startswith("mean cosine"):
            axes.set_ylim(-0.05, 1.05)
            axes.axhline(0.9, color="0.6", ls=":", label="collapse")
        if title.startswith("share of turns"):
            axes.set_ylim(-0.05, 1.05)
            axes.axhline(0.25, color="0.6", ls=":", label="by chance")
        if title.startswith("LA") and all(row.get(n, 1) > 0 for row in rows for n, _ in series):
            axes.set_yscale("log")  # a collapse is a fall by orders of magnitude
        axes.set(title=title, xlabel="step")
        if axes.get_legend_handles_labels()[1]:
            # Below the axes: inside it would hide curves.
            axes.legend(
                frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18), borderpad=0
            )
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, out / "figures" / "curves.png")


def _chance(axes: Axes, rows: Sequence[dict[str, float]], name: str, colour: Any) -> None:
    """The level of a loss that tells nothing apart, where it has one."""
    levels = [row[f"chance_{name}"] for row in rows if f"chance_{name}" in row]
    if levels:
        label = None if axes.get_legend_handles_labels()[1][-1:] == ["by chance"] else "by chance"
        axes.axhline(sum(levels) / len(levels), color=colour, ls=":", label=label)


def _loss_panel(out: Path) -> tuple[str, list[tuple[str, str]]]:
    """Title of the picture of the loss, and its curves: those of the method in pre-training."""
    method = read_settings(out / CONFIG).get("method")
    if method is None:
        return "training loss (cross-entropy + Dice)", [("loss", "")]
    if method not in METHODS:
        raise damaged(
            out / CONFIG,
            f"it names no method that is known, but {method!r} (of a plug-in? pass --plugin FILE)",
        )
    title, terms = METHODS[method].curves
    return title, [*terms.items()]


@torch.no_grad()
def input_slices(out: Path, cache: VolumeCache, config: PretrainConfig, method: Method) -> None:
    """The batch of step 0 as the method shows it to the network, by scan.

    What a method learnt since then, such as where to crop, shows here already.
    """
    batch = TwoSubjects(cache, subjects(config, cache), config.slices, config.seed)[0]
    device = next(method.parameters()).device
    generator = step_generator(config.seed, 0, device)
    views = make_views(batch, config, device, generator, method.centres)
    pictures = [picture[0].cpu().numpy() for picture in method.pictures(views)]
    half = config.slices // 2
    figure = _figure(1.4 * half, 6.4)
    grid = figure.subplots(4, half, squeeze=False)
    for row in range(4):
        scan, view = divmod(row, 2)
        for column in range(half):
            sample = scan * half + column
            axes = grid[row][column]
            _image(axes, pictures[2 * sample + view], cache)
            if view == 0:
                index, depth = int(batch.slice_index[sample]), int(batch.num_slices[sample])
                axes.set_title(f"{index + 1} of {depth}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{unmarked(batch.names[sample])}\nview {view + 1}", fontsize=7)
    title = f"one pre-training batch, slices of two scans:\n{method.pictured}"
    figure.suptitle(title, fontsize=10)
    _save(figure, out / "figures" / "input_slices.png")


def matches(out: Path, cache: VolumeCache, config: PretrainConfig) -> None:
    """Which pixel matched which between two slices of a scan, before and after pre-training."""
    found = {
        title: load_encoder(out / name)[0]
        for title, name in (
            ("before", "encoder_initial.safetensors"),
            ("after", "encoder.safetensors"),
        )
        if (out / name).is_file()
    }
    scan = max(range(len(cache.volumes)), key=cache.num_slices)
    depth = cache.num_slices(scan)
    if depth < 2:
        return  # no two slices to match
    # Not neighbours, which look alike pixel by pixel, but the farthest that still are a pair.
    apart = max(1, math.ceil(config.sal.t * depth) - 1)
    first = (depth - apart) // 2
    slices = centre_crop(torch.from_numpy(np.array(cache.image(scan)))[:, None], config.crop)
    pair = slices[[first, first + apart]]
    for encoder in found.values():
        _settle_norms(encoder, slices[:: math.ceil(depth / MOST_SLICES)])
    # The scale and window of SAL, whatever the method, so that methods can be compared; of a coarse
    # map the level before, with windows of the same part of the picture.
    scale = min(config.sal.scale, config.model.depth)
    window = min(config.sal.window_size, config.crop // 2 ** (scale - 1))
    while scale > 1 and 2 * (config.crop // 2 ** (scale - 1)) <= MOST_DOTS:
        scale, window = scale - 1, 2 * window
    fields = {title: match_field(found[title], scale, pair, window) for title in found}
    # 8 inches at 110 dpi: as wide as a page of a README, where letters of 8 points can be read.
    figure = _figure(8, 3.4)
    panels = _row(figure, 1 + len(fields))
    _match_panel(panels[0], pair[0, 0], window, cache, next(iter(fields.values())))
    panels[0].set_title(f"slice {first + 1} of {depth}", fontsize=9)
    for axes, (title, field) in zip(panels[1:], fields.items(), strict=True):
        _match_panel(axes, pair[1, 0], window, cache, field, to_match=True)
        axes.set_title(f"slice {first + 1 + apart}: matches {title} pre-training", fontsize=9)
        of_match, of_any_two = field.similarity.mean(), field.of_any_two
        label = f"cosine with the match {of_match:.2f}, of any two {of_any_two:.2f}"
        axes.set_xlabel(label, fontsize=8)
    name = unmarked(cache.volumes[scan].name)
    figure.suptitle(
        f"{name}: best match in the window (ω = {window}), by the encoder's features at scale "
        f"{scale}",
        fontsize=9,
    )
    _save(figure, out / "figures" / "matches.png")


class MatchField(NamedTuple):
    """Similarity (h, w) and position (h, w, 2) (row, column) of each pixel's match in slice 2, and
    the mean similarity of any two pixels: where features are all alike, matches mean nothing."""

    similarity: Tensor
    where: Tensor
    of_any_two: float


@torch.no_grad()
def match_field(encoder: Encoder, scale: int, pair: Tensor, window: int) -> MatchField:
    """What matched what between slices (2, 1, H, W) in the encoder's map of that scale."""
    features = encoder(pair)[scale - 1]
    similarity, offset = align(features[:1], features[1:], window)
    where = torch.stack(match_pixels(offset[0], window), dim=-1)
    means = F.normalize(features, dim=1).mean(dim=(2, 3))
    return MatchField(similarity[0], where, float(means[0] @ means[1]))


def overlays(
    out: Path,
    models: dict[str, UNet],
    cache: VolumeCache,
    subjects: Sequence[str],
    device: Device,
    most: int = 4,
) -> None:
    """Label and prediction outlines on the middle slice of the first few held-out scans."""
    info = cache.info
    scans = [i for s in subjects for i in cache.of_subject(s)[:1] if cache.volumes[i].labelled][
        :most
    ]
    if not scans:
        return
    columns = ("image", "label", *models)
    figure = _figure(2.6 * len(columns), 2.7 * len(scans))
    grid = figure.subplots(len(scans), len(columns), squeeze=False)
    for row, scan in zip(grid, scans, strict=True):
        entry = cache.volumes[scan]
        image, truth = read_scan(entry, info)
        assert truth is not None  # labelled
        volumes = {"label": truth} | {
            name: segment(model, cache.image(scan), entry.geometry, device)
            for name, model in models.items()
        }
        geometry = entry.geometry
        slices = geometry.to_slices(image.array)
        middle = len(slices) // 2
        box = _around(geometry.to_slices(truth)[middle])
        for axes, name in zip(row, columns, strict=True):
            _image(axes, slices[middle][box], cache)
            if name in volumes:
                labels = geometry.to_slices(volumes[name])[middle][box]
                _outlines(axes, for_display(labels, geometry.orientation), info.num_classes)
            if name in models:
                dice = dice_per_class(volumes[name], truth, info)
                axes.set_xlabel(f"mean 3D Dice of this scan {np.nanmean(dice):.2f}", fontsize=8)
            if scan == scans[0]:
                axes.set_title(name, fontsize=10)
        row[0].set_ylabel(
            f"{unmarked(entry.name)}\nslice {middle + 1} of {len(slices)}", fontsize=8
        )
    handles = [
        Line2D([], [], color=_colour(k), label=unmarked(info.class_names[k]))
        for k in range(1, info.num_classes)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, out / "figures" / "overlays.png")


def run_figures(out: Path) -> list[Path]:
    """Redraws what a run folder alone allows, and lists all of its figures."""
    curves(out)
    return sorted((out / "figures").glob("*.png"))


def summary(out: Path) -> str:
    """A few lines about a run folder: its kind, last metrics and result."""
    rows = read_metrics(out)
    lines = [f"{out}: {int(rows[-1]['step'])} steps" if rows else f"{out}:"]
    if rows:
        lines.append(", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items() if k != "step"))
    result = out / "results.json"
    if result.exists():
        content = read_record(result)
        try:
            figures = {"mean Dice": content["mean_dice"], **content["dice"]}
            mean, *dice = (
                f"{name} {'-' if value is None else format(value, '.3f')}"
                for name, value in figures.items()
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(result, f"no scores ({error!r})") from error
        lines.append(f"{mean} ({', '.join(dice)})")
        lines += [f"mismatch, let pass by hand: {text}" for text in content.get("mismatches", ())]
    warnings = out / "warnings.txt"
    if warnings.exists():
        lines += [f"warning: {line}" for line in warnings.read_text().splitlines()]
    return "\n".join(lines)


@torch.no_grad()
def _settle_norms(encoder: Encoder, slices: Tensor) -> None:
    """Sets the running statistics to those of this scan: an untrained network has none yet."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    encoder.train()(slices)
    encoder.eval()


def _match_panel(
    axes: Axes,
    image: Tensor,
    window: int,
    cache: VolumeCache,
    field: MatchField,
    *,
    to_match: bool = False,
) -> None:
    """A slice with its windows and a dot for each pixel of the map, in a colour of its own.

    to_match: it is slice 2, and each dot is where the pixel of slice 1 found its match, with a line
        from where that pixel is.
    """
    side = field.similarity.shape[0]
    pixel = image.shape[-1] / side
    here = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    orientation = cache.config.orientation
    _image(axes, image.numpy(), cache)
    borders = np.append(np.arange(0, side, window), side) * pixel - 0.5
    # Pictures show (x, y) = (row, column) of the arrays, which for_display transposes.
    centre = (here.flatten(0, 1) + 0.5).numpy() * pixel - 0.5
    match = (field.where.flatten(0, 1) + 0.5).numpy() * pixel - 0.5
    if orientation == "RAS":
        borders, centre, match = (image.shape[-1] - 1 - x for x in (borders, centre, match))
    for line in borders:
        axes.axhline(line, color="w", lw=0.6, alpha=0.6)
        axes.axvline(line, color="w", lw=0.6, alpha=0.6)
    # Hue along one axis, saturation along the other.
    along, across = ((here.flatten(0, 1).numpy() + 0.5) / side).T
    hsv = np.stack((0.9 * along, 1 - 0.6 * across, np.ones_like(along)), axis=-1)
    colours = mpl.colors.hsv_to_rgb(hsv)
    size = min(28.0, 1500.0 / side**1.6)  # points²: dots of a fine map must not touch
    if to_match:
        lines = [*np.stack((centre, match), axis=1)]
        axes.add_collection(LineCollection(lines, colors=colours, lw=1.6))
    at = match if to_match else centre
    axes.scatter(at[:, 0], at[:, 1], c=colours, s=size, lw=0.5, edgecolors="k", zorder=3)


def _image(axes: Axes, slice2d: Array, cache: VolumeCache) -> None:
    picture = for_display(slice2d, cache.config.orientation)
    low, high = np.percentile(picture, (1, 99.5))
    axes.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    axes.set(xticks=[], yticks=[])


def _outlines(axes: Axes, labels: Array, classes: int) -> None:
    for k in range(1, classes):
        if (labels == k).any():
            axes.contour(labels == k, [0.5], colors=_colour(k), linewidths=1.2)


def _colour(label: int) -> str:
    """Of a class; they come again where there are many."""
    return CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]


def _around(labels: Array, margin: float = 0.5) -> tuple[slice, slice]:
    """The part of a slice that holds the labels and some of what is around them."""
    if not labels.any():
        return slice(None), slice(None)
    box = []
    for axis in (1, 0):
        inside = np.flatnonzero(labels.any(axis=axis))
        extra = int(margin * (inside[-1] - inside[0]) + 8)
        box.append(slice(max(0, inside[0] - extra), inside[-1] + extra + 1))
    return box[0], box[1]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
