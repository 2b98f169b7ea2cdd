"""Losses of segmentation-models-pytorch that compare regions, on some of the pixels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from segheads.classes import num_labels
from segheads.functional.cross_entropy import check_range, is_valid
from segheads.functional.sampled import upsample_sampled
from segheads.functional.upsample import Reduction, pixel_divisor
from segheads.losses.base import PixelLoss, checked_weights, number_of_images

_IGNORED = -1  # what smp is told, whatever `ignore_index` is or becomes


class SmpLoss(PixelLoss):
    """A loss of segmentation-models-pytorch on every `stride`-th pixel in both directions, upsampled exactly there.

    These losses compare whole regions, so their probabilities must be held: `B K (H / stride) (W / stride)` numbers a
    few times over, a sixteenth of full size at stride 4. Each image is a batch of its own for smp, and the loss is the
    mean over images: a batch cut into parts has the same. `focal`, a sum over pixels, follows `reduction`. Ignored
    pixels take no part. With one class the loss is smp's binary one, of a sigmoid.

    Args:
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: Passed over but by `focal`.
        stride: Pixels from one that counts to the next; 1 takes all.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.

    Raises:
        ValueError: If `stride` is below 1, there are weights of one class, or smp refuses an option; on the CPU, if a
            label is neither a class nor ignored. On a GPU the loss is then NaN.
    """

    may_be_binary = True
    name: ClassVar[str]
    told: ClassVar[dict[str, Any]] = {"ignore_index": _IGNORED}

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        stride: int = 4,
        weight: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, reduction=reduction)
        if stride < 1:
            raise ValueError(f"stride must be 1 or more pixels; got {stride}")
        self.stride = stride
        if weight is not None:
            if num_classes == 1:
                raise ValueError(f"{self.name} of one class takes no weight: segmentation-models-pytorch has none")
            checked = checked_weights(weight, num_classes)
            options["class_weights"] = None if checked is None else checked.tolist()
        self.options = options
        import segmentation_models_pytorch.losses as smp  # which takes its time

        mode = "binary" if num_classes == 1 else "multiclass"
        self.inner: Any = getattr(smp, self.name)(mode, **self.told, **options)

    def sample(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Scores `(B, K, y, x)`, fp32 or wider, of the pixels that count, and their labels `(B, y, x)`, -1 if ignored.

        Last what to add to the loss: on the CPU nothing, elsewhere NaN if a label is out of range.

        Raises:
            ValueError: On the CPU, if a label is.
        """
        chosen = self._chosen(labels)
        valid = is_valid(chosen, self.ignore_index)
        inside, error = check_range(torch.where(valid, chosen, 0), num_labels(self.num_classes), self.ignore_index)
        scores = upsample_sampled(logits, tuple(labels.shape[1:]), self.stride)
        return scores, torch.where(valid, inside, _IGNORED), error

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:  # noqa: ARG002
        """Mean over the images of smp's loss of each; 0 for one of which everything is ignored."""
        with torch.autocast(logits.device.type, enabled=False):
            scores, labels, error = self.sample(logits, labels)
            losses = [self.of_image(x, y) for x, y in zip(scores.split(1), labels.split(1), strict=True)]
            return torch.stack(losses).mean() + error

    def of_image(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of one image."""
        loss: Tensor = self.inner(scores, labels)
        return loss

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words."""
        return "images"

    def divisors(self, labels: Tensor) -> Tensor:
        """The number of images, `(1,)`."""
        return number_of_images(labels)

    def _chosen(self, labels: Tensor) -> Tensor:
        first = self.stride // 2
        return labels[:, first :: self.stride, first :: self.stride].long()

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{super().extra_repr()}, stride={self.stride}{options}"


class Dice(SmpLoss):
    """smp's Dice loss: 1 minus the Dice coefficient of each class that the image has, averaged over all K classes.

    Args:
        num_classes: Number of classes K; 1 is binary.
        ignore_index: The label that is left out.
        reduction: Passed over.
        stride: Pixels from one that counts to the next, see `SmpLoss`.
        weight: Weight of each class, K numbers; None weighs all the same.
        log_loss: Minus the logarithm of the coefficient, instead of 1 minus it.
        smooth: Added to numerator and denominator.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.
    """

    name = "DiceLoss"

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        stride: int = 4,
        weight: Sequence[float] | None = None,
        log_loss: bool = False,
        smooth: float = 0.0,
    ) -> None:
        common: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "stride": stride}
        super().__init__(num_classes, **common, weight=weight, log_loss=log_loss, smooth=smooth)


