"""What training makes small: losses by name, from logits on a head's grid and labels at full size.

No loss here holds logits at the labels' size; `segheads.functional.upsample_cross_entropy` is the model for new ones.
"""

import ast
import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.classes import check_ignore_index, check_several_classes, num_labels
from segheads.functional import upsample_cross_entropy
from segheads.functional.binary import with_background
from segheads.functional.cross_entropy import holding, is_valid
from segheads.functional.sampled import hardest_pixels, upsample_sampled
from segheads.functional.upsample import Reduction, pixel_divisor


class PixelLoss(nn.Module, ABC):
    """A loss over the pixels of a batch; a subclass says in `compute` what it is.

    Args:
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: What a sum over pixels is divided by: the `"valid"` ones, or `"all"` of the images. A loss that is
            no such sum may pass over it.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type; a scalar, fp32 or wider.

    Attributes:
        is_binary: Whether the loss is of one class, K = 1: labels are 0 for its background and 1 for the class, and
            the sigmoid of the logit is its probability. Other losses are of several classes and their softmax.
        may_be_binary: Whether the loss is of one class where K is 1, and of several elsewhere.

    Raises:
        ValueError: If there is no class, `ignore_index` is a class, `reduction` is unknown, or K is 1 where the loss is
            of several classes, or the other way round.
    """

    is_binary: ClassVar[bool] = False
    may_be_binary: ClassVar[bool] = False

    def __init__(self, num_classes: int, *, ignore_index: int = 255, reduction: Reduction = "valid") -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more; got {num_classes}")
        if self.is_binary and num_classes != 1:
            raise ValueError(
                f"{type(self).__name__} is of one class and its background, labels 1 and 0, so num_classes must be 1; "
                f"got {num_classes}: take loss 'ce'"
            )
        if not self.is_binary and not self.may_be_binary:
            check_several_classes(num_classes)
        if reduction not in ("valid", "all"):
            raise ValueError(f'reduction must be "valid" or "all"; got {reduction!r}')
        self.num_classes = num_classes
        self.ignore_index = ignore_index  # which refuses a class, now and later
        self.reduction: Reduction = reduction

    @property
    def ignore_index(self) -> int:
        """The label that is left out; a class is refused."""
        return self._ignore_index

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        check_ignore_index(value, num_labels(self.num_classes))
        self._ignore_index = value

    def forward(
        self, logits: Tensor, labels: Tensor, size: tuple[int, int] | None = None, shares: Tensor | None = None
    ) -> Tensor:
        """The loss of logits that lie over `size` pixels, of which the labels are the upper left ones.

        Args:
            logits: Class scores on the head's grid.
            labels: Class of each pixel, or `ignore_index`.
            size: Height and width, in pixels, that the grid covers, padding and all; None means the labels' own.
            shares: Factor of each term, `(T,)`, where the batch is a part of an update: see `divisors`.
        """
        H, W = labels.shape[1:]
        height, width = (H, W) if size is None else size
        labels = holding(labels, self.ignore_index)
        padded = F.pad(labels, (0, width - W, 0, height - H), value=self.ignore_index)
        return self.total(logits, padded, H * W, shares)

    def total(self, logits: Tensor, labels: Tensor, pixels: int, shares: Tensor | None) -> Tensor:
        """The terms of the loss times their shares, summed; `compute` is the one term of most losses."""
        loss = self.compute(logits, labels, pixels)
        return loss if shares is None else loss * shares[0]

    @property
    def num_terms(self) -> int:
        """Number T of the terms that `divisors` speaks of."""
        return 1

    def divisors(self, labels: Tensor) -> Tensor:
        """What each term of the loss divides its sum by, `(T,)`: valid pixels, or with `"all"` all of them.

        With it the parts of an update, in other processes or accumulated, add up to the loss of the whole: a part's
        share is its divisor over that of the whole. A loss that is a mean over images has their number here; one that
        is no mean of its samples cannot be put together from parts.

        Args:
            labels: Class of each pixel, or `ignore_index`, `(B, H, W)`.
        """
        return pixel_divisor(labels, self.ignore_index, self.reduction).reshape(1)

    @abstractmethod
    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The loss of logits and labels that cover the same area.

        Args:
            logits: Class scores on the head's grid.
            labels: Class of each pixel; the padding at the right and bottom has `ignore_index`.
            pixels: How many pixels of each image are no padding.
        """

    def extra_repr(self) -> str:
        """Adds what is left out and divided by to the module's representation."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction}"


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
        self.register_buffer("weight", _weights(weight, num_classes), persistent=False)  # no part of a saved state
        self.label_smoothing = _smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The cross-entropy; `"all"` counts the pixels of the images, not of their padding."""
        return _cross_entropy(self, logits, labels, pixels)

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
        self.register_buffer("weight", _weights(weight, 2), persistent=False)
        self.label_smoothing = _smoothing(label_smoothing)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The binary cross-entropy; `"all"` counts the pixels of the images, not of their padding."""
        if logits.shape[1] != 1:
            raise ValueError(f"binary cross-entropy takes logits (B, 1, h, w) of one class; got {tuple(logits.shape)}")
        return _cross_entropy(self, with_background(logits), labels, pixels)

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
        self.register_buffer("weight", _weights(weight, num_classes), persistent=False)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:  # noqa: ARG002
        """Mean over the images of the mean over their hard pixels; the choice has no gradient."""
        hard = hardest_pixels(logits, labels, self.ignore_index, self.threshold, self.keep)
        chosen = labels.masked_fill(~hard, self.ignore_index)
        parts = zip(logits.split(1), chosen.split(1), strict=True)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "weight": self.weight}
        return torch.stack([upsample_cross_entropy(x, y, **options) for x, y in parts]).mean()

    def divisors(self, labels: Tensor) -> Tensor:
        """The number of images, `(1,)`."""
        return _images(labels)

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, threshold={self.threshold}, keep={self.keep}"


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
        ValueError: If `stride` is below 1, or smp refuses an option.
    """

    may_be_binary = True
    name = ""

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
                raise ValueError(
                    f"{self.name} of one class takes no weight; segmentation-models-pytorch has none there"
                )
            checked = _weights(weight, num_classes)
            options["class_weights"] = None if checked is None else checked.tolist()
        self.options = options
        import segmentation_models_pytorch.losses as smp  # which takes its time

        self.inner: Any = getattr(smp, self.name)("binary" if num_classes == 1 else "multiclass", **options)

    def sample(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(B, K, y, x)`, fp32 or wider, and labels `(B, y, x)`, int64, of the pixels that count."""
        return upsample_sampled(logits, tuple(labels.shape[1:]), self.stride), self._chosen(labels)

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:  # noqa: ARG002
        """Mean over the images of smp's loss of each; 0 for one of which everything is ignored."""
        with torch.autocast(logits.device.type, enabled=False):
            scores, labels = self.sample(logits, labels)
            losses = [self.of_image(x, y) for x, y in zip(scores.split(1), labels.split(1), strict=True)]
            return torch.stack(losses).mean()

    def of_image(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of one image."""
        loss: Tensor = self.inner(scores, labels)
        return loss

    def divisors(self, labels: Tensor) -> Tensor:
        """The number of images, `(1,)`."""
        return _images(labels)

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
        super().__init__(
            num_classes,
            ignore_index=ignore_index,
            reduction=reduction,
            stride=stride,
            weight=weight,
            log_loss=log_loss,
            smooth=smooth,
        )
        self.inner.ignore_index = ignore_index


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
        self.inner.ignore_index = ignore_index


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
        self.inner.ignore_index = ignore_index

    def of_image(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of one image, 0 of one without a valid pixel, where smp's is no number."""
        if not is_valid(labels, self.ignore_index).any():
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
        self.inner.focal_loss_fn.keywords["reduction"] = "sum"

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """Sum over the pixels that count, divided by their number."""
        with torch.autocast(logits.device.type, enabled=False):
            scores, chosen = self.sample(logits, labels)
            ignored = ~is_valid(chosen, self.ignore_index)
            # certain of no class, and of none: no loss and no gradient, and nothing waits to count them
            none = 0 if self.num_classes == 1 else -1
            total: Tensor = self.inner(scores.masked_fill(ignored[:, None], -1e4), chosen.masked_fill(ignored, none))
        count = self.divisors(labels)[0]
        if self.reduction == "all":
            count = count * (pixels / (labels.shape[1] * labels.shape[2]))
        return total / torch.where(count > 0, count, 1)

    def divisors(self, labels: Tensor) -> Tensor:
        """The valid ones of the pixels that count, or all of them; `(1,)`."""
        return pixel_divisor(self._chosen(labels), self.ignore_index, self.reduction).reshape(1)


class LossSum(PixelLoss):
    """Several losses of the same logits, each times its factor, summed: `create_loss("ce + 0.5*dice", 19)`.

    Args:
        terms: Factor and loss of each term.
    """

    may_be_binary = True

    def __init__(self, terms: Sequence[tuple[float, PixelLoss]]) -> None:
        first = terms[0][1]
        super().__init__(first.num_classes, ignore_index=first.ignore_index, reduction=first.reduction)
        self.factors = [factor for factor, _ in terms]
        self.terms = nn.ModuleList(loss for _, loss in terms)

    def total(self, logits: Tensor, labels: Tensor, pixels: int, shares: Tensor | None) -> Tensor:
        """The terms times their factors and shares, summed."""
        parts = [factor * loss.compute(logits, labels, pixels) for factor, loss in self._pairs()]
        summed: Tensor = sum(parts[1:], parts[0]) if shares is None else (torch.stack(parts) * shares).sum()
        return summed

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The sum of the terms."""
        return self.total(logits, labels, pixels, None)

    @property
    def num_terms(self) -> int:
        """Number T of the terms."""
        return len(self.terms)

    def divisors(self, labels: Tensor) -> Tensor:
        """Those of each term, `(T,)`."""
        return torch.cat([loss.divisors(labels) for _, loss in self._pairs()])

    def _pairs(self) -> list[tuple[float, PixelLoss]]:
        return list(zip(self.factors, self.terms, strict=True))  # type: ignore[arg-type]  # a ModuleList of losses

    def extra_repr(self) -> str:
        """Adds the factors to the module's representation."""
        return f"factors={self.factors}"


LOSSES: dict[str, Callable[..., PixelLoss]] = {
    "ce": CrossEntropy,
    "ohem": OhemCrossEntropy,
    "dice": Dice,
    "jaccard": Jaccard,
    "tversky": Tversky,
    "lovasz": Lovasz,
    "focal": Focal,
    "bce": BinaryCrossEntropy,
}
"""The losses by the names that `create_model` and `--loss` take; a name of your own may be added."""


class Term(NamedTuple):
    """A term of a loss in words: `0.5*dice(stride=2)`."""

    factor: float
    name: str
    options: dict[str, Any]


def create_loss(
    loss: str | Callable[..., PixelLoss],
    num_classes: int,
    *,
    ignore_index: int = 255,
    reduction: Reduction = "valid",
    **options: Any,
) -> PixelLoss:
    """Build a loss, or a sum of several.

    Args:
        loss: A name in `LOSSES`, a sum of them such as `"ce + 0.5*dice"`, where each may have options of its own, as
            in `"ohem(keep=0.1) + dice(stride=2)"`; or what builds a loss from the arguments below.
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: See `PixelLoss`.
        **options: The loss's own; in a sum, of each term that has such an option and does not say it itself.

    Raises:
        ValueError: If no loss has that name (the message lists the known ones), it has no such option, or refuses a
            value; or the sum is no such text.

    Examples:
        >>> create_loss("ce", 19, label_smoothing=0.1)
        CrossEntropy(ignore_index=255, reduction=valid, weight=None, label_smoothing=0.1)
        >>> create_loss("ce + 0.5*dice", 19).factors
        [1.0, 0.5]
    """
    common: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    if not isinstance(loss, str):
        return _build(loss, num_classes, common, options)
    terms = parse_loss(loss)
    if len(terms) == 1 and terms[0].factor == 1:
        return _build(terms[0].name, num_classes, common, {**options, **terms[0].options})
    known = [_options(find_loss(term.name)) for term in terms]
    if strange := [name for name in options if all(own is not None and name not in own for own in known)]:
        raise ValueError(f"no term of loss {loss!r} takes {', '.join(strange)}")
    built = []
    for term, own in zip(terms, known, strict=True):
        given = {name: value for name, value in options.items() if own is None or name in own}
        if num_classes == 1 and getattr(find_loss(term.name), "may_be_binary", False):
            given.pop("weight", None)  # smp has none there
        built.append((term.factor, _build(term.name, num_classes, common, {**given, **term.options})))
    return LossSum(built)


def parse_loss(text: str) -> list[Term]:
    """The terms of a loss in words.

    Args:
        text: Names in `LOSSES`, with factors and options: `"ce + 0.5*dice(stride=2)"`.

    Raises:
        ValueError: If it is no such text, a factor is not above 0, or no loss has a name.

    Examples:
        >>> parse_loss("ce + 0.5*dice(stride=2)")
        [Term(factor=1.0, name='ce', options={}), Term(factor=0.5, name='dice', options={'stride': 2})]
    """
    if text in LOSSES:  # a name of your own may be no word of Python
        return [Term(1.0, text, {})]
    try:
        terms = [_term(part) for part in _summands(ast.parse(text.strip(), mode="eval").body)]
    except (SyntaxError, TypeError, RecursionError) as error:
        raise ValueError(
            f'loss must be a name, or a sum such as "ce + 0.5*dice" or "ohem(keep=0.1) + dice"; got {text!r}'
        ) from error
    for term in terms:
        find_loss(term.name)
        if not 0 < term.factor < float("inf"):
            raise ValueError(f"the factor of {term.name} in loss {text!r} must be above 0; got {term.factor:g}")
    return terms


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), *_summands(node.right)]
    return [node]


