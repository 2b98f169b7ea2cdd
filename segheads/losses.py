"""What training makes small: losses by name, from logits on a head's grid and labels at full size.

No loss here holds logits at the labels' size; `segheads.functional.upsample_cross_entropy` is the model for new ones.
"""

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.classes import check_ignore_index, check_several_classes
from segheads.functional import upsample_cross_entropy
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

    Raises:
        ValueError: If there is no class, `ignore_index` is a class, or `reduction` is unknown.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, reduction: Reduction = "valid") -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more; got {num_classes}")
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
        check_ignore_index(value, self.num_classes)
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
        check_several_classes(num_classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be 0 or more and below 1; got {label_smoothing}")
        values = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        if values is not None:
            if values.shape != (num_classes,):
                raise ValueError(f"weight must have one value for each of {num_classes} classes; got {weight}")
            if not values.isfinite().all() or values.min() < 0 or values.max() == 0:
                raise ValueError(f"weight must be finite numbers of 0 or more, not all of them 0; got {weight}")
        self.register_buffer("weight", values, persistent=False)  # an argument, no part of a saved state
        self.label_smoothing = label_smoothing

    def compute(self, logits: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """The cross-entropy; `"all"` counts the pixels of the images, not of their padding."""
        loss = upsample_cross_entropy(
            logits,
            labels,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
        )
        return loss * (labels.shape[1] * labels.shape[2] / pixels) if self.reduction == "all" else loss

    def extra_repr(self) -> str:
        """Adds the options to the module's representation."""
        weight = None if self.weight is None else self.weight.tolist()
        return f"{super().extra_repr()}, weight={weight}, label_smoothing={self.label_smoothing}"


LOSSES: dict[str, Callable[..., PixelLoss]] = {
    "ce": CrossEntropy,
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


def _name(loss: str | Callable[..., PixelLoss]) -> str:
    return repr(loss) if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
