"""What a person looks at after a run: curves, pictures, a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.drawing import LINE_COLOURS, picture_or_warning, save_figure
from segheads.evaluation.plots import Row, plot_predictions
from segheads.evaluation.report import per_class_markdown, write_results
from segheads.files import write_text


def write_report(
    folder: Path,
    results: Mapping[str, Tensor],
    records: Sequence[Mapping[str, Any]],
    dataset: SegmentationDataset,
    rows: Sequence[Row],
    *,
    iteration: int | None = None,
) -> None:
    """Write results.json, per_class.md and curves.png.

    Where there are rows, predictions.png, too; where calibration was measured, its bins in results.json and
    reliability.png. A picture that cannot be drawn is a warning.

    Args:
        folder: Where to.
        results: What `evaluate` gave.
        records: The lines of `metrics.jsonl`.
        dataset: Tells names and colours of the classes.
        rows: What `plot_predictions` takes.
        iteration: That the model is of, for results.json.
    """
    write_results(folder, results, dataset, iteration=iteration)
    write_text(folder / "per_class.md", per_class_markdown(results, dataset.class_names) + "\n")
    with picture_or_warning(folder / "curves.png"):
        plot_curves(records, folder / "curves.png")
    if rows:
        with picture_or_warning(folder / "predictions.png"):
            plot_predictions(rows, dataset, folder / "predictions.png")


def plot_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss and its terms, each before its factor, learning rate and evaluation scores over a run's iterations.

    Args:
        records: The lines of `metrics.jsonl`.
        path: The picture to write.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    terms = list(dict.fromkeys(name for record in records for name in record.get("terms", ())))
    _line(axes[0], records, "loss", "loss", color=LINE_COLOURS[0])
    for place, name in enumerate(terms):
        flat = [{"iteration": r["iteration"], name: r.get("terms", {}).get(name)} for r in records]
        style = "-" if place < len(LINE_COLOURS) - 1 else "--"
        _line(axes[0], flat, name, "loss", color=LINE_COLOURS[(place + 1) % len(LINE_COLOURS)], linestyle=style)
    if terms:
        axes[0].legend(fontsize=8, ncols=3, loc="upper right")
    _line(axes[1], records, "learning_rate", "learning rate", color=LINE_COLOURS[0])
    for name, colour in zip(("aAcc", "mAcc", "mIoU"), LINE_COLOURS, strict=False):
        _line(axes[2], records, name, "percent", marker="o", factor=100, color=colour)
    axes[2].set(xlabel="iteration", ylim=(0, 100))
    if axes[2].lines:
        axes[2].legend()
    save_figure(figure, path, dpi=100)


def _line(
    axis: Any, records: Sequence[Mapping[str, Any]], name: str, label: str, factor: float = 1, **style: Any
) -> None:
    points = [(r["iteration"], r[name] * factor) for r in records if r.get(name) is not None]
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if points:
        axis.plot(*zip(*points, strict=True), label=name, **style)