class Jaccard(Dice):
    """smp's Jaccard loss: 1 minus the soft intersection over union of each class, otherwise as `Dice`."""

    name = "JaccardLoss"


class Tversky(SmpLoss):
    """smp's Tversky loss: Dice with a weight for false positives and one for false negatives.

    Args:
        num_classes: Number of classes K; 1 is binary.
        ignore_index: The label that is left out.
        reduction: Passed over.
        stride: Pixels from one that counts to the next, see `SmpLoss`.
        weight: Weight of each class, K numbers; None weighs all the same.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        gamma: Exponent of an image's loss.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.
    """

    name = "TverskyLoss"

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        stride: int = 4,
        weight: Sequence[float] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
    ) -> None:
        common: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "stride": stride}
        super().__init__(num_classes, **common, weight=weight, alpha=alpha, beta=beta, gamma=gamma)


class Lovasz(SmpLoss):
    """smp's Lovasz loss: the Lovasz-Softmax of the classes that an image has, or of one class the Lovasz hinge.

    It sorts the pixels, and on a GPU waits for the host.

    Args:
        num_classes: Number of classes K; 1 is binary.
        ignore_index: The label that is left out.
        reduction: Passed over.
        stride: Pixels from one that counts to the next, see `SmpLoss`.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.
    """

    name = "LovaszLoss"

    def __init__(
        self, num_classes: int, *, ignore_index: int = 255, reduction: Reduction = "valid", stride: int = 4
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, reduction=reduction, stride=stride)

    def of_image(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of one image, 0 of one without a valid pixel, where smp's is no number."""
        if not (labels != _IGNORED).any():
            return scores.sum() * 0
        return super().of_image(scores.squeeze(1) if self.num_classes == 1 else scores, labels)


class Focal(SmpLoss):
    """smp's focal loss: of each class against the rest, averaged over the classes.

    Args:
        num_classes: Number of classes K; 1 is binary.
        ignore_index: The label that is left out.
        reduction: Divide by the `"valid"` pixels, or by `"all"`.
        stride: Pixels from one that counts to the next, see `SmpLoss`.
        weight: Weight of each class, K numbers; None weighs all the same.
        gamma: Exponent; 0 is binary cross-entropy.
        alpha: Weight of a class' own pixels, 1 - alpha that of the others; None weighs both by 1.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.
    """

    name = "FocalLoss"
    told: ClassVar[dict[str, Any]] = {"reduction": "sum"}

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        reduction: Reduction = "valid",
        stride: int = 4,
        weight: Sequence[float] | None = None,
        gamma: float = 2.0,
        alpha: float | None = None,
    ) -> None:
        common: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction, "stride": stride}
        super().__init__(num_classes, **common, weight=weight, gamma=gamma, alpha=alpha)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """Sum over the pixels that count, divided by their number."""
        with torch.autocast(logits.device.type, enabled=False):
            scores, chosen, error = self.sample(logits, labels)
            ignored = chosen == _IGNORED
            # certain of no class, and of none: no loss and no gradient, and nothing waits to count them
            none = 0 if self.num_classes == 1 else _IGNORED
            total: Tensor = self.inner(scores.masked_fill(ignored[:, None], -1e4), chosen.masked_fill(ignored, none))
        count = self.divisors(labels)[0]
        if self.reduction == "all":
            count = count * (pixels / (labels.shape[1] * labels.shape[2]))
        return total / torch.where(count > 0, count, 1) + error

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words."""
        return f"{self.reduction} pixels"

    def divisors(self, labels: Tensor) -> Tensor:
        """The valid ones of the pixels that count, or all of them; `(1,)`."""
        return pixel_divisor(self._chosen(labels), self.ignore_index, self.reduction).reshape(1)
