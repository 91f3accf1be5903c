"""A picture of what was matched with what; matplotlib is loaded when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .checks import WindowSize, check_tensor, check_window
from .matching import Matches, match_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 8  # along the longer side of the map, or nothing is to be seen


def plot_matches(
    query: Tensor,
    key: Tensor,
    matches: Matches,
    window_size: WindowSize,
    *,
    pair: int = 0,
    every: int | None = None,
) -> Figure:
    """Draws a slice, the one that it was matched with, where the matches lie and how good they are.

    A dot has one colour in both pictures; a line in the second joins a pixel's own position to that
    of its match, which is always in the same window.

    Args:
        query: (height, width) or (1, height, width) grey values of the query slice, of any size:
            the feature map covers the whole of it.
        key: the same of the key slice.
        matches: what `align` or `align_set` returned.
        window_size: ω, as given to them.
        pair: the row of `matches` to draw.
        every: how many pixels of the map from one dot to the next; None for about eight dots along
            the longer side.

    Returns:
        A `matplotlib.figure.Figure` of three panels, the third with 1 − max_sim of each pixel,
        whose mean over the pixels that take part is the loss of the pair. `figure.savefig(path)`
        writes it; notebooks show it.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: `matches` has no such pair.
        ValueError, TypeError: wrong shapes or types.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_matches needs matplotlib: pip install matplotlib") from error
    images = _grey("query", query), _grey("key", key)
    similarity, argmax = _of_pair(matches, pair)
    height, width = argmax.shape
    window = check_window(window_size, height, width)
    every = max(1, max(height, width) // DOTS) if every is None else every
    if every < 1:
        raise ValueError(f"every must be at least 1 pixel, got {every}")
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)  # pixels of the map, whatever the picture's
    for ax, image, title in zip(axes, images, ("query", "key"), strict=False):
        # The brightest pixels, often fat, would leave the rest dark.
        brightest = float(np.quantile(image, 0.98))
        ax.imshow(image, cmap="gray", vmax=max(brightest, float(image.min())), extent=edges)
        outline_windows(ax, height, width, window)
        ax.set_title(title)
    _draw_dots(axes[0], axes[1], argmax, window, every)
    absent = argmax < 0
    distance = (1 - similarity).masked_fill(absent, torch.nan)
    picture = axes[2].imshow(distance.numpy(), cmap="magma", vmin=0, vmax=1, extent=edges)
    mean = float(distance[~absent].abs().mean()) if not bool(absent.all()) else 0.0
    axes[2].set_title(f"1 − max cos; its mean is the loss, {mean:.3f}")
    figure.colorbar(picture, ax=axes[2], shrink=0.8)
    for ax in axes:
        ax.set_axis_off()
    return figure


def outline_windows(
    ax: Axes, height: int, width: int, window: tuple[int, int], colour: str = "tab:cyan"
) -> None:
    """Frames the windows of a map (height, width) whose pixels are the units of the axes."""
    from matplotlib.patches import Rectangle

    for y in range(0, height, window[0]):
        for x in range(0, width, window[1]):
            size = min(window[1], width - x), min(window[0], height - y)
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), *size, fill=False, color=colour))


def _grey(name: str, image: object) -> npt.NDArray[np.float32]:
    image = check_tensor(name, image).detach().float().cpu()
    if image.dim() == 3 and image.shape[0] == 1:
        image = image[0]
    if image.dim() != 2 or image.numel() == 0:
        raise ValueError(
            f"{name} must be one grey picture (height, width), got shape {tuple(image.shape)}; "
            f"take one slice and one channel of it"
        )
    return cast("npt.NDArray[np.float32]", image.numpy())


def _of_pair(matches: object, pair: int) -> tuple[Tensor, Tensor]:
    """max_sim and argmax (H, W) of one pair."""
    if not isinstance(matches, Matches):
        raise TypeError(
            f"matches must be what align or align_set returns, got {type(matches).__name__}"
        )
    count = len(matches.argmax)
    if not -count <= pair < count:
        raise IndexError(f"pair must be one of the {count} rows of matches, got {pair}")
    return matches.max_sim[pair].detach().float().cpu(), matches.argmax[pair].cpu()


def _draw_dots(
    left: Axes, right: Axes, argmax: Tensor, window: tuple[int, int], every: int
) -> None:
    """Some pixels in the query, and their matches in the key."""
    from matplotlib.colors import hsv_to_rgb

    height, width = argmax.shape
    rows, columns = match_pixels(argmax, window)
    for y in range(every // 2, height, every):
        for x in range(every // 2, width, every):
            if argmax[y, x] < 0:
                continue
            colour = hsv_to_rgb((x / width, 0.45 + 0.5 * y / height, 1.0))
            to_x, to_y = int(columns[y, x]), int(rows[y, x])
            left.plot(x, y, ".", color=colour, markersize=8)
            right.plot([x, to_x], [y, to_y], color=colour, linewidth=1)
            right.plot(to_x, to_y, ".", color=colour, markersize=8)
