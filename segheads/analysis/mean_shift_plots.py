"""Figures of what mean shift does to tokens and labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from segheads.analysis.mean_shift import Affinity, LabelsByShift, Trajectory
from segheads.drawing import (
    OKABE_ITO,
    SMALL,
    ClassColours,
    Palette,
    check_picture,
    colour_bar,
    mark_patch,
    part_title,
    picture_sheet,
    sheet,
    show_picture,
    show_shares,
)

MOST_STEPS = 5


def plot_trajectory(
    way: Trajectory,
    labels: Tensor | None = None,
    names: Sequence[str] = (),
    *,
    palette: Palette | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the tokens after each shift in their common plane, the way they came, and how far they are spread.

    Of more than 4 shifts, 5 steps are drawn, the first and the last among them.

    Args:
        way: One of what `shift_trajectories` gave.
        labels: Class of each token, for its colour, or of each pixel of the image, of which those in the middle of the
            tokens are taken; None draws all in one colour.
        names: One for each class, with labels.
        palette: The classes' colours; None for colours that the colour-blind can tell apart.
        title: Above all panels.

    Shape:
        labels `(h, w)` or `(H, W)`, integer.

    Raises:
        ValueError: If labels come without names, or have too few rows or columns.

    Examples:
        >>> import torch
        >>> way = Trajectory("head.shift", torch.randn(3, 4, 6, 2), torch.tensor([0.5, 0.3]), torch.ones(3), (8.0, 8.0))
        >>> figure = plot_trajectory(way)
        >>> [axis.get_title() for axis in figure.axes]
        ['no shift', 'after shift 1', 'after shift 2', 'spread']
    """
    steps = _chosen_steps(len(way.points) - 1)
    figure, axes = sheet(len(steps) + 1, 3, (2.9, 2.7), margins=(1.3 if labels is not None else 0, 0))
    colours: Any = [OKABE_ITO[0]]
    if labels is not None:
        if not names:
            raise ValueError("labels need names, one for each class; got none")
        of_tokens = _of_tokens(labels, way)
        classes = ClassColours([of_tokens], names, palette)
        colours = classes.of(of_tokens).reshape(-1, 3)
        classes.legend(figure)
    points = way.points.flatten(1, 2).numpy()  # (L + 1, N, 2)
    low, high = points.min((0, 1)), points.max((0, 1))
    rim = 0.05 * np.maximum(high - low, 1e-6)
    for panel, (axis, step) in enumerate(zip(axes, steps, strict=False)):
        if step:
            ways = points[steps[panel - 1] : step + 1]
            axis.plot(ways[:, :, 0], ways[:, :, 1], color="silver", linewidth=0.5, zorder=1)
        axis.scatter(*points[step].T, s=9, c=colours, edgecolors="black", linewidths=0.2, zorder=2)
        axis.set(xlim=(low[0] - rim[0], high[0] + rim[0]), ylim=(low[1] - rim[1], high[1] + rim[1]))
        axis.set_title(f"after shift {step}" if step else "no shift", fontsize=9)
        shares = way.explained.tolist()
        axis.set_xlabel(f"component 1 ({100 * shares[0]:.0f} % of the variance)", fontsize=SMALL + 1)
        axis.set_ylabel(f"component 2 ({100 * shares[1]:.0f} %)", fontsize=SMALL + 1)
        axis.tick_params(labelsize=SMALL)
    _draw_spread(axes[-1], way)
    figure.suptitle(title or f"tokens under mean shift ({part_title(way.name)})", fontsize=10)
    return figure


def _chosen_steps(last: int) -> list[int]:
    """All steps from 0 to the last, or as many as fit, evenly."""
    if last < MOST_STEPS:
        return list(range(last + 1))
    return [round(n * last / (MOST_STEPS - 1)) for n in range(MOST_STEPS)]


def _draw_spread(axis: Any, way: Trajectory) -> None:
    axis.plot(range(len(way.spread)), way.spread.tolist(), "o-", color=OKABE_ITO[5])
    axis.set_title("spread", fontsize=9)
    axis.set_xlabel("shifts", fontsize=SMALL + 1)
    axis.set_ylabel("rms distance from the mean (features)", fontsize=SMALL + 1)
    axis.set_ylim(0, 1.1 * way.spread.max().item() or 1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=SMALL)


