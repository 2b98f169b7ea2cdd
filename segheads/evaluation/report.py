"""What an evaluation leaves behind: tables, scores of single images, pictures of the worst."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.drawing import picture_or_warning
from segheads.evaluation.plots import BINS, Row, plot_confusion, plot_reliability, plot_worst
from segheads.evaluation.tables import SHOWN, listed, markdown_table, named, percent, words
from segheads.files import whole_file, write_json, write_text
from segheads.metrics import METRICS
from segheads.metrics.object_size import SIZES

LIMITS = {"small": "small, under 32²", "medium": "medium", "large": "large, over 96²"}


def write_evaluation(
    folder: Path,
    results: Mapping[str, Tensor],
    protocol: Mapping[str, Any],
    dataset: SegmentationDataset,
    rows: Sequence[Row],
) -> None:
    """Write results.json, results.md and images.csv; worst.png where there are rows.

    With calibration, also reliability.png; with F1, confusion.csv and confusion.png.

    Args:
        folder: Where to; made if need be.
        results: What `evaluate(..., per_image=True)` gave.
        protocol: How it was measured, JSON values for the files.
        dataset: Tells names and colours of the classes, and names of the images.
        rows: The samples that `worst_images` names, in its order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, results, dataset, protocol)
    write_text(folder / "results.md", evaluation_markdown(results, protocol, dataset.class_names) + "\n")
    write_images(folder / "images.csv", results, dataset)
    if "confusion" in results:
        write_confusion(folder / "confusion.csv", results["confusion"], dataset.class_names)
        with picture_or_warning(folder / "confusion.png"):
            plot_confusion(results["confusion"], dataset.class_names, folder / "confusion.png")
    if rows:
        worst = worst_images(results, len(rows))
        with picture_or_warning(folder / "worst.png"):
            plot_worst(rows, results["image_mIoU"][worst].tolist(), dataset, folder / "worst.png")