def _term(node: ast.expr) -> Term:
    """A summand; a TypeError where it is none."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factor, node = node.left, node.right
        if not isinstance(factor, ast.Constant) or not isinstance(factor.value, (int, float)):
            raise TypeError(ast.unparse(factor))
        return _term(node)._replace(factor=float(factor.value))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        options = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
        if len(options) == len(node.keywords):
            return Term(1.0, node.func.id, options)
    if isinstance(node, ast.Name):
        return Term(1.0, node.id, {})
    raise TypeError(ast.unparse(node))


def _build(
    loss: str | Callable[..., PixelLoss], num_classes: int, common: dict[str, Any], options: dict[str, Any]
) -> PixelLoss:
    build = find_loss(loss) if isinstance(loss, str) else loss
    own = _options(build)
    wrong = [] if own is None else [name for name in options if name not in own]
    if wrong:
        raise ValueError(
            f"loss {_name(loss)} takes no {', '.join(wrong)}; its options: {', '.join(own or []) or 'none'}"
        )
    return build(num_classes, **common, **options)


def _options(build: Callable[..., PixelLoss]) -> list[str] | None:
    """The names of a loss's own options; None if it takes any."""
    known = inspect.signature(build).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return None
    return [name for name in known if name not in ("num_classes", "ignore_index", "reduction")]


