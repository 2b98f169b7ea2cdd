"""One class against its background: the sigmoid of one score is the softmax of two, the first of which is 0."""

import math

import torch
from torch import Tensor

from segheads.functional.bilinear import wide


def with_background(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """The scores of background and class, whose softmax has the sigmoid of the one logit as its second share.

    Args:
        logits: Of the class.
        threshold: The probability above which the second score is the higher one; the shares are the sigmoid's for 0.5.

    Shape:
        `(B, 1, h, w)` to `(B, 2, h, w)`.

    Examples:
        >>> with_background(torch.tensor([[[[1.0]]]])).softmax(1).flatten()
        tensor([0.2689, 0.7311])
    """
    return torch.cat([torch.zeros_like(logits), above(logits, threshold)], dim=1)


def without_background(scores: Tensor) -> Tensor:
    """The one logit that says the same as two scores, as `with_background` gives them, or as their logarithms.

    Args:
        scores: Of background and class.

    Shape:
        `(B, 2, h, w)` to `(B, 1, h, w)`.
    """
    return scores[:, 1:] - scores[:, :1]


def above(logits: Tensor, threshold: float) -> Tensor:
    """How far logits are above that of a probability; fp32 or wider where there is anything to subtract.

    Args:
        logits: Of any shape.
        threshold: A probability, between 0 and 1.
    """
    return logits if threshold == 0.5 else logits.to(wide(logits.dtype)) - math.log(threshold / (1 - threshold))


def probabilities(scores: Tensor) -> Tensor:
    """The classes' probabilities: the softmax along axis 1, and of a single score the sigmoid.

    Args:
        scores: Logits.

    Shape:
        `(B, K, ...)` to the same.
    """
    return scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)


def exp_(x: Tensor) -> Tensor:
    """The exponential, in place, as quick where it is too small for a number.

    Intel's, which PyTorch takes on the CPU, is up to ninety times slower there.
    """
    return x.mul_(1 / math.log(2)).exp2_() if x.device.type == "cpu" else x.exp_()


def probabilities_(scores: Tensor) -> Tensor:
    """The same in the memory of floating-point scores."""
    if scores.shape[1] == 1:
        return scores.sigmoid_()
    exp_(scores.sub_(scores.amax(1, keepdim=True)))
    return scores.div_(scores.sum(1, keepdim=True))
