"""What the figures share: colours that the colour-blind can tell apart, panels in pixels, legends for many classes."""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib.patheffects as effects
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from torch import Tensor

from segheads.files import whole_file

Colour = tuple[float, float, float]

# Okabe and Ito's, https://jfly.uni-koeln.de/color/, black last; then the same, halfway to white
_OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
OKABE_ITO: tuple[Colour, ...] = tuple(to_rgb(code) for code in _OKABE_ITO)
COLOURS: tuple[Colour, ...] = OKABE_ITO + tuple(
    (0.45 * r + 0.55, 0.45 * g + 0.55, 0.45 * b + 0.55) for r, g, b in OKABE_ITO
)
# For lines: without yellow, which is too light on white; neighbours far apart
LINE_COLOURS: tuple[Colour, ...] = tuple(OKABE_ITO[k] for k in (0, 5, 2, 3, 4, 1, 7))
OTHER: Colour = (0.62, 0.62, 0.62)
NO_CLASS: Colour = (1.0, 1.0, 1.0)
MOST_IN_LEGEND = 24
SMALL = 7  # points
MOST_LETTERS = 40  # of a name
log = logging.getLogger(__name__)

Palette = Sequence[tuple[int, int, int]]


def sheet(
    panels: int,
    columns: int,
    size: tuple[float, float],
    *,
    margins: tuple[float, float] = (0, 0),
    layout: Literal["constrained", "compressed"] = "constrained",
) -> tuple[Figure, list[Any]]:
    """A figure of panels in rows, and its axes.

    Args:
        panels: How many.
        columns: Panels in a row, at most.
        size: Width and height of a panel with its titles, inches.
        margins: What the figure is wider and higher than its panels, inches.
        layout: matplotlib's; "compressed" keeps panels of fixed proportions together.
    """
    rows, columns = math.ceil(panels / columns), min(columns, panels)
    figure = Figure(figsize=(columns * size[0] + margins[0], rows * size[1] + margins[1]), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def picture_sheet(panels: int, columns: int, proportion: float, cell: float = 2.5) -> tuple[Figure, list[Any]]:
    """A `sheet` of images: their height over width, and their width in inches."""
    columns = math.ceil(panels / math.ceil(panels / columns))  # 3 and 2 rather than 4 and 1
    return sheet(panels, columns, (cell, cell * proportion + 0.45), margins=(1.6, 0.5), layout="compressed")


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write a picture, whole or not at all.

    Args:
        figure: What to draw.
        path: The file; its ending tells the format.
        dpi: Pixels per inch.
    """
    show_as_written(figure)
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of an emoji, say: a box stands for it
        figure.savefig(temporary, dpi=dpi)


@contextmanager
def picture_or_warning(path: str | Path) -> Iterator[None]:
    """Say of a picture that cannot be drawn, whatever the reason, that it is missing, and go on.

    Args:
        path: The picture.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s is not drawn: %s", path, str(error).splitlines()[0] if str(error) else repr(error))


def show_as_written(figure: Figure) -> None:
    """Let no dollar sign in a name begin a formula.

    Args:
        figure: All its texts; those of matplotlib's own formatters may be formulas.
    """
    for text in figure.findobj(Text):
        if "$" in text.get_text() and "\\math" not in text.get_text():
            text.set_parse_math(False)


def shortened(name: str, most: int = MOST_LETTERS) -> str:
    """A name that fits beside a picture, on one line.

    Args:
        name: Any; a legend would leave out one that begins with an underscore.
        most: Letters.

    Examples:
        >>> shortened("a very long name of a class", 12), shortened("_other")
        ('a very long…', ' _other')
    """
    name = " ".join(name.split()) if len(name.split()) > 1 or "\n" in name else name
    name = name if len(name) <= most else f"{name[: most - 1].rstrip()}…"
    return f" {name}" if name.startswith("_") else name


def colour_labels(labels: NDArray[Any], palette: NDArray[Any]) -> NDArray[Any]:
    """A label map as a picture; what is no class is white.

    Args:
        labels: Integers.
        palette: A colour for each of K classes, uint8 or floats in [0, 1].

    Shape:
        labels `(...)`, palette `(K, 3)` to `(..., 3)`.
    """
    K = len(palette)
    white = np.full((1, 3), 255 if palette.dtype == np.uint8 else 1, dtype=palette.dtype)
    index = np.where((labels >= 0) & (labels < K), labels.astype(np.int64), K)
    coloured: NDArray[Any] = np.concatenate([palette, white])[index]
    return coloured


def in_pixels(axis: Any, size: tuple[int, int], title: str, *, is_leftmost: bool | None = None) -> None:
    """Title, limits and labels of a panel that shows an image of `size`; rows are labelled on the left alone."""
    left = axis.get_subplotspec().is_first_col() if is_leftmost is None else is_leftmost
    axis.set(xlim=(0, size[1]), ylim=(size[0], 0), aspect="equal")
    axis.set_title(title, fontsize=SMALL + 1)
    axis.set_xlabel("x (pixels)", fontsize=SMALL)
    axis.set_ylabel("y (pixels)" if left else "", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL - 1, labelleft=left)


def show_picture(axis: Any, picture: Tensor, title: str = "image") -> None:
    """An image `(3, H, W)` of values in [0, 1]."""
    H, W = picture.shape[1:]
    axis.imshow(picture.detach().cpu().clamp(0, 1).permute(1, 2, 0).float().numpy(), extent=(0, W, H, 0))
    in_pixels(axis, (H, W), title)


def mark_patch(axis: Any, pixel: tuple[int, int], cell: tuple[float, float], colour: str = "#D55E00") -> None:
    """A frame around the patch of a pixel."""
    y, x = (int(p / side) * side for p, side in zip(pixel, cell, strict=True))
    frame = Rectangle((x, y), cell[1], cell[0], fill=False, edgecolor=colour, linewidth=1.6, clip_on=False)
    frame.set_path_effects([effects.withStroke(linewidth=3, foreground="white")])
    axis.add_patch(frame)


def show_shares(axis: Any, shares: Tensor, cell: tuple[float, float], size: tuple[int, int], title: str) -> Any:
    """A map of shares `(h, w)` over an image's pixels, from 0 to the largest one, which is in the title."""
    h, w = shares.shape
    largest = float(shares.max())
    shown = axis.imshow(
        100 * shares.numpy() / (largest or 1.0),
        cmap="cividis",
        vmin=0,
        vmax=100,
        extent=(0, w * cell[1], h * cell[0], 0),
        interpolation="nearest",
    )
    in_pixels(axis, size, f"{title}\nlargest {100 * largest:.2g} %, {largest * h * w:.1f} times even")
    return shown


def colour_bar(figure: Figure, shown: Any, axes: Sequence[Any], label: str) -> None:
    """One bar for all panels."""
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL - 1)


