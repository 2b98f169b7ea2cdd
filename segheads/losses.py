"""What training makes small: losses by name, from logits on a head's grid and labels at full size.

No loss here holds logits at the labels' size; `segheads.functional.upsample_cross_entropy` is the model for new ones.
"""

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.classes import check_ignore_index, check_several_classes, num_labels
from segheads.functional import upsample_cross_entropy
from segheads.functional.binary import with_background
from segheads.functional.cross_entropy import holding
from segheads.functional.upsample import Reduction


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

    Raises:
        ValueError: If there is no class, `ignore_index` is a class, `reduction` is unknown, or K is 1 where the loss is
            of several classes, or the other way round.
    """

    is_binary: ClassVar[bool] = False

    def __init__(self, num_classes: int, *, ignore_index: int = 255, reduction: Reduction = "valid") -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more; got {num_classes}")
        if self.is_binary and num_classes != 1:
            raise ValueError(
                f"{type(self).__name__} is of one class and its background, labels 1 and 0, so num_classes must be 1; "
                f"got {num_classes}: take loss 'ce'"
            )
        if not self.is_binary:
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

    def forward(self, logits: Tensor, labels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The loss of logits that lie over `size` pixels, of which the labels are the upper left ones.

        Args:
            logits: Class scores on the head's grid.
            labels: Class of each pixel, or `ignore_index`.
            size: Height and width, in pixels, that the grid covers, padding and all; None means the labels' own.
        """
        H, W = labels.shape[1:]
        height, width = (H, W) if size is None else size
        labels = holding(labels, self.ignore_index)
        padded = F.pad(labels, (0, width - W, 0, height - H), value=self.ignore_index)
        return self.compute(logits, padded, H * W)

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

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, {_options(self)}"


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

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        return f"{super().extra_repr()}, {_options(self)}"


LOSSES: dict[str, Callable[..., PixelLoss]] = {
    "ce": CrossEntropy,
    "bce": BinaryCrossEntropy,
}
"""The losses by the names that `create_model` and `--loss` take; a name of your own may be added."""


def create_loss(
    loss: str | Callable[..., PixelLoss],
    num_classes: int,
    *,
    ignore_index: int = 255,
    reduction: Reduction = "valid",
    **options: Any,
) -> PixelLoss:
    """Build a loss.

    Args:
        loss: A name in `LOSSES`, or what builds one from the arguments below.
        num_classes: Number of classes K.
        ignore_index: The label that is left out.
        reduction: See `PixelLoss`.
        **options: The loss's own.

    Raises:
        ValueError: If no loss has that name (the message lists the known ones), it has no such option, or refuses a
            value.

    Examples:
        >>> create_loss("ce", 19, label_smoothing=0.1)
        CrossEntropy(ignore_index=255, reduction=valid, weight=None, label_smoothing=0.1)
    """
    build = find_loss(loss) if isinstance(loss, str) else loss
    common = {"ignore_index": ignore_index, "reduction": reduction}
    known = inspect.signature(build).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        own = [name for name in known if name not in ("num_classes", *common)]
        wrong = [name for name in options if name not in own]
        if wrong:
            raise ValueError(f"loss {_name(loss)} takes no {', '.join(wrong)}; its options: {', '.join(own) or 'none'}")
    return build(num_classes, **common, **options)


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
        loss: A name in `LOSSES`, or what builds one.

    Raises:
        ValueError: If no loss has that name; the message lists the known ones.

    Examples:
        >>> is_binary("bce"), is_binary("ce")
        (True, False)
    """
    return bool(getattr(find_loss(loss) if isinstance(loss, str) else loss, "is_binary", False))


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


def _options(loss: CrossEntropy | BinaryCrossEntropy) -> str:
    weight = None if loss.weight is None else loss.weight.tolist()
    return f"weight={weight}, label_smoothing={loss.label_smoothing}"


def _name(loss: str | Callable[..., PixelLoss]) -> str:
    return repr(loss) if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
