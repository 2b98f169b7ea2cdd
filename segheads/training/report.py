"""What a person looks at after a run: curves, pictures, a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.metrics import per_class_markdown

Row = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]  # name, image, truth, prediction
IGNORED_COLOUR = (255, 255, 255)


def scores(results: Mapping[str, Tensor]) -> dict[str, float]:
    """The three numbers of a results table, as fractions.

    Args:
        results: What `SegmentationMetrics.compute` gave.
    """
    return {name: results[name].item() for name in ("aAcc", "mAcc", "mIoU")}


def write_report(
    folder: Path,
    results: Mapping[str, Tensor],
    records: Sequence[Mapping[str, Any]],
    dataset: SegmentationDataset,
    rows: Sequence[Row],
) -> None:
    """Write results.json, per_class.md, curves.png and, where there are rows, predictions.png.

    Args:
        folder: Where to.
        results: What `SegmentationMetrics.compute` gave.
        records: The lines of `metrics.jsonl`.
        dataset: Tells names and colours of the classes.
        rows: What `plot_predictions` takes.
    """
    columns = [dataset.class_names, *(results[name].reshape(-1).tolist() for name in ("IoU", "Acc", "pixels"))]
    keys = ("name", "IoU", "Acc", "pixels")
    classes = [
        {key: None if value != value else value for key, value in zip(keys, row, strict=True)}
        for row in zip(*columns, strict=True)  # a class that does not occur has NaN, which JSON lacks
    ]
    (folder / "results.json").write_text(json.dumps({**scores(results), "classes": classes}, indent=2) + "\n")
    (folder / "per_class.md").write_text(per_class_markdown(results, dataset.class_names) + "\n")
    plot_curves(records, folder / "curves.png")
    if rows:
        plot_predictions(rows, dataset, folder / "predictions.png")


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss, learning rate and evaluation scores over the iterations of a run.

    Args:
        records: The lines of `metrics.jsonl`.
        path: The picture to write.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    _line(axes[0], records, "loss", "loss (nats per pixel)")
    _line(axes[1], records, "learning_rate", "learning rate")
    for name in ("aAcc", "mAcc", "mIoU"):
        _line(axes[2], records, name, "percent", marker="o", factor=100)
    axes[2].set(xlabel="iteration", ylim=(0, 100))
    if axes[2].lines:
        axes[2].legend()
    figure.savefig(path, dpi=100)


def _line(
    axis: Any, records: Sequence[Mapping[str, Any]], name: str, label: str, factor: float = 1, **style: Any
) -> None:
    points = [(r["iteration"], r[name] * factor) for r in records if r.get(name) is not None]
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if points:
        axis.plot(*zip(*points, strict=True), label=name, **style)


def colour_labels(labels: NDArray[Any], palette: Sequence[tuple[int, int, int]]) -> NDArray[np.uint8]:
    """Label map `(H, W)` as a picture `(H, W, 3)`; what is no class is white."""
    table = np.full((256, 3), IGNORED_COLOUR, dtype=np.uint8)
    table[: len(palette)] = palette
    coloured: NDArray[np.uint8] = table[labels.astype(np.uint8)]
    return coloured


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
    height, width = rows[0][2].shape
    cell = 3.4
    figure = Figure(figsize=(3 * cell + 2.4, len(rows) * (cell * height / width + 0.25)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for row, (name, image, truth, prediction) in zip(axes, rows, strict=True):
        shown = [image, colour_labels(truth, dataset.palette), colour_labels(prediction, dataset.palette)]
        for axis, picture, title in zip(row, shown, (name, "truth", "prediction"), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    names = dataset.class_names
    seen = sorted({label for row in rows for labels in row[2:] for label in np.unique(labels).tolist()})
    patches = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*dataset.palette[k]), edgecolor="grey", label=names[k])
        for k in seen
        if k < dataset.num_classes
    ]
    if any(k >= dataset.num_classes for k in seen):
        patches.append(Patch(facecolor="white", edgecolor="grey", label="(ignored)"))
    figure.legend(handles=patches, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=110)