def scores(results: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of a results table, as fractions: aAcc, mAcc, mIoU and, where they were measured, ECE and the like.

    Args:
        results: What `evaluate` gave.
    """
    return {key: results[key].item() for metric in METRICS.values() for key in metric.scores if key in results}


def absent_classes(results: Mapping[str, Tensor], class_names: Sequence[str]) -> list[str]:
    """The classes that mIoU leaves out, since they are neither in the labels nor among the predictions.

    Args:
        results: What `evaluate` gave.
        class_names: The K names.

    Examples:
        >>> import torch
        >>> absent_classes({"IoU": torch.tensor([0.5, torch.nan])}, ["road", "sky"])
        ['sky']
    """
    if "IoU" not in results:
        return []
    iou = results["IoU"].reshape(-1).tolist()  # torchmetrics squeezes (1,) to ()
    return [name for name, value in zip(class_names, iou, strict=True) if value != value]  # only NaN differs


def score_record(results: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Any]:
    """What `scores` gives, and where classes are absent their names: a record for the log of a run.

    Args:
        results: What `evaluate` gave.
        class_names: The K names.
    """
    absent = absent_classes(results, class_names)
    return {**scores(results), **({"absent_classes": absent} if absent else {})}


def score_line(results: Mapping[str, Tensor], class_names: Sequence[str]) -> str:
    """The scores in one line; where classes are absent, it says over how many of how many mIoU is.

    Args:
        results: What `evaluate` gave.
        class_names: The K names.

    Examples:
        >>> import torch
        >>> score_line({"mIoU": torch.tensor(0.5), "IoU": torch.tensor([0.5, torch.nan])}, ["road", "sky"])
        'mIoU 0.5000; mIoU over 1 of 2 classes; absent: sky'
    """
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in scores(results).items())
    left_out = left_out_line(absent_classes(results, class_names), len(class_names), shown=SHOWN)
    return "; ".join(part for part in (numbers, left_out) if part)


def left_out_line(absent: Sequence[str], num_classes: int, *, shown: int | None = None) -> str:
    """Over how many of how many classes mIoU is, and which are absent; empty where none is.

    Args:
        absent: What `absent_classes` gave.
        num_classes: Number of classes K.
        shown: How many names to show; None shows all.

    Examples:
        >>> left_out_line(["sky", "sea"], 11, shown=1)
        'mIoU over 9 of 11 classes; absent: sky and 1 more'
    """
    if not absent:
        return ""
    return f"mIoU over {num_classes - len(absent)} of {num_classes} classes; absent: {named(absent, shown)}"


def write_results(
    folder: Path,
    results: Mapping[str, Tensor],
    dataset: SegmentationDataset,
    protocol: Mapping[str, Any] | None = None,
    *,
    iteration: int | None = None,
) -> None:
    """Write results.json: scores, absent classes, classes, bins; where calibration was measured, reliability.png, too.

    Args:
        folder: Where to.
        results: What `evaluate` gave.
        dataset: Tells the names of the classes.
        protocol: How it was measured, JSON values that the file begins with.
        iteration: Of a training, that the model is of; the number of images stands beside it.
    """
    classes = {"name": dataset.class_names} | {key: listed(results[key]) for key, _ in _class_scores(results)}
    written: dict[str, Any] = {} if protocol is None else {"protocol": dict(protocol)}
    written |= {} if iteration is None else {"iteration": iteration, "images": len(dataset)}
    written |= {name: None if x != x else x for name, x in scores(results).items()}  # JSON has no NaN
    if "IoU" in results:
        written["absent_classes"] = absent_classes(results, dataset.class_names)
    written["classes"] = _records(classes)
    if "ECE" in results:
        written["bins"] = _records({name: listed(results[key]) for name, key in BINS.items()})
        with picture_or_warning(folder / "reliability.png"):
            plot_reliability(results, folder / "reliability.png")
    write_json(folder / "results.json", written)


def worst_images(results: Mapping[str, Tensor], count: int) -> list[int]:
    """The images of lowest mIoU, worst first; those without a labelled pixel have none and are never named.

    Args:
        results: What `evaluate(..., per_image=True)` gave.
        count: How many, if there are so many.

    Examples:
        >>> import torch
        >>> worst_images({"image_mIoU": torch.tensor([0.5, torch.nan, 0.1, 0.3])}, count=2)
        [2, 3]
    """
    order = results["image_mIoU"].argsort(stable=True).tolist()  # NaN comes last
    return [index for index in order if not results["image_mIoU"][index].isnan()][:count]


def evaluation_markdown(results: Mapping[str, Tensor], protocol: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """Scores, scores by size, protocol and classes as Markdown, in percent.

    Args:
        results: What `evaluate` gave.
        protocol: How it was measured.
        class_names: The K names.
    """
    titles = {key: title for metric in METRICS.values() for key, title in metric.scores.items()}
    shown = {key: percent(value) for key, value in scores(results).items() if titles[key]}
    options = [[name, words(value)] for name, value in protocol.items()]
    parts = [
        markdown_table([titles[key] for key in shown], [list(shown.values())], left=0) if shown else "",
        left_out_line(absent_classes(results, class_names), len(class_names)),
        _by_size(results) if "mIoU_small" in results else "",
        "## Protocol",
        markdown_table(["option", "value"], options, left=2),
        "## Classes",
        _class_table(results, class_names),
    ]
    return "\n\n".join(["# Evaluation", "All scores in percent.", *(part for part in parts if part)])


def per_class_markdown(results: Mapping[str, Tensor], class_names: Sequence[str]) -> str:
    """A Markdown table of what was measured of each class, one row for each in the labels' order.

    Fractions come first, in percent, then counts. Where classes are absent, a line beneath names them.

    Args:
        results: What `evaluate` gave, or the `compute` of metrics.
        class_names: The K names.

    Raises:
        ValueError: If there are more or fewer names than classes.

    Examples:
        >>> import torch
        >>> from segheads import SegmentationMetrics
        >>> metrics = SegmentationMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 255]]))
        >>> print(per_class_markdown(metrics.compute(), ["road", "sky"]))
        | class | IoU | Acc | pixels |
        |---|--:|--:|--:|
        | road | 100.00 | 100.00 | 3 |
        | sky | – | – | 0 |
        <BLANKLINE>
        mIoU over 1 of 2 classes; absent: sky
    """
    table = _class_table(results, class_names)
    left_out = left_out_line(absent_classes(results, class_names), len(class_names))
    return f"{table}\n\n{left_out}" if left_out else table


def _class_table(results: Mapping[str, Tensor], class_names: Sequence[str]) -> str:
    """The table alone."""
    shown = [(title, results[key].reshape(-1)) for key, title in _class_scores(results) if title]
    shown.sort(key=lambda column: not column[1].is_floating_point())
    columns = []
    for _, values in shown:
        if len(class_names) != len(values):
            raise ValueError(
                f"one name for each of {len(values)} classes is required, got {len(class_names)}; name them all"
            )
        columns.append([percent(x) if values.is_floating_point() else str(x) for x in values.tolist()])
    rows = [list(row) for row in zip(class_names, *columns, strict=True)]
    return markdown_table(["class", *(title for title, _ in shown)], rows)


def write_images(path: Path, results: Mapping[str, Tensor], dataset: SegmentationDataset) -> None:
    """Write a table with one line for each image, in the order of the data set; fractions, empty where there is none.

    mIoU is over so many `classes`, those in the image's labels, `of classes` in all.

    Args:
        path: The CSV file.
        results: What `evaluate(..., per_image=True)` gave.
        dataset: Tells the names of images and classes.
    """
    iou = results["image_IoU"]
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mIoU", "aAcc", "pixels", "classes", "of classes", "lowest class", "its IoU"])
        for index, (own, mean) in enumerate(zip(iou, results["image_mIoU"].tolist(), strict=True)):
            present = int((~own.isnan()).sum())
            lowest = int(own.nan_to_num(2).argmin())
            scores = [
                mean,
                results["image_aAcc"][index].item(),
                int(results["image_pixels"][index]),
                present,
                iou.shape[1],
            ]
            rest = [dataset.class_names[lowest], own[lowest].item()] if present else ["", ""]
            writer.writerow([dataset.name(index), *("" if x != x else x for x in (*scores, *rest))])


def write_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> None:
    """Write how many pixels of each true class (row) were given each class (column); the last column is none.

    Args:
        path: The CSV file.
        confusion: Pixels `(K, K + 1)`, as `F1Score` gives them.
        class_names: The K names.
    """
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *class_names, "(no class)"])
        writer.writerows([name, *row] for name, row in zip(class_names, confusion.tolist(), strict=True))


def _by_size(results: Mapping[str, Tensor]) -> str:
    """The mIoU of each size, and how much there is of it."""
    rows = []
    labelled = sum(results[f"pixels_{size}"].sum() for size in SIZES)
    for size in SIZES:
        segments, pixels = (results[f"{name}_{size}"].reshape(-1) for name in ("segments", "pixels"))
        share = (pixels.sum() / labelled).item()
        miou = percent(results[f"mIoU_{size}"].item())
        rows.append([LIMITS[size], miou, str(int((segments > 0).sum())), str(int(segments.sum())), percent(share)])
    head = ["segments (pixels)", "mIoU", "classes", "segments", "share of pixels"]
    return "## By size of segments\n\n" + markdown_table(head, rows, left=0)


def _class_scores(results: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Keys and titles of what was measured of each class."""
    for metric in METRICS.values():
        yield from ((key, title) for key, title in metric.class_scores.items() if key in results)


def _records(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One object for each row of a table."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
