"""Scores of single images, from the counts of each."""

import torch
from torch import Tensor


def image_scores(counts: Tensor) -> dict[str, Tensor]:
    """Scores of each image alone, to find the worst ones.

    An image's mIoU is the mean over the classes that occur in its truth. Those that only its prediction has are wrong
    pixels of these, and a speck of a class that is not there does not weigh as much as a class that is.

    Args:
        counts: Right, true and predicted pixels of each class in each image.

    Shape:
        (N, 3, K) -> (N, K) float64 `"image_IoU"`, NaN where the truth lacks the class; (N,) float64 `"image_mIoU"` and
        `"image_aAcc"`, NaN without a labelled pixel; (N,) int64 `"image_pixels"`, the labelled ones.

    Examples:
        >>> image_scores(torch.tensor([[[6, 0, 0], [8, 2, 0], [7, 0, 3]]]))["image_mIoU"]  # 6 / 9 and 0 / 2
        tensor([0.3333], dtype=torch.float64)
    """
    correct, true, predicted = counts.unbind(1)
    iou = torch.where(true > 0, correct.double() / (true + predicted - correct), torch.nan)
    return {
        "image_IoU": iou,
        "image_mIoU": iou.nanmean(1),
        "image_aAcc": correct.sum(1).double() / true.sum(1),
        "image_pixels": true.sum(1),
    }


def class_counts(confusion: Tensor) -> Tensor:
    """Right, true and predicted pixels of each class from the confusion matrix of `SegmentationMetrics`.

    Args:
        confusion: Of one image.

    Shape:
        (K, K + 1) -> (3, K).
    """
    return torch.stack([confusion.diagonal(), confusion.sum(1), confusion[:, :-1].sum(0)])
