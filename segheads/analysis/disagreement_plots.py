"""Figure of where two models disagree."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from segheads.analysis.disagreement import OUTCOMES, Disagreement
from segheads.drawing import OKABE_ITO, SMALL, ClassColours, Palette, check_picture, in_pixels, shortened, show_picture

# grey, blue, orange, black, purple; white where the truth is to be ignored
OUTCOME_COLOURS = ((0.85, 0.85, 0.85), OKABE_ITO[0], OKABE_ITO[1], (0.0, 0.0, 0.0), OKABE_ITO[3])
MOST_PAIRS = 8


def plot_disagreement(
    found: Disagreement,
    picture: Tensor,
    names: Sequence[str],
    models: tuple[str, str] = ("first", "second"),
    *,
    palette: Palette | None = None,
) -> Figure:
    """Draw two label maps, where they differ and who is right, and the pairs of classes that are the most often mixed.

    Args:
        found: What `compare_labels` gave.
        picture: The image, before it was normalised for a model.
        names: One for each class.
        models: What the two are called.
        palette: The classes' colours; None for colours that the colour-blind can tell apart.

    Shape:
        picture `(3, H, W)`, values from 0 to 1.

    Raises:
        ValueError: If sizes differ, or names are not as many as classes.
    """
    size = check_picture(picture, (found.first.shape[0], found.first.shape[1]))
    if len(names) != len(found.pairs):
        raise ValueError(f"names must be as many as the classes; got {len(names)} for {len(found.pairs)}")
    height = 3.0 * size[0] / size[1] + 0.7  # inches
    figure = Figure(figsize=(10.6, height + max(height, 2.6)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, max(height, 2.6)))  # each with columns of its own
    above, below = parts
    upper, lower = above.subplots(1, 3), below.subplots(1, 3, width_ratios=(3, 2.2, 2.6))
    classes = ClassColours([found.first, found.second], names, palette)
    show_picture(upper[0], picture)
    classes.show(upper[1], found.first, models[0])
    classes.show(upper[2], found.second, models[1])
    _draw_outcome(lower[0], found, size)
    _draw_legend(lower[1], found, models)
    _draw_pairs(lower[2], found, names, models)
    classes.legend(above)
    return figure


def _draw_outcome(axis: Any, found: Disagreement, size: tuple[int, int]) -> None:
    table = np.array([*OUTCOME_COLOURS, (1.0, 1.0, 1.0)])
    shown = 4 * found.differs.long() if found.outcome is None else found.outcome.long().clamp(max=len(OUTCOMES))
    axis.imshow(table[shown.numpy()], extent=(0, size[1], size[0], 0), interpolation="nearest")
    share = 100 * found.differs.float().mean().item()
    in_pixels(axis, size, f"{share:.1f} % of the pixels differ")


def _draw_legend(axis: Any, found: Disagreement, models: tuple[str, str]) -> None:
    axis.axis("off")
    texts = [text.replace("the first", models[0]).replace("the second", models[1]) for text in OUTCOMES]
    colours, title = list(OUTCOME_COLOURS), "who is right"
    if found.shares is not None:
        texts = [f"{text}: {100 * share:.1f} %" for text, share in zip(texts, found.shares.tolist(), strict=True)]
    else:
        texts, colours, title = ["the same", "not the same"], [colours[0], colours[4]], "labels"
    patches = [Patch(facecolor=c, edgecolor="grey", label=t) for c, t in zip(colours, texts, strict=True)]
    if found.outcome is not None and (found.outcome == 255).any():
        patches.append(Patch(facecolor="white", edgecolor="grey", label="(ignored)"))
    axis.legend(handles=patches, loc="center", fontsize=SMALL + 1, title=title, title_fontsize=SMALL + 2, frameon=False)


def _draw_pairs(axis: Any, found: Disagreement, names: Sequence[str], models: tuple[str, str]) -> None:
    apart = found.pairs.clone().fill_diagonal_(0)
    order = [k for k in apart.flatten().argsort(descending=True)[:MOST_PAIRS].tolist() if apart.flatten()[k] > 0]
    K = len(names)
    labels = [f"{shortened(names[k // K])} / {shortened(names[k % K])}" for k in order]
    axis.barh(range(len(order)), [100 * apart.flatten()[k].item() for k in order], color=OKABE_ITO[0])
    axis.set_yticks(range(len(order)), labels, fontsize=SMALL)
    axis.invert_yaxis()
    axis.set_xlabel("pixels of the image (percent)", fontsize=SMALL + 1)
    axis.set_ylabel("labels of the two", fontsize=SMALL + 1)
    axis.set_title(f"{models[0]} / {models[1]}", fontsize=SMALL + 1)
    axis.tick_params(axis="x", labelsize=SMALL)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
