"""What every head has in common."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Head(nn.Module, ABC):
    """A function from a feature map to class logits on the same grid.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.

    Shape:
        `head(x)` takes `(B, C, h, w)` and gives logits `(B, K, h, w)`.

    Raises:
        ValueError: If `in_channels` or `num_classes` is below 1, or `head(x)` gets another shape.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels and num_classes must be 1 or more; got {in_channels} and {num_classes}")
        self.in_channels = in_channels
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""

    def predictions(self, x: Tensor) -> list[Tensor]:
        """The logits that training supervises, the final ones first; a plain head has one entry."""
        return [self(x)]

    def settings(self) -> dict[str, Any]:
        """Attributes that may be changed on a trained head; a saved model keeps them."""
        return {}

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} takes a map of shape (B, {self.in_channels}, h, w); got {tuple(x.shape)}"
            )
