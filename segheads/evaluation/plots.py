"""Pictures of an evaluation: predictions, the worst images, uncertainty, reliability, confusion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.drawing import OKABE_ITO, ClassColours, colour_labels, save_figure, sheet, shortened
from segheads.evaluation.tables import percent
from segheads.functional.uncertainty import Uncertainty

Row = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]  # name, image, truth, prediction
UncertaintyRow = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], Uncertainty]
BINS = {"confidence": "bin_confidence", "accuracy": "bin_accuracy", "pixels": "bin_pixels"}
WRONG = OKABE_ITO[5]  # vermilion
LEGEND_LINE = 0.165  # inches


def plot_predictions(rows: Sequence[Row], dataset: SegmentationDataset, path: str | Path) -> None:
    """Draw a sheet of image, truth and prediction side by side, with a legend of the classes that occur.

    Args:
        rows: Name, image `(H, W, 3)`, true labels `(H, W)` and predicted labels `(H, W)` of each sample.
        dataset: Tells names and colours of the classes.
        path: The picture to write.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("a sheet of predictions needs at least one sample; got none")
    figure, axes = _sheet(rows, 3)
    for axis, row in zip(axes, rows, strict=True):
        _show_labels(axis, row, dataset)
    _class_legend(figure, rows, dataset)
    save_figure(figure, path, dpi=110)


def plot_worst(
    rows: Sequence[Row], image_scores: Sequence[float], dataset: SegmentationDataset, path: str | Path
) -> None:
    """Draw a sheet of image, truth, prediction and where these differ, with each image's score.

    The last picture is the image in grey, its wrong pixels in vermilion; ignored ones are white.

    Args:
        rows: What `plot_predictions` takes, worst first.
        image_scores: The mIoU of each, a fraction.
        dataset: Tells names and colours of the classes.
        path: The picture to write.

    Raises:
        ValueError: If there are no rows, or not one score for each.
    """
    if not rows or len(rows) != len(image_scores):
        raise ValueError(
            f"a sheet needs rows, and a score for each; got {len(rows)} rows and {len(image_scores)} scores"
        )
    figure, axes = _sheet(rows, 4)
    for rank, (axis, row, score) in enumerate(zip(axes, rows, image_scores, strict=True), 1):
        name, image, truth, prediction = row
        _show_labels(axis, (f"{rank}. {name}", image, truth, prediction), dataset)
        labelled = truth != dataset.ignore_index
        wrong = labelled & (truth != prediction)
        axis[3].imshow(_differences(image, wrong, ~labelled), interpolation="nearest")
        share = wrong.sum() / max(labelled.sum(), 1)
        over = f"over {len(np.unique(truth[labelled]))} of {dataset.num_classes} classes"
        axis[3].set_title(f"mIoU {percent(score)} % {over}, {100 * share:.0f} % of pixels wrong", fontsize=8)
    _class_legend(figure, rows, dataset, Patch(facecolor=WRONG, label="(wrong)"))
    save_figure(figure, path, dpi=110)


def _differences(image: NDArray[np.uint8], wrong: NDArray[Any], ignored: NDArray[Any]) -> NDArray[np.uint8]:
    """The image in grey, neither black nor white, wrong pixels coloured in its brightness, and ignored ones white."""
    grey = image.mean(axis=2, keepdims=True) / 255
    shown = np.where(wrong[..., None], 255 * np.array(WRONG) * (0.6 + 0.4 * grey), 255 * (0.3 + 0.45 * grey))
    shown[ignored] = 255
    return shown.astype(np.uint8)