def _of_tokens(labels: Tensor, way: Trajectory) -> Tensor:
    """Labels of the pixels in the middle of the tokens, or labels of tokens as they are."""
    h, w = way.points.shape[1:3]
    if tuple(labels.shape) == (h, w):
        return labels
    H, W = labels.shape
    if not ((h - 1) * way.cell[0] < H and (w - 1) * way.cell[1] < W):
        raise ValueError(f"labels must be of the {h} x {w} tokens or of the image's pixels; got {tuple(labels.shape)}")
    rows, columns = (
        [min(int((n + 0.5) * side), limit - 1) for n in range(count)]
        for count, side, limit in ((h, way.cell[0], H), (w, way.cell[1], W))
    )
    return labels[rows][:, columns]


def plot_affinity(rows: Sequence[Affinity], picture: Tensor, pixel: tuple[int, int], *, columns: int = 4) -> Figure:
    """Draw which tokens one token is shifted towards: the image, then the affinity of each mean shift.

    Args:
        rows: What `shift_affinity` gave.
        picture: The image, before it was normalised for the model.
        pixel: Row and column (y, x) of the pixel that was asked for, which is marked.
        columns: Panels beside each other.

    Shape:
        picture `(3, H, W)`, values from 0 to 1.

    Raises:
        ValueError: If there is no affinity or the picture has another shape.
    """
    if not rows:
        raise ValueError("a figure of affinities needs one or more; got none")
    size = check_picture(picture)
    figure, axes = picture_sheet(1 + len(rows), columns, size[0] / size[1])
    show_picture(axes[0], picture)
    mark_patch(axes[0], pixel, rows[0].cell)
    for axis, row in zip(axes[1:], rows, strict=True):
        shown = show_shares(axis, row.weights, row.cell, size, f"affinity, {part_title(row.name)}")
        mark_patch(axis, pixel, row.cell)
    colour_bar(figure, shown, axes, "weight in the first shift\n(percent of the panel's largest)")
    return figure


def plot_labels_by_shift(
    maps: LabelsByShift,
    picture: Tensor,
    names: Sequence[str],
    truth: Tensor | None = None,
    *,
    palette: Palette | None = None,
    columns: int = 4,
) -> Figure:
    """Draw label maps with other numbers of shifts side by side (thesis, Fig. 4).

    Titles tell the share of pixels that have another label than with the model's own number of shifts, where that is
    among the maps, and with a truth the share that is right.

    Args:
        maps: What `labels_by_shift` gave.
        picture: The image, before it was normalised for the model.
        names: One for each class.
        truth: True labels; what is no class is left white.
        palette: The classes' colours; None for colours that the colour-blind can tell apart.
        columns: Panels beside each other.

    Shape:
        picture `(3, H, W)`, values from 0 to 1; truth `(H, W)`, integer.

    Raises:
        ValueError: If sizes differ.
    """
    size = check_picture(picture, (maps.labels.shape[1], maps.labels.shape[2]))
    truths = [] if truth is None else [truth.long().cpu()]
    if truth is not None and tuple(truth.shape) != size:
        raise ValueError(f"truth must be of the labels' size {size}; got {tuple(truth.shape)}")
    classes = ClassColours([*truths, *maps.labels], names, palette)
    figure, axes = picture_sheet(1 + len(truths) + len(maps.labels), columns, size[0] / size[1])
    show_picture(axes[0], picture)
    for true in truths:
        classes.show(axes[1], true, "truth")
    own = maps.labels[maps.num_layers.index(maps.trained)] if maps.trained in maps.num_layers else None
    for axis, count, labels in zip(axes[1 + len(truths) :], maps.num_layers, maps.labels, strict=True):
        parts = ["the model's own"] if count == maps.trained else []
        if own is not None and count != maps.trained:
            parts.append(f"{100 * (labels != own).float().mean().item():.1f} % differ")
        for true in truths:
            valid = (true >= 0) & (true < len(names))
            parts.append(f"{100 * (labels == true)[valid].float().mean().item():.1f} % right")
        classes.show(axis, labels, f"{count} shift{'s' * (count != 1)}\n{', '.join(parts)}")
    classes.legend(figure)
    return figure