def check_picture(picture: Tensor, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of a picture, which must be `(3, H, W)` of values in [0, 1] and of `size`, if that is told.

    Raises:
        ValueError: If it is not.
    """
    if picture.ndim != 3 or len(picture) != 3:
        raise ValueError(f"picture must be (3, H, W), as a data set gives it; got {tuple(picture.shape)}")
    found = (picture.shape[1], picture.shape[2])
    if float(picture.min()) < -0.01 or float(picture.max()) > 1.01:
        raise ValueError(
            f"picture must have values from 0 to 1, before they are normalised for a model; got "
            f"{float(picture.min()):.3g} to {float(picture.max()):.3g}"
        )
    if size is not None and found != size:
        raise ValueError(f"picture must be of the labels' size {size}; got {found}")
    return found


class ClassColours:
    """A colour for each class, and a legend of those that occur.

    Without a palette, up to 16 classes have colours of their own, always the same; of more, the 16 that are the most
    frequent in the maps that are to be shown, and the rest is grey. With a palette, every class has its own.

    Args:
        maps: All label maps that one figure shows; labels that are no class are left white.
        names: One for each class.
        palette: One RGB colour, 0 to 255, for each class; None for colours that the colour-blind can tell apart.
    """

    def __init__(self, maps: Sequence[Tensor], names: Sequence[str], palette: Palette | None = None) -> None:
        if palette is not None and len(palette) != len(names):
            raise ValueError(f"palette must have a colour for each of {len(names)} classes; got {len(palette)}")
        K = len(names)
        labels = torch.cat([x.long().flatten().cpu() for x in maps])
        counts = torch.bincount(labels[(labels >= 0) & (labels < K)], minlength=K)
        frequent = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
        self.names = [shortened(name) for name in names]
        self.frequent, self.rarer = frequent, 0
        self.has_no_class = bool(((labels < 0) | (labels >= K)).any())
        if palette is not None:
            self.colours = {k: (r / 255, g / 255, b / 255) for k, (r, g, b) in enumerate(palette)}
        elif len(COLOURS) >= K:
            self.colours = dict(enumerate(COLOURS[:K]))
        else:
            self.frequent, self.rarer = frequent[: len(COLOURS)], max(0, len(frequent) - len(COLOURS))
            self.colours = dict.fromkeys(range(K), OTHER) | dict(zip(sorted(self.frequent), COLOURS, strict=False))

    def of(self, labels: Tensor) -> NDArray[np.float64]:
        """Labels `(...)` as colours `(..., 3)`."""
        table = np.array([self.colours[k] for k in range(len(self.names))])
        return colour_labels(labels.long().cpu().numpy(), table)

    def show(self, axis: Any, labels: Tensor, title: str) -> None:
        """A label map `(H, W)` with the names of its larger classes written on it."""
        H, W = labels.shape
        axis.imshow(self.of(labels), extent=(0, W, H, 0), interpolation="nearest")
        for k, (y, x) in _places(labels, len(self.names)).items():
            side = "left" if x < 0.12 * W else "right" if x > 0.88 * W else "center"
            text = axis.text(x, y, self.names[k], fontsize=SMALL - 1, ha=side, va="center", clip_on=True)
            text.set_path_effects([effects.withStroke(linewidth=1.8, foreground="white")])
        in_pixels(axis, (H, W), title)

    def legend(
        self,
        figure: FigureBase,
        *,
        most: int = MOST_IN_LEGEND,
        more: Sequence[Patch] = (),
        title: str | None = "class",
    ) -> None:
        """The classes that occur, the most frequent ones of many, on the right of a figure or of a part of one.

        Args:
            figure: Where to.
            most: How many classes there is room for.
            more: What else is to be told.
            title: Above the classes.
        """
        seen = sorted(self.frequent[:most])
        patches = [Patch(facecolor=self.colours[k], edgecolor="grey", label=self.names[k]) for k in seen]
        if others := len(self.frequent) - len(seen):
            patches.append(Patch(facecolor="none", label=f"and {others} more"))
        if self.rarer:
            patches.append(Patch(facecolor=OTHER, edgecolor="grey", label=f"{self.rarer} rarer classes"))
        if self.has_no_class:
            patches.append(Patch(facecolor=NO_CLASS, edgecolor="grey", label="(ignored)"))
        style: dict[str, Any] = {"fontsize": SMALL, "title": title, "title_fontsize": SMALL}
        figure.legend(handles=[*patches, *more], loc="outside right upper", **style)


def _places(labels: Tensor, num_classes: int, smallest: float = 0.04) -> dict[int, tuple[float, float]]:
    """For each class that covers enough of a map, a place (y, x) well inside it."""
    H, W = labels.shape
    side = max(3, 2 * (min(H, W) // 16) + 1)
    places = {}
    for k in labels.unique().tolist():
        mask = (labels == k).float()[None, None].cpu()
        if not 0 <= k < num_classes or mask.mean() < smallest:
            continue
        inside = F.avg_pool2d(mask, side, stride=1, padding=side // 2)  # what is beyond the rim is outside
        rows, columns = torch.arange(H)[:, None] / H, torch.arange(W) / W
        middle = (mask[0, 0] * rows).sum() / mask.sum(), (mask[0, 0] * columns).sum() / mask.sum()
        away = (rows - middle[0]).square() + (columns - middle[1]).square()
        place = int((inside[0, 0] - 0.2 * away).argmax())  # of equals, the one nearest to the middle of the class
        places[k] = (place // W + 0.5, place % W + 0.5)
    return places


def write_names(axis: Any, points: NDArray[Any], names: Sequence[str]) -> int:
    """Write names beside points where they cover no other name, the outer points first; returns how many."""
    figure = axis.figure
    show_as_written(figure)
    figure.draw_without_rendering()  # places of all there is, after the layout
    limits = axis.get_window_extent()
    point = figure.dpi / 72
    placed: list[Any] = []
    dots = [
        Bbox.from_bounds(x - 2 * point, y - 2 * point, 4 * point, 4 * point)
        for x, y in axis.transData.transform(points)
    ]
    order = np.argsort(-np.linalg.norm(points - points.mean(0), axis=1), kind="stable")
    for index in order.tolist():
        text = axis.annotate(shortened(names[index]), points[index], (0, 0), textcoords="offset points", fontsize=SMALL)
        text.set_parse_math(False)
        text.set_in_layout(False)
        here = text.get_window_extent()
        # of the text's lower left corner, or on the left the lower right
        for x, y in ((3, 2), (3, -8), (-3, 2), (-3, -8), (5, -3), (-5, -3)):
            left = x if x > 0 else x - here.width / point
            box = here.translated(left * point, y * point)
            inside = limits.x0 <= box.x0 and box.x1 <= limits.x1 and limits.y0 <= box.y0 and box.y1 <= limits.y1
            if inside and not box.count_overlaps([*placed, *dots]):
                text.set_position((left, y))
                placed.append(box)
                break
        else:
            text.remove()
    return len(placed)


def part_title(name: str) -> str:
    """Name of a part of a model as people read it: `head.learners.0` is learner 1."""
    kind, _, number = name.rpartition(".")
    words = {"head.learners": "learner", "head.shifts": "shift of level"}
    return f"{words[kind]} {int(number) + 1}" if kind in words and number.isdigit() else name