def _images(labels: Tensor) -> Tensor:
    return torch.full((1,), float(len(labels)), device=labels.device)


def find_loss(name: str) -> Callable[..., PixelLoss]:
    """What builds a registered loss.

    Args:
        name: A name in `LOSSES`.

    Raises:
        ValueError: If no loss has that name; the message lists the known ones.
    """
    if name not in LOSSES:
        close = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no loss is called {name!r}; known: {', '.join(LOSSES)}{hint}")
    return LOSSES[name]


def is_binary(loss: str | Callable[..., PixelLoss]) -> bool:
    """Whether a loss is of one class, with which a model gives one logit for each pixel.

    Args:
        loss: What `create_loss` takes; of a sum one such term is enough.

    Raises:
        ValueError: If no loss has that name; the message lists the known ones.

    Examples:
        >>> is_binary("bce + dice"), is_binary("ce")
        (True, False)
    """
    built = [find_loss(term.name) for term in parse_loss(loss)] if isinstance(loss, str) else [loss]
    return any(getattr(one, "is_binary", False) for one in built)


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


def _weights(weight: Sequence[float] | None, count: int) -> Tensor | None:
    """Weights as a tensor, if there are `count` good ones."""
    if weight is None:
        return None
    values = torch.as_tensor(weight, dtype=torch.float32)
    if values.shape != (count,):
        raise ValueError(f"weight must have one value for each of {count} classes; got {weight}")
    if not values.isfinite().all() or values.min() < 0 or values.max() == 0:
        raise ValueError(f"weight must be finite numbers of 0 or more, not all of them 0; got {weight}")
    return values


def _smoothing(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must be 0 or more and below 1; got {value}")
    return value


def _shown(loss: CrossEntropy | BinaryCrossEntropy) -> str:
    weight = None if loss.weight is None else loss.weight.tolist()
    return f"weight={weight}, label_smoothing={loss.label_smoothing}"


def _name(loss: str | Callable[..., PixelLoss]) -> str:
    return repr(loss) if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
