"""aAcc, mAcc and mIoU from one confusion matrix over a whole data set."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.maps import NO_LABEL, check_labels, check_maps, class_or_last

Average = Literal["present", "scene_parsing"]


class SegmentationMetrics(SegmentationMetric):
    """Pixel accuracy, mean accuracy and mean IoU, counted over all images before any division.

    One confusion matrix (K, K + 1) of int64 is summed over batches, images and processes, so the result depends on
    neither how they were split nor whether the number of processes divides the number of images. Row: true class.
    Column: predicted class; the last one holds predictions that name no class (outside 0..K-1),
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

    scores: ClassVar[Mapping[str, str]] = {"aAcc": "aAcc", "mAcc": "mAcc", "mIoU": "mIoU"}
    class_scores: ClassVar[Mapping[str, str]] = {"IoU": "IoU", "Acc": "Acc", "pixels": "pixels"}
    higher_is_better = True
    confusion: Tensor
    wrong_label: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, *, average: Average = "present", **kwargs: Any):
        super().__init__(num_classes, ignore_index, **kwargs)
        if average not in get_args(Average):
            raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}; choose one")
        self.average = average
        confusion = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
        self.add_state("confusion", confusion, dist_reduce_fx="sum", persistent=True)
        self.add_state("wrong_label", torch.tensor(NO_LABEL), dist_reduce_fx="max", persistent=True)

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
