"""What every loss has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.classes import check_ignore_index, check_several_classes, num_labels
from segheads.functional.cross_entropy import holding
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
        return self.joined(self.terms_of(logits, labels, size), shares)

    def terms_of(self, logits: Tensor, labels: Tensor, size: tuple[int, int] | None = None) -> list[Tensor]:
        """The T terms of the loss, each before its factor, which `joined` makes one.

        Args:
            logits: As of `forward`, and so are the others.
            labels: Class of each pixel, or `ignore_index`.
            size: Height and width, in pixels, that the grid covers.
        """
        H, W = labels.shape[1:]
        height, width = (H, W) if size is None else size
        labels = holding(labels, self.ignore_index)
        padded = F.pad(labels, (0, width - W, 0, height - H), value=self.ignore_index)
        return self.compute_terms(logits, padded, H * W)

    def compute_terms(self, logits: Tensor, labels: Tensor, pixels: int) -> list[Tensor]:
        """`terms_of` of labels that are padded; `compute` is the one term of most losses."""
        return [self.compute(logits, labels, pixels)]

    def joined(self, terms: Sequence[Tensor], shares: Tensor | None = None) -> Tensor:
        """The loss of its terms: times their factors and shares, summed.

        Args:
            terms: What `terms_of` gave.
            shares: As of `forward`.
        """
        return terms[0] if shares is None else terms[0] * shares[0]

    @property
    def term_names(self) -> list[str]:
        """What the T terms are called in a log: the names in a sum of losses; one term needs none."""
        return [""]

    @property
    def num_terms(self) -> int:
        """Number T of the terms that `divisors` speaks of."""
        return len(self.term_names)

    @property
    def divides_by(self) -> str:
        """What `divisors` counts, in words; of a sum each term's."""
        return f"{self.reduction} pixels"

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


def checked_weights(weight: Sequence[float] | None, count: int) -> Tensor | None:
    """Weights as a tensor, if there are `count` good ones."""
    if weight is None:
        return None
    values = torch.as_tensor(weight, dtype=torch.float32)
    if values.shape != (count,):
        raise ValueError(f"weight must have one value for each of {count} classes; got {weight}")
    if not values.isfinite().all() or values.min() < 0 or values.max() == 0:
        raise ValueError(f"weight must be finite numbers of 0 or more, not all of them 0; got {weight}")
    return values


def number_of_images(labels: Tensor) -> Tensor:
    """The divisor of a mean over images, `(1,)`."""
    return torch.full((1,), float(len(labels)), device=labels.device)
