"""Whether a model is as often right as it claims: expected calibration error over a whole data set."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.maps import check_maps

SCALE = 2**30  # confidences are added as int64 multiples of 2^-30: to 8e9 pixels a bin, to 1e-9


class CalibrationError(SegmentationMetric):
    """Expected calibration error of all labelled pixels of a data set, and the bins of its reliability diagram.

    Pixels are put into bins of equal width by their confidence, the highest class probability. The error is the mean,
    weighted by pixels, of each bin's distance between mean confidence and accuracy (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599; 15 bins). A bin holds its upper edge.

    Three integers per bin are kept, and they add up exactly: the result depends on neither how pixels were split over
    batches and processes nor their order. `torchmetrics.classification.MulticlassCalibrationError` keeps every
    confidence, 8 bytes for each of a data set's billion pixels, wants all K probabilities of each, and counts a
    confidence of exactly 1 in a bin of its own. Each image must reach one process only, as with `SegmentationMetrics`.

    Args:
        num_classes: Changes nothing: only the best class counts. It is taken as by every other metric.
        ignore_index: The label of pixels that do not count.
        num_bins: Bins of equal width between 0 and 1.

    Shape:
        `update(confidence, preds, labels)`: maps of one shape, (B, H, W) or (H, W); the first floating-point, the
        others integer. `compute()`: a dict of tensors on the CPU: 0-d float64 `"ECE"`, a fraction (NaN without a
        labelled pixel); `(num_bins,)` float64 `"bin_confidence"` and `"bin_accuracy"`, NaN in an empty bin;
        `(num_bins,)` int64 `"bin_pixels"`.

    Raises:
        ValueError: For shapes or types that do not fit, and for a confidence of a labelled pixel outside [0, 1]. The
            latter is raised by `update` on the CPU, which then counts nothing, and by `compute` elsewhere, so that
            `update` never waits for the device.

    Examples:
        >>> error = CalibrationError()
        >>> error.update(torch.tensor([[0.9, 0.9, 0.6]]), torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]]))
        >>> round(error.compute()["ECE"].item(), 3)  # two thirds of |0.9 - 0.5| and a third of |0.6 - 1|
        0.4
    """

    scores: ClassVar[Mapping[str, str]] = {"ECE": "ECE"}
    needs_confidence: ClassVar[bool] = True
    higher_is_better = False
    confidence: Tensor
    correct: Tensor
    pixels: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(
        self, num_classes: int | None = None, *, ignore_index: int = 255, num_bins: int = 15, **kwargs: Any
    ) -> None:
        super().__init__(1 if num_classes is None else num_classes, ignore_index, **kwargs)
        if num_bins < 1:
            raise ValueError(f"num_bins must be 1 or more; got {num_bins}")
        self.num_bins = num_bins
        for name in ("confidence", "correct", "pixels"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self.add_state("lowest", torch.tensor(0.0), dist_reduce_fx="min", persistent=True)
        self.add_state("highest", torch.tensor(0.0), dist_reduce_fx="max", persistent=True)

    def update(self, confidence: Tensor, preds: Tensor, labels: Tensor) -> None:
        """Count one batch of confidences, predicted and true label maps."""
        check_maps(preds, labels)
        if not confidence.is_floating_point() or confidence.shape != labels.shape:
            raise ValueError(
                f"confidence must be a floating-point map of the labels' shape {tuple(labels.shape)}; got "
                f"{confidence.dtype} of {tuple(confidence.shape)}"
            )
        labels, preds = labels.long().flatten(), preds.long().flatten()
        labelled = labels != self.ignore_index
        confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32)).flatten()
        confidence = torch.where(labelled, confidence, 0)  # anything goes where pixels do not count
        lowest, highest = (x.float() for x in confidence.aminmax()) if len(labels) else (self.lowest, self.highest)
        if confidence.device.type == "cpu":
            self._check_range(lowest, highest)
        # ceil: Guo's bins are open below and closed above; clamp: 0, and what compute is going to refuse
        bins = ((confidence * self.num_bins).ceil().long() - 1).clamp(0, self.num_bins - 1)
        bins = torch.where(labelled, bins, self.num_bins)
        self.confidence = self.confidence + self._count(bins, (confidence * SCALE).round().long())
        self.correct = self.correct + self._count(bins, (preds == labels).long())
        self.pixels = self.pixels + self._count(bins, torch.ones_like(bins))
        self.lowest, self.highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)

    def compute(self) -> dict[str, Tensor]:
        """The error and the bins of everything counted so far, in all processes."""
        self._check_range(self.lowest, self.highest)
        pixels = self.pixels.cpu()
        confidence, correct = self.confidence.cpu().double() / SCALE, self.correct.cpu().double()
        return {
            "ECE": (confidence - correct).abs().sum() / pixels.sum(),
            "bin_confidence": confidence / pixels,  # 0 / 0 is NaN: the bin is empty
            "bin_accuracy": correct / pixels,
            "bin_pixels": pixels,
        }

    def _count(self, bins: Tensor, values: Tensor) -> Tensor:
        """Sum of integers in each bin; the last one, of pixels that do not count, is dropped."""
        return bins.new_zeros(self.num_bins + 1).scatter_add_(0, bins, values)[:-1]

    def _check_range(self, lowest: Tensor, highest: Tensor) -> None:
        if not (lowest >= 0 and highest <= 1):  # NaN is neither
            raise ValueError(
                f"confidence must be in [0, 1]; got values from {lowest.item():g} to {highest.item():g}; take the "
                "softmax's maximum"
            )
