"""aAcc, mAcc and mIoU from one confusion matrix over a whole data set."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

Average = Literal["present", "scene_parsing"]
NO_LABEL = torch.iinfo(torch.int64).min


class SegmentationMetrics(Metric):
    """Pixel accuracy, mean accuracy and mean IoU, counted over all images before any division.

    One confusion matrix (K, K + 1) of int64 is summed over batches, images and processes, so the result depends on
    neither how they were split nor whether the number of processes divides the number of images. Row: true class.
    Column: predicted class; the last one holds predictions that name no class (`ignore_index`, or outside 0..K-1),
    which are errors for the true class only, as in the official scene-parsing evaluation. Ignored pixels are dropped.
    Each image must reach one process only: Accelerate's `even_batches` repeats some, so turn it off.

    `torchmetrics.segmentation.MeanIoU` averages over images instead and is not the benchmarks' number.

    Args:
        num_classes: K; labels are 0..K-1.
        ignore_index: the label of pixels that do not count.
        average: what `mIoU` and `mAcc` do with a class that never occurs: `"present"` leaves it out (MMSegmentation),
            `"scene_parsing"` counts it as 0 and divides by K (official ADE20K scene parsing).

    Shape:
        `update(preds, labels)`: integer maps of one shape, (B, H, W) or (H, W). `compute()`: a dict of tensors on the
        CPU; float64 fractions in [0, 1], 0-d `"aAcc"`, `"mAcc"`, `"mIoU"` and (K,) `"IoU"`, `"Acc"`, NaN where a class
        does not occur (all NaN without a labelled pixel); (K,) int64 `"pixels"`, the labelled pixels of each class.

    Raises:
        ValueError: for a label that is neither a class nor `ignore_index`. On the CPU `update` raises and counts
            nothing; elsewhere `compute` does, so that `update` never waits for the device.

    Examples:
        >>> metrics = SegmentationMetrics(num_classes=3)
        >>> metrics.update(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]))
        >>> {name: round(float(metrics.compute()[name]), 3) for name in ("aAcc", "mAcc", "mIoU")}
        {'aAcc': 0.667, 'mAcc': 0.75, 'mIoU': 0.5}
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    confusion: Tensor
    wrong_label: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, *, average: Average = "present", **kwargs: Any):
        super().__init__(**kwargs)  # torchmetrics' own options; it refuses unknown ones
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}; give the number of classes")
        if average not in get_args(Average):
            raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}; choose one")
        self.num_classes, self.ignore_index, self.average = num_classes, ignore_index, average
        confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("confusion", confusion, dist_reduce_fx="sum", persistent=True)
        self.add_state("wrong_label", torch.tensor(NO_LABEL), dist_reduce_fx="max", persistent=True)

    @property
    def update_called(self) -> bool:
        """Always true: an empty, merged or loaded matrix is a state like any other, not worth torchmetrics' warning."""
        return True

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Count one batch of predicted and true label maps."""
        check_maps(preds, labels)
        size = self.num_classes + 1
        labels = labels.long().flatten()
        rows, columns = (
            class_or_last(x.long().flatten(), self.num_classes, self.ignore_index) for x in (labels, preds)
        )
        wrong = (rows == self.num_classes) & (labels != self.ignore_index)
        wrong_label = torch.where(wrong, labels, NO_LABEL).amax() if labels.numel() else self.wrong_label
        if wrong_label.device.type == "cpu":
            check_labels(int(wrong_label), self.num_classes, self.ignore_index)
        # scatter_add_ and not bincount: twice as fast on the CPU, and bincount makes the host wait for a GPU
        counts = torch.zeros(size * size, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(0, rows * size + columns, torch.ones_like(rows))
        self.confusion = self.confusion + counts.view(size, size)[:-1]  # the last row: pixels that do not count
        self.wrong_label = torch.maximum(self.wrong_label, wrong_label)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything counted so far, in all processes."""
        check_labels(int(self.wrong_label), self.num_classes, self.ignore_index)
        confusion = self.confusion.cpu()
        correct, true = confusion.diagonal().double(), confusion.sum(1).double()
        predicted = confusion[:, :-1].sum(0).double()
        iou, accuracy = correct / (true + predicted - correct), correct / true  # 0 / 0 is NaN: the class does not occur
        return {
            "aAcc": correct.sum() / true.sum(),
            "mAcc": self._mean(accuracy),
            "mIoU": self._mean(iou),
            "IoU": iou,
            "Acc": accuracy,
            "pixels": confusion.sum(1),
        }

    def _mean(self, per_class: Tensor) -> Tensor:
        if self.average == "present" or per_class.isnan().all():
            return per_class.nanmean()
        return per_class.nan_to_num(0).mean()


