"""Cross-entropy: of all pixels, of one class against its background, of the hard pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segheads.functional import upsample_cross_entropy
from segheads.functional.binary import with_background
from segheads.functional.sampled import hardest_pixels
from segheads.functional.upsample import Reduction, pixel_divisor
from segheads.losses.base import PixelLoss, checked_weights, number_of_images


class CrossEntropy(PixelLoss):
    """Cross-entropy of the upsampled logits, as `segheads.functional.upsample_cross_entropy` computes it.

    Args:
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: Divide by the `"valid"` pixels (with `weight`, by the sum of their weights), or by `"all"`.
        weight: Weight of each class, K numbers; None weighs all the same.
        label_smoothing: Share of the target that is spread over all classes.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.

    Raises:
        ValueError: If there is one class alone, there are not K weights, one is negative or not finite, all are 0, or
            `label_smoothing` is not 0 or more and below 1.

    Examples:
        >>> loss = CrossEntropy(2, weight=[1.0, 3.0], label_smoothing=0.1)
        >>> loss(torch.zeros(1, 2, 4, 4), torch.ones(1, 64, 64, dtype=torch.long))
        tensor(0.6700)
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, reduction=reduction)
        weights = checked_weights(weight, num_classes)
        self.register_buffer("weight", weights, persistent=False)  # an argument, no part of a saved state
        self.label_smoothing = _smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The cross-entropy; `"all"` counts the pixels of the images, not of their padding."""
        return _cross_entropy(self, logits, labels, pixels)

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words."""
        is_weighted = self.weight is not None and self.reduction == "valid"
        return "weights of the valid pixels" if is_weighted else super().divides_by

    def divisors(self, labels: Tensor) -> Tensor:
        """Valid pixels, or the sum of their weights, or all pixels; `(1,)`."""
        return pixel_divisor(labels, self.ignore_index, self.reduction, self.weight).reshape(1)

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, {_shown(self)}"


class BinaryCrossEntropy(PixelLoss):
    """Binary cross-entropy of the upsampled logits of one class, in no more memory than `CrossEntropy`.

    Equal to `F.binary_cross_entropy_with_logits` of `F.interpolate(logits, size, mode="bilinear")`: the sigmoid of a
    logit z is the softmax of the scores 0 and z, whose cross-entropy it is.

    Args:
        num_classes: 1.
        ignore_index: The label that is left out.
        reduction: Divide by the `"valid"` pixels (with `weight`, by the sum of their weights), or by `"all"`.
        weight: Weights of background and class, 2 numbers; `[1.0, w]` is PyTorch's `pos_weight` w, but for the divisor
            of `"valid"`. None weighs both the same.
        label_smoothing: Share of the target that is spread over background and class.

    Shape:
        logits `(B, 1, h, w)`, labels `(B, H, W)` of an integer type, 0 for background and 1 for the class; a scalar,
        fp32 or wider.

    Raises:
        ValueError: If there are several classes, there are not 2 weights, one is negative or not finite, all are 0, or
            `label_smoothing` is not 0 or more and below 1.

    Examples:
        >>> loss = BinaryCrossEntropy(1, weight=[1.0, 3.0])
        >>> loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 64, 64, dtype=torch.long))
        tensor(0.6931)
    """

    is_binary = True
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int = 1,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, reduction=reduction)
        self.register_buffer("weight", checked_weights(weight, 2), persistent=False)
        self.label_smoothing = _smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The binary cross-entropy; `"all"` counts the pixels of the images, not of their padding."""
        if logits.shape[1] != 1:
            raise ValueError(f"binary cross-entropy takes logits (B, 1, h, w) of one class; got {tuple(logits.shape)}")
        return _cross_entropy(self, with_background(logits), labels, pixels)

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words."""
        is_weighted = self.weight is not None and self.reduction == "valid"
        return "weights of the valid pixels" if is_weighted else super().divides_by

    def divisors(self, labels: Tensor) -> Tensor:
        """Valid pixels, or the sum of their weights, or all pixels; `(1,)`."""
        return pixel_divisor(labels, self.ignore_index, self.reduction, self.weight).reshape(1)

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, {_shown(self)}"


class OhemCrossEntropy(PixelLoss):
    """Cross-entropy of the hard pixels of each image, averaged over the images (online hard example mining).

    Hard are the pixels whose own class has a probability below `threshold`, or the hardest `keep` of the image's valid
    pixels where these are more, as in MMSegmentation's `OHEMPixelSampler`, which draws the line over a whole batch.
    Here it is one an image, so that an update cut into parts is the same. `reduction` is passed over. Beside what
    cross-entropy holds, one number a pixel is held.

    Args:
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: Passed over.
        threshold: Probability below which a pixel is hard, between 0 and 1.
        keep: Least share of the valid pixels that counts, between 0 and 1.
        weight: Weight of each class, K numbers; None weighs all the same.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.

    Raises:
        ValueError: If there is one class alone, `threshold` or `keep` is out of range, or a weight is wrong.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        threshold: float = 0.7,
        keep: float = 0.2,
        weight: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, reduction=reduction)
        for name, value in (("threshold", threshold), ("keep", keep)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1; got {value}")
        self.threshold, self.keep = threshold, keep
        self.register_buffer("weight", checked_weights(weight, num_classes), persistent=False)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:  # noqa: ARG002
        """Mean over the images of the mean over their hard pixels; the choice has no gradient."""
        hard = hardest_pixels(logits, labels, self.ignore_index, self.threshold, self.keep)
        chosen = labels.masked_fill(~hard, self.ignore_index)
        parts = zip(logits.split(1), chosen.split(1), strict=True)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "weight": self.weight}
        return torch.stack([upsample_cross_entropy(x, y, **options) for x, y in parts]).mean()

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words."""
        return "images"

    def divisors(self, labels: Tensor) -> Tensor:
        """The number of images, `(1,)`."""
        return number_of_images(labels)

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, threshold={self.threshold}, keep={self.keep}"


def _cross_entropy(loss: CrossEntropy | BinaryCrossEntropy, scores: Tensor, labels: Tensor, pixels: int) -> Tensor:
    value = upsample_cross_entropy(
        scores,
        labels,
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
        weight=loss.weight,
        label_smoothing=loss.label_smoothing,
    )
    return value * (labels.shape[1] * labels.shape[2] / pixels) if loss.reduction == "all" else value


def _smoothing(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must be 0 or more and below 1; got {value}")
    return value


def _shown(loss: CrossEntropy | BinaryCrossEntropy) -> str:
    weight = None if loss.weight is None else loss.weight.tolist()
    return f"weight={weight}, label_smoothing={loss.label_smoothing}"
