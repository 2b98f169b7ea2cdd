"""What an evaluation leaves behind: tables, scores of single images, pictures of the worst."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from segheads.data import SegmentationDataset
from segheads.files import write_text
from segheads.metrics.confusion import per_class_markdown, percent
from segheads.metrics.object_size import SIZES
from segheads.training.report import Row, plot_worst, write_results

TITLES = {"aAcc": "aAcc", "mAcc": "mAcc", "mIoU": "mIoU", "mBIoU": "boundary IoU", "ECE": "ECE"}
LIMITS = {"small": "small, under 32²", "medium": "medium", "large": "large, over 96²"}


def write_evaluation(
    folder: Path,
    results: Mapping[str, Tensor],
    protocol: Mapping[str, Any],
    dataset: SegmentationDataset,
    rows: Sequence[Row],
) -> None:
    """Write results.json, results.md and images.csv; reliability.png with calibration, worst.png where there are rows.

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
    if rows:
        worst = worst_images(results, len(rows))
        plot_worst(rows, results["image_mIoU"][worst].tolist(), dataset, folder / "worst.png")


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
    shown = [name for name in TITLES if name in results]
    parts = [
        _table([TITLES[name] for name in shown], [[percent(results[name].item()) for name in shown]]),
        _by_size(results) if "mIoU_small" in results else "",
        "## Protocol",
        _table(["option", "value"], [[name, _words(value)] for name, value in protocol.items()], left=True),
        "## Classes",
        per_class_markdown(results, class_names),
    ]
    return "\n\n".join(["# Evaluation", "All scores in percent.", *(part for part in parts if part)])


def write_images(path: Path, results: Mapping[str, Tensor], dataset: SegmentationDataset) -> None:
    """Write a table with one line for each image, in the order of the data set; fractions, empty where there is none.

    Args:
        path: The CSV file.
        results: What `evaluate(..., per_image=True)` gave.
        dataset: Tells the names of images and classes.
    """
    iou = results["image_IoU"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mIoU", "aAcc", "pixels", "classes", "lowest class", "its IoU"])
        for index, (own, mean) in enumerate(zip(iou, results["image_mIoU"].tolist(), strict=True)):
            present = int((~own.isnan()).sum())
            lowest = int(own.nan_to_num(2).argmin())
            scores = [mean, results["image_aAcc"][index].item(), int(results["image_pixels"][index]), present]
            rest = [dataset.class_names[lowest], own[lowest].item()] if present else ["", ""]
            writer.writerow([dataset.name(index), *("" if x != x else x for x in (*scores, *rest))])


def _by_size(results: Mapping[str, Tensor]) -> str:
    """The mIoU of each size, and how much there is of it."""
    rows = []
    for size in SIZES:
        segments, pixels = (results[f"{name}_{size}"].reshape(-1) for name in ("segments", "pixels"))
        share = (pixels.sum() / results["pixels"].sum()).item()
        miou = percent(results[f"mIoU_{size}"].item())
        rows.append([LIMITS[size], miou, str(int((segments > 0).sum())), str(int(segments.sum())), percent(share)])
    head = ["segments (pixels)", "mIoU", "classes", "segments", "share of pixels"]
    return "## By size of segments\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> str:
    line = "|" + ("---|" if left else "--:|") * len(head)
    return "\n".join([f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)])


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(x) for x in value) if isinstance(value, (list, tuple)) else str(value)
