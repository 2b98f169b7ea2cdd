"""What a person looks at after a run: curves, pictures, a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.files import write_json, write_text
from segheads.functional.uncertainty import Uncertainty
from segheads.metrics.confusion import per_class_markdown, percent
from segheads.metrics.object_size import SIZES

Row = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]  # name, image, truth, prediction
UncertaintyRow = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64], Uncertainty]
SCORES = ("aAcc", "mAcc", "mIoU", *(f"mIoU_{size}" for size in SIZES), "mBIoU", "ECE")
CLASS_SCORES = ("IoU", "Acc", "pixels", *(f"{name}_{size}" for size in SIZES for name in ("IoU", "segments")), "BIoU")
BINS = ("bin_confidence", "bin_accuracy", "bin_pixels")
WRONG = (213, 94, 0)  # Okabe and Ito's vermilion
LEGEND_LINE = 0.165  # inches
IGNORED_COLOUR = (255, 255, 255)


def scores(results: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of a results table, as fractions: aAcc, mAcc, mIoU and, where they were measured, ECE and the like.

    Args:
        results: What `evaluate` gave.
    """
    return {name: results[name].item() for name in SCORES if name in results}


def write_report(
    folder: Path,
    results: Mapping[str, Tensor],
    records: Sequence[Mapping[str, Any]],
    dataset: SegmentationDataset,
    rows: Sequence[Row],
) -> None:
    """Write results.json, per_class.md and curves.png.

    Where there are rows, predictions.png, too; where calibration was measured, its bins in results.json and
    reliability.png.

    Args:
        folder: Where to.
        results: What `evaluate` gave.
        records: The lines of `metrics.jsonl`.
        dataset: Tells names and colours of the classes.
        rows: What `plot_predictions` takes.
    """
    write_results(folder, results, dataset)
    write_text(folder / "per_class.md", per_class_markdown(results, dataset.class_names) + "\n")
    plot_curves(records, folder / "curves.png")
    if rows:
        plot_predictions(rows, dataset, folder / "predictions.png")


def write_results(
    folder: Path,
    results: Mapping[str, Tensor],
    dataset: SegmentationDataset,
    protocol: Mapping[str, Any] | None = None,
) -> None:
    """Write results.json: scores, classes and bins; where calibration was measured, reliability.png, too.

    Args:
        folder: Where to.
        results: What `evaluate` gave.
        dataset: Tells the names of the classes.
        protocol: How it was measured, JSON values that the file begins with.
    """
    classes = {"name": dataset.class_names, **_lists(results, [name for name in CLASS_SCORES if name in results])}
    written: dict[str, Any] = {} if protocol is None else {"protocol": dict(protocol)}
    written |= {name: None if x != x else x for name, x in scores(results).items()}  # JSON has no NaN
    written["classes"] = _json_rows(classes)
    if "ECE" in results:
        bins = dict(zip(("confidence", "accuracy", "pixels"), _lists(results, BINS).values(), strict=True))
        written["bins"] = _json_rows(bins)
        plot_reliability(results, folder / "reliability.png")
    write_json(folder / "results.json", written)


def _lists(results: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: results[name].reshape(-1).tolist() for name in names}  # torchmetrics squeezes (1,) to ()


