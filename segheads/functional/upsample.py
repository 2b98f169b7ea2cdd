"""The one upsampling: low-resolution logits to a loss, or to a label map, at the size of the labels."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["valid", "all"]


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling (align_corners False) in fp32 or wider.

    Args:
        logits: Class scores on the head's grid.
        size: Height and width of the result, pixels.

    Shape:
        `(B, K, h, w)` to `(B, K, *size)`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def upsample_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, reduction: Reduction = "valid"
) -> Tensor:
    """Cross-entropy between logits, upsampled bilinearly to the labels' size, and labels.

    `reduction="valid"` divides by the pixels that are not ignored (Segmenter), `"all"` by all pixels, as
    MMSegmentation and with it the MeanShifter's author do. Where every pixel is ignored both give 0 with a zero
    gradient; `F.cross_entropy` gives NaN there, which ends a training run of batch size 1.

    Args:
        logits: Class scores on the head's grid.
        labels: Class of each pixel, or `ignore_index`.
        ignore_index: The label that is left out.
        reduction: What the sum over pixels is divided by.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; the result is a scalar of at least fp32.

    Raises:
        ValueError: If shapes do not match, `reduction` is unknown, or (on the CPU, where looking costs nothing) a
            label is neither a class nor `ignore_index`.

    Examples:
        >>> logits = torch.tensor([[[[9.0]], [[0.0]]]])  # one image, two classes, one patch
        >>> upsample_cross_entropy(logits, torch.tensor([[[0, 0], [0, 255]]]))
        tensor(0.0001)
    """
    if reduction not in ("valid", "all"):
        raise ValueError(f'reduction must be "valid" or "all"; got {reduction!r}')
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(
            "expected logits (B, K, h, w) and labels (B, H, W) of one batch size; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    labels = labels.long()
    if not labels.is_cuda:
        _check_labels(labels, logits.shape[1], ignore_index)
    scores = upsample(logits, (labels.shape[1], labels.shape[2]))
    total = F.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="sum")
    if reduction == "all":
        return total / labels.numel()
    return total / (labels != ignore_index).sum().clamp(min=1)


def upsample_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map of logits upsampled bilinearly to `size`.

    Args:
        logits: Class scores on the head's grid.
        size: Height and width of the label map, pixels.

    Shape:
        `(B, K, h, w)` to `(B, *size)`, int64.

    Examples:
        >>> upsample_argmax(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), (1, 4))
        tensor([[[0, 0, 1, 1]]])
    """
    return upsample(logits, size).argmax(1)


def _check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"labels must be classes 0 to {num_classes - 1} or {ignore_index} (ignored); got {wrong[0].item()}"
        )