def plot_uncertainty(rows: Sequence[UncertaintyRow], dataset: SegmentationDataset, path: str | Path) -> None:
    """Draw a sheet of image, truth and prediction beside predictive entropy, mutual information and disagreement.

    Each of the three has one colour bar, in nats from 0 to the highest value on the sheet.

    Args:
        rows: Name, image `(H, W, 3)`, true and predicted labels `(H, W)`, and an `Uncertainty` of maps `(H, W)` of each
            sample.
        dataset: Tells names and colours of the classes.
        path: The picture to write.

    Raises:
        ValueError: If there are no rows, or a map is not of its labels' size.
    """
    if not rows:
        raise ValueError("a sheet of uncertainty needs at least one sample; got none")
    titles = {field: field.replace("_", " ") for field in Uncertainty._fields}
    for name, _, truth, _, maps in rows:
        for field, values in maps._asdict().items():
            if values.shape != truth.shape:
                raise ValueError(f"{field} of {name} must be {truth.shape} as its labels; got {tuple(values.shape)}")
    figure, axes = _sheet(rows, 6, cell=2.7, below=0.6)
    for axis, row in zip(axes, rows, strict=True):
        _show_labels(axis, row[:4], dataset)
    for column, (field, title) in enumerate(titles.items(), 3):
        pictures = [getattr(row[4], field).detach().cpu().float().numpy() for row in rows]
        highest = max(float(picture.max()) for picture in pictures)
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            shown = axis.imshow(picture, cmap="inferno", vmin=0, vmax=highest or 1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
        bar = figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.9, aspect=30, pad=0.02)
        bar.set_label("nats", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    _class_legend(figure, rows, dataset)
    save_figure(figure, path, dpi=110)


def plot_reliability(results: Mapping[str, Tensor], path: str | Path) -> None:
    """Draw a reliability diagram: the accuracy of pixels against their confidence, and how many there are of each.

    Where bars end below the diagonal the model is surer than it is right. The mark on each bar is its mean confidence;
    the calibration error is the mean distance from the bar's end to the mark, weighted by pixels.

    Args:
        results: What `evaluate(..., metrics=["calibration"])` gave.
        path: The picture to write.

    Raises:
        ValueError: If calibration was not measured.
    """
    if "ECE" not in results:
        raise ValueError(
            "a reliability diagram needs ECE, which evaluate(..., metrics=['calibration']) measures; got none"
        )
    confidence, accuracy, pixels = (results[name].reshape(-1).double().numpy() for name in BINS.values())
    width = 1 / len(pixels)
    left = np.arange(len(pixels)) * width
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars = {"align": "edge", "width": width, "edgecolor": "white"}
    upper.bar(left, np.nan_to_num(accuracy), **bars, color=OKABE_ITO[0], label="accuracy")
    upper.plot([0, 1], [0, 1], "--", color="grey", label="as right as sure")
    upper.hlines(confidence, left, left + width, color=OKABE_ITO[5], label="mean confidence", clip_on=False, zorder=3)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"ECE {100 * results['ECE'].item():.2f} %")
    upper.legend(loc="upper left")
    lower.bar(left, 100 * pixels / max(pixels.sum(), 1), **bars, color="grey")
    lower.set(xlabel="confidence", ylabel="pixels (percent)")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    save_figure(figure, path, dpi=100)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], path: str | Path) -> None:
    """Draw what the pixels of each true class (row) were taken for (column), in percent of the row.

    A row of a class without a labelled pixel is grey. Up to 20 classes have their numbers in the cells.

    Args:
        confusion: Pixels `(K, K + 1)`, as `F1Score` gives them; the last column, of no class, is drawn if it is not
            empty.
        class_names: The K names.
        path: The picture to write.

    Raises:
        ValueError: If there is not one name for each class.
    """
    K = len(class_names)
    if confusion.shape != (K, K + 1):
        raise ValueError(f"confusion of {K} classes must be {(K, K + 1)}; got {tuple(confusion.shape)}")
    counts, columns = confusion.double().numpy(), [*map(shortened, class_names), "(no class)"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / confusion.double().numpy().sum(1, keepdims=True)
    side = min(24.0, 3 + 0.4 * K)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    shown = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    small = min(8.0, 20 * 72 / (2 * max(K, 1)) / 2)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=small)
    axes.set_yticks(range(K), columns[:K], fontsize=small)
    axes.set(xlabel="predicted class", ylabel="true class")
    for row, column in zip(*np.nonzero(np.nan_to_num(shares)), strict=True) if K <= 20 else ():
        value = shares[row, column]
        axes.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="black" if value > 60 else "white"
        )
    figure.colorbar(shown, ax=axes, label="pixels of the true class (percent)", shrink=0.8)
    save_figure(figure, path, dpi=100)


def _show_labels(axes: Any, row: Row, dataset: SegmentationDataset) -> None:
    """Image, truth and prediction in the first three axes."""
    name, image, truth, prediction = row
    palette = np.array(dataset.palette, dtype=np.uint8)
    shown = [image, colour_labels(truth, palette), colour_labels(prediction, palette)]
    for axis, picture, title in zip(axes, shown, (name, "truth", "prediction"), strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(shortened(title), fontsize=8)


def _sheet(rows: Sequence[Any], columns: int, cell: float = 3.4, below: float = 0) -> tuple[Figure, Any]:
    """A figure with a row of axes for each sample, of the first one's proportions; sizes in inches."""
    height, width = rows[0][2].shape
    size = (cell, cell * height / width + 0.25)
    # "constrained" cuts titles off
    figure, axes = sheet(len(rows) * columns, columns, size, margins=(2.4, below), layout="compressed")
    for axis in axes:
        axis.axis("off")
    return figure, np.array(axes, dtype=object).reshape(len(rows), columns)


def _class_legend(figure: Figure, rows: Sequence[Any], dataset: SegmentationDataset, *more: Patch) -> None:
    """The colours of the classes that occur in truths and predictions, and of what else there is.

    Where there are more than find room, those of most pixels.
    """
    maps = [torch.from_numpy(labels) for row in rows for labels in row[2:4]]
    classes = ClassColours(maps, dataset.class_names, dataset.palette)
    room = int(figure.get_figheight() / LEGEND_LINE) - classes.has_no_class - len(more) - 2
    classes.legend(figure, most=max(1, room), more=more, title=None)