def per_class_markdown(metrics: Mapping[str, Tensor], class_names: Sequence[str]) -> str:
    """A Markdown table of IoU and Acc in percent and labelled pixels, one row for each class in the labels' order.

    Where boundary IoU was measured, it has a column, too.

    Args:
        metrics: what `SegmentationMetrics.compute` returned, and maybe what `BoundaryIoU.compute` did.
        class_names: the K names.

    Raises:
        ValueError: when there are more or fewer names than classes.

    Examples:
        >>> metrics = SegmentationMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 255]]))
        >>> print(per_class_markdown(metrics.compute(), ["road", "sky"]))
        | class | IoU | Acc | pixels |
        |---|--:|--:|--:|
        | road | 100.00 | 100.00 | 3 |
        | sky | – | – | 0 |
    """
    shown = {"IoU": "IoU", "Acc": "Acc", **({"BIoU": "boundary IoU"} if "BIoU" in metrics else {})}
    # torchmetrics squeezes (1,) to ()
    columns = [metrics[name].reshape(-1).tolist() for name in shown]
    pixels = metrics["pixels"].reshape(-1).tolist()
    if len(class_names) != len(pixels):
        raise ValueError(
            f"one name for each of {len(pixels)} classes is required, got {len(class_names)}; name them all"
        )
    rows = [f"| class | {' | '.join(shown.values())} | pixels |", f"|---|{'--:|' * (len(shown) + 1)}"]
    for name, *fractions, count in zip(class_names, *columns, pixels, strict=True):
        escaped = name.replace("|", "\\|")
        rows.append(f"| {escaped} | {' | '.join(percent(x) for x in fractions)} | {count} |")
    return "\n".join(rows)


def percent(fraction: float) -> str:
    """Two digits after the point, or a dash for NaN."""
    return "–" if fraction != fraction else f"{100 * fraction:.2f}"  # only NaN differs from itself


def check_maps(preds: Tensor, labels: Tensor) -> None:
    """Refuse predicted and true label maps that cannot be compared.

    Raises:
        ValueError: If one is not of an integer type, or they are not (B, H, W) or (H, W) of one shape.
    """
    for name, x in (("preds", preds), ("labels", labels)):
        if x.is_floating_point() or x.is_complex():
            raise ValueError(
                f"{name} must be an integer label map, got {x.dtype} of shape {tuple(x.shape)}; "
                "take logits.argmax(dim=1) first"
            )
    if preds.shape != labels.shape or preds.ndim not in (2, 3):
        raise ValueError(
            f"preds and labels must have one shape, (B, H, W) or (H, W), got {tuple(preds.shape)} and "
            f"{tuple(labels.shape)}; predict at the labels' size"
        )


def check_labels(wrong_label: int, num_classes: int, ignore_index: int) -> None:
    """Refuse a label that is neither a class nor ignored; `NO_LABEL` stands for none found.

    Raises:
        ValueError: If there is a wrong label.
    """
    if wrong_label != NO_LABEL:
        raise ValueError(
            f"labels must be 0..{num_classes - 1} or the ignore_index {ignore_index}, got {wrong_label}; "
            f"map it to a class or to {ignore_index}"
        )


def class_or_last(values: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Values that name no class become K."""
    names_class = (values >= 0) & (values < num_classes) & (values != ignore_index)
    return torch.where(names_class, values, num_classes)


def class_maps(preds: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of a batch, checked, for metrics that look at a pixel's neighbours.

    Where the label is ignored both maps hold K, as predictions that name no class do.

    Shape:
        (B, H, W) or (H, W) -> two maps (B, H, W) of int64 in 0..K.

    Raises:
        ValueError: See `check_maps` and `check_labels`; looking for a wrong label waits for the device.
    """
    check_maps(preds, labels)
    if labels.ndim == 2:
        preds, labels = preds[None], labels[None]
    labels = labels.long()
    classes = class_or_last(labels, num_classes, ignore_index)
    wrong = (classes == num_classes) & (labels != ignore_index)
    if wrong.any():
        check_labels(int(labels[wrong].amax()), num_classes, ignore_index)
    preds = class_or_last(preds.long(), num_classes, ignore_index)
    return torch.where(classes == num_classes, num_classes, preds), classes


def count_classes(classes: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Pixels of each class in a map of 0..K, or the sum of their integer weights; what is K is dropped."""
    classes = classes.flatten()
    weights = torch.ones_like(classes) if weights is None else weights.flatten()
    return classes.new_zeros(num_classes + 1).scatter_add_(0, classes, weights)[:-1]
