"""IoU of the pixels near contours: boundary IoU over a whole data set."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.maps import NO_LABEL, check_labels, class_maps_unchecked, count_classes


class BoundaryIoU(SegmentationMetric):
    """Boundary IoU of each class and its mean, counted over all images before any division.

    With G the pixels of a class in the truth, P those in the prediction, and G_d, P_d the pixels within d of their
    contours, boundary IoU is |(G_d ∩ G) ∩ (P_d ∩ P)| / |(G_d ∩ G) ∪ (P_d ∩ P)| (Cheng et al. 2021,
    https://arxiv.org/abs/2103.16562): mask IoU that does not forget contours where objects are large.

    As in the authors' code, d is 2 % of the image's diagonal, rounded, at least 1 pixel; a pixel of a mask is within d
    of its contour if the square of 2d + 1 pixels around it holds a pixel outside the mask; what is outside the image is
    outside the mask. Their code scores instances; here a mask is a class of an image, and intersections and unions are
    summed over images, as for mIoU. Ignored pixels are dropped from both masks, so that both have the same
    contour there (the authors' panoptic code drops them from the counts alone, which makes the contour of a segment
    that was rightly continued into ignored pixels an error).

    Both maps' boundaries of all classes come from one sliding maximum and minimum: a pixel is *not* within d of its own
    class' contour if the two are equal. Nothing of K maps is built. Each image must reach one process only, as with
    `SegmentationMetrics`.

    Args:
        num_classes: K; labels are 0..K-1.
        ignore_index: the label of pixels that do not count.
        dilation_ratio: d over the image's diagonal.

    Shape:
        `update(preds, labels)`: integer maps of one shape, (B, H, W) or (H, W). `compute()`: a dict of tensors on the
        CPU; float64 fractions in [0, 1], 0-d `"mBIoU"` and (K,) `"BIoU"`, NaN where a class occurs in neither map (all
        NaN without a labelled pixel); (K,) int64 `"boundary_pixels"`, those of the truth.

    Raises:
        ValueError: for a label that is neither a class nor `ignore_index`. On the CPU `update` raises and counts
            nothing; elsewhere `compute` does, so that `update` never waits for the device.

    Examples:
        >>> labels = torch.zeros(100, 100, dtype=torch.long)
        >>> labels[20:80, 20:80] = 1
        >>> metric = BoundaryIoU(num_classes=2)
        >>> metric.update(labels.roll(2, dims=1), labels)  # two pixels to the right
        >>> [round(x, 3) for x in metric.compute()["BIoU"].tolist()]  # mask IoU is 0.963 and 0.935
        [0.768, 0.5]
    """

    scores: ClassVar[Mapping[str, str]] = {"mBIoU": "boundary IoU"}
    class_scores: ClassVar[Mapping[str, str]] = {"BIoU": "boundary IoU"}
    higher_is_better = True
    both: Tensor
    true: Tensor
    predicted: Tensor
    wrong_label: Tensor

    def __init__(
        self, num_classes: int, ignore_index: int = 255, *, dilation_ratio: float = 0.02, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, ignore_index, **kwargs)
        if not 0 < dilation_ratio < 1:
            raise ValueError(f"dilation_ratio must be between 0 and 1, got {dilation_ratio}; the paper's is 0.02")
        self.dilation_ratio = dilation_ratio
        for name in ("both", "true", "predicted"):
            counts = torch.zeros(num_classes, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum", persistent=True)
        self.add_state("wrong_label", torch.tensor(NO_LABEL), dist_reduce_fx="max", persistent=True)

    def update(self, preds: Tensor, labels: Tensor) -> None:
        """Count one batch of predicted and true label maps."""
        K = self.num_classes
        preds, labels, wrong = class_maps_unchecked(preds, labels, K, self.ignore_index)
        if not labels.numel():
            return
        if wrong.device.type == "cpu":
            check_labels(int(wrong), K, self.ignore_index)
        distance = max(1, round(self.dilation_ratio * math.hypot(*labels.shape[-2:])))
        preds = torch.where(near_contour(preds, distance), preds, K)
        labels = torch.where(near_contour(labels, distance), labels, K)
        self.both = self.both + count_classes(torch.where(preds == labels, labels, K), K)
        self.true = self.true + count_classes(labels, K)
        self.predicted = self.predicted + count_classes(preds, K)
        self.wrong_label = torch.maximum(self.wrong_label, wrong)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything counted so far, in all processes."""
        check_labels(int(self.wrong_label), self.num_classes, self.ignore_index)
        both, true, predicted = (x.cpu() for x in (self.both, self.true, self.predicted))
        iou = both.double() / (true + predicted - both)  # 0 / 0 is NaN: the class does not occur
        return {"mBIoU": iou.nanmean(), "BIoU": iou, "boundary_pixels": true}


def near_contour(classes: Tensor, distance: int) -> Tensor:
    """Whether the square of `2 distance + 1` pixels around a pixel holds another value or leaves the map.

    Args:
        classes: Any integers from 0 on that fit into int16.
        distance: Pixels, at least 1.

    Shape:
        (B, H, W) -> (B, H, W), bool.

    Examples:
        >>> near_contour(torch.tensor([[[0, 0, 0, 0, 5], [0, 0, 0, 0, 5], [0, 0, 0, 0, 5]]]), 1).int()
        tensor([[[1, 1, 1, 1, 1],
                 [1, 0, 0, 1, 1],
                 [1, 1, 1, 1, 1]]], dtype=torch.int32)
    """
    outside = F.pad(classes.to(torch.int16), [distance] * 4, value=-1)
    highest, lowest = (_slide(outside, 2 * distance + 1, extreme) for extreme in (torch.maximum, torch.minimum))
    return highest != lowest


def _slide(x: Tensor, width: int, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maximum or minimum of squares, each from those of half as many rows, then columns: few cheap passes."""
    for dim in (1, 2):
        done = 1
        while done < width:
            step = min(done, width - done)
            rest = x.shape[dim] - step
            x = extreme(x.narrow(dim, 0, rest), x.narrow(dim, step, rest))
            done += step
    return x
