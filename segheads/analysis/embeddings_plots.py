"""Figures of class embeddings."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from segheads.analysis.embeddings import Projection
from segheads.drawing import OKABE_ITO, SMALL, part_title, sheet, shortened, write_names

MOST_TICKS = 40  # names along an axis that can still be read


def plot_projection(
    projections: Mapping[str, Projection], names: Sequence[str], *, columns: int = 2, title: str | None = None
) -> Figure:
    """Draw class embeddings in their plane, one panel for each head that has some, with the names of the classes.

    Of many classes, those names are written that fit without covering another, the outer ones first; the panel's
    title tells how many.

    Args:
        projections: Name of the head, as `class_embeddings` has it, to what `project` made of its embeddings.
        names: One for each class.
        columns: Panels beside each other.
        title: Above all panels.

    Raises:
        ValueError: If there is no projection, or names are not as many as points.

    Examples:
        >>> import torch
        >>> from segheads.analysis import project
        >>> figure = plot_projection({"head": project(torch.randn(3, 64))}, ["sky", "road", "car"])
        >>> figure.axes[0].get_xlabel()
        'component 1 (... % of the variance)'
    """
    figure, axes = _panels(projections, names, columns, [len(p.points) for p in projections.values()], 4.0, 3.6)
    whole = {True: "of the variance", False: "of the sum of squares"}
    for axis, (head, projection) in zip(axes, projections.items(), strict=True):
        points = projection.points.numpy()
        axis.axhline(0, color="lightgrey", linewidth=0.8, zorder=0)
        axis.axvline(0, color="lightgrey", linewidth=0.8, zorder=0)
        axis.plot(*points.T, "o", color=OKABE_ITO[0], markersize=4 if len(names) <= MOST_TICKS else 2.5)
        for number, (set_label, share) in enumerate(
            zip((axis.set_xlabel, axis.set_ylabel), projection.explained.tolist(), strict=True), 1
        ):
            set_label(f"component {number} ({100 * share:.0f} % {whole[projection.centred]})", fontsize=SMALL + 1)
        axis.margins(0.15)
        axis.set_aspect("equal", adjustable="datalim")
        axis.tick_params(labelsize=SMALL)
        axis.set_title(part_title(head), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    for axis, (head, projection) in zip(axes, projections.items(), strict=True):
        written = write_names(axis, projection.points.numpy(), names)
        if written < len(names):
            axis.set_title(f"{part_title(head)}: {len(names)} classes, {written} named", fontsize=9)
    return figure


def plot_similarity(
    similarities: Mapping[str, Tensor], names: Sequence[str], *, columns: int = 2, title: str | None = None
) -> Figure:
    """Draw the cosine similarity of every two classes, one panel for each head that has class embeddings.

    White is 0; both ends of the scale are as far from it as the largest similarity between two classes, so that small
    ones show. The diagonal, which is 1 by definition, is left grey.

    Args:
        similarities: Name of the head, as `class_embeddings` has it, to what `cosine_similarity` made of it.
        names: One for each class; of more than 40, every so many are written.
        columns: Panels beside each other.
        title: Above all panels.

    Raises:
        ValueError: If there is no matrix, or names are not as many as its rows.

    Examples:
        >>> import torch
        >>> from segheads.analysis import cosine_similarity
        >>> figure = plot_similarity({"head": cosine_similarity(torch.randn(3, 64))}, ["sky", "road", "car"])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['sky', 'road', 'car']
    """
    figure, axes = _panels(similarities, names, columns, [len(s) for s in similarities.values()], 3.6, 3.6)
    K = len(names)
    apart = ~np.eye(K, dtype=bool)
    limit = max((float(abs(s.numpy()[apart]).max()) for s in similarities.values() if K > 1), default=0.0) or 1.0
    ticks = range(0, K, -(-K // MOST_TICKS))
    shown_names = [shortened(names[k]) for k in ticks]
    for axis, (head, similarity) in zip(axes, similarities.items(), strict=True):
        values = np.ma.masked_where(~apart, similarity.numpy())
        axis.set_facecolor("lightgrey")
        shown = axis.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(part_title(head), fontsize=9)
        axis.set_xticks(ticks, shown_names, rotation=90, fontsize=SMALL - (K > 20))
        axis.set_yticks(ticks, shown_names, fontsize=SMALL - (K > 20))
        axis.set_xlabel("class", fontsize=SMALL + 1)
        axis.set_ylabel("class", fontsize=SMALL + 1)
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("cosine similarity", fontsize=SMALL + 1)
    bar.ax.tick_params(labelsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _panels(
    drawn: Mapping[str, object],
    names: Sequence[str],
    columns: int,
    counts: Sequence[int],
    width: float,
    height: float,
) -> tuple[Figure, list]:
    """A figure with one panel for each head; sizes in inches."""
    if not drawn:
        raise ValueError("a figure of class embeddings needs those of one head or more; got none")
    for head, count in zip(drawn, counts, strict=True):
        if count != len(names):
            raise ValueError(f"names must be as many as the classes; got {len(names)} for {count} of {head}")
    return sheet(len(drawn), columns, (width, height), margins=(0.8, 0))