def _json_rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One object for each row; NaN, of what does not occur, becomes None: JSON has none."""
    return [
        {key: None if value != value else value for key, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


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
    figure, axes = _sheet(rows, 3)
    for axis, row in zip(axes, rows, strict=True):
        _show_labels(axis, row, dataset)
    _class_legend(figure, rows, dataset)
    figure.savefig(path, dpi=110)


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
        axis[3].set_title(f"mIoU {percent(score)} %, {100 * share:.0f} % of pixels wrong", fontsize=8)
    wrong_patch = Patch(facecolor="#{:02x}{:02x}{:02x}".format(*WRONG), label="(wrong)")
    _class_legend(figure, rows, dataset, wrong_patch)
    figure.savefig(path, dpi=110)


def _differences(image: NDArray[np.uint8], wrong: NDArray[Any], ignored: NDArray[Any]) -> NDArray[np.uint8]:
    """The image in grey, neither black nor white, wrong pixels coloured in its brightness, and ignored ones white."""
    grey = image.mean(axis=2, keepdims=True) / 255
    shown = np.where(wrong[..., None], np.array(WRONG) * (0.6 + 0.4 * grey), 255 * (0.3 + 0.45 * grey))
    shown[ignored] = IGNORED_COLOUR
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
    figure.savefig(path, dpi=110)


def plot_reliability(results: Mapping[str, Tensor], path: str | Path) -> None:
    """Draw a reliability diagram: the accuracy of pixels against their confidence, and how many there are of each.

    Where bars end below the diagonal the model is surer than it is right. The mark on each bar is its mean confidence;
    the calibration error is the mean distance from the bar's end to the mark, weighted by pixels.

    Args:
        results: What `evaluate(..., calibration=True)` gave.
        path: The picture to write.

    Raises:
        ValueError: If calibration was not measured.
    """
    if "ECE" not in results:
        raise ValueError("a reliability diagram needs ECE, which evaluate(..., calibration=True) measures; got none")
    confidence, accuracy, pixels = (np.array(values, dtype=float) for values in _lists(results, BINS).values())
    width = 1 / len(pixels)
    left = np.arange(len(pixels)) * width
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars = {"align": "edge", "width": width, "edgecolor": "white"}
    upper.bar(left, np.nan_to_num(accuracy), **bars, color="tab:blue", label="accuracy")
    upper.plot([0, 1], [0, 1], "--", color="grey", label="as right as sure")
    upper.hlines(confidence, left, left + width, color="tab:red", label="mean confidence", clip_on=False, zorder=3)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"ECE {100 * results['ECE'].item():.2f} %")
    upper.legend(loc="upper left")
    lower.bar(left, 100 * pixels / max(pixels.sum(), 1), **bars, color="grey")
    lower.set(xlabel="confidence", ylabel="pixels (percent)")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=100)


def _sheet(rows: Sequence[Any], columns: int, cell: float = 3.4, below: float = 0) -> tuple[Figure, Any]:
    """A figure with a row of axes for each sample, of the first one's proportions; sizes in inches."""
    height, width = rows[0][2].shape
    size = (columns * cell + 2.4, len(rows) * (cell * height / width + 0.25) + below)
    figure = Figure(figsize=size, layout="compressed")  # "constrained" cuts titles off
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _show_labels(axes: Any, row: Row, dataset: SegmentationDataset) -> None:
    """Image, truth and prediction in the first three axes."""
    name, image, truth, prediction = row
    shown = [image, colour_labels(truth, dataset.palette), colour_labels(prediction, dataset.palette)]
    for axis, picture, title in zip(axes, shown, (name, "truth", "prediction"), strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=8)


def _class_legend(figure: Figure, rows: Sequence[Any], dataset: SegmentationDataset, *more: Patch) -> None:
    """The colours of the classes that occur in truths and predictions, and of what else there is.

    Where there are more than find room, those of most pixels.
    """
    pixels = np.bincount(np.concatenate([labels.ravel() for row in rows for labels in row[2:4]]).astype(np.int64))
    seen = pixels.nonzero()[0]
    classes = seen[seen < dataset.num_classes]
    others = [Patch(facecolor="white", edgecolor="grey", label="(ignored)")] if len(classes) < len(seen) else []
    room = max(1, int(figure.get_figheight() / LEGEND_LINE) - len(others) - len(more) - 2)
    largest = sorted(classes[pixels[classes].argsort(kind="stable")[::-1][:room]].tolist())
    if len(largest) < len(classes):
        others.insert(0, Patch(facecolor="none", label=f"and {len(classes) - len(largest)} more"))
    patches = [
        Patch(
            facecolor="#{:02x}{:02x}{:02x}".format(*dataset.palette[k]), edgecolor="grey", label=dataset.class_names[k]
        )
        for k in largest
    ]
    figure.legend(handles=[*patches, *others, *more], loc="outside right upper", fontsize=7)
