"""F1 of each class, which is Dice, and IoU weighted by the frequency of the classes."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.maps import check_labels


class F1Score(SegmentationMetrics):
    """F1, frequency-weighted IoU and the confusion matrix itself, counted as `SegmentationMetrics` counts.

    F1 = 2 TP / (2 TP + FP + FN), the harmonic mean of precision and recall; of sets of pixels it is the Dice
    coefficient. Frequency-weighted IoU is the mean of the IoU weighted by each class' labelled pixels (Long et al.,
    https://arxiv.org/abs/1411.4038, Sec. 5).

    Args:
        num_classes: K; labels are 0..K-1.
        ignore_index: the label of pixels that do not count.
        average: what `mF1` does with a class that never occurs, see `SegmentationMetrics`.

    Shape:
        `update` as there. `compute()`: float64 fractions in [0, 1], 0-d `"mF1"` and `"fwIoU"` and (K,) `"F1"`, NaN
        where a class does not occur (all NaN without a labelled pixel); (K, K + 1) int64 `"confusion"`, pixels by true
        class (row) and predicted class (column), the last column for predictions that name none.

    Raises:
        ValueError: as there.

    Examples:
        >>> import torch
        >>> metric = F1Score(num_classes=3)
        >>> metric.update(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [1, 255]]))
        >>> {name: round(float(metric.compute()[name]), 3) for name in ("mF1", "fwIoU")}
        {'mF1': 0.667, 'fwIoU': 0.5}
    """

    scores: ClassVar[Mapping[str, str]] = {"mF1": "mF1", "fwIoU": "fwIoU"}
    class_scores: ClassVar[Mapping[str, str]] = {"F1": "F1"}

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything counted so far, in all processes."""
        check_labels(int(self.wrong_label), self.num_classes, self.ignore_index)
        confusion = self.confusion.cpu()
        correct, true = confusion.diagonal().double(), confusion.sum(1).double()
        either = true + confusion[:, :-1].sum(0).double()
        f1, iou = 2 * correct / either, correct / (either - correct)  # 0 / 0 is NaN: the class does not occur
        return {
            "mF1": self._mean(f1),
            "fwIoU": (true * iou.nan_to_num(0)).sum() / true.sum(),
            "F1": f1,
            "confusion": confusion,
        }
