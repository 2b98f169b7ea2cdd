"""What every head has in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
"""From logits `(B, K, h, w)` on a head's grid and labels `(B, H, W)` to a scalar loss."""


class Head(nn.Module, ABC):
    """A function from feature maps to class logits on the finest map's grid.

    A single-level head takes one map; a multi-level head (`multi_level = True`) takes a list of maps, fine to coarse.

    Args:
        in_channels: Channels of the feature map; of a multi-level head those of every map, fine to coarse.
        num_classes: Number of classes K.

    Shape:
        `head(x)` takes `(B, C, h, w)`, or a list of `(B, C_i, h_i, w_i)`, and gives logits `(B, K, h, w)`, h and w of
        the finest map (times `upsampling`).

    Attributes:
        multi_level: Whether the head takes a list of maps.
        preferred_pyramid: The pyramid that `create_model` puts between a backbone of several levels and the head, a
            name in `segheads.pyramids.PYRAMIDS`, or None for the backbone's own maps.
        max_levels: How many of the backbone's levels the head (with its pyramid) has use for, the coarsest ones.
        num_blocks: How many blocks of a plain ViT the head wants, as maps of one stride, where others want a pyramid.
        needs_class_token: Whether it reads the class token behind each cell, see `TimmBackbone(class_token=True)`.
        is_ensemble: Whether `predictions` are those of learners after the first, so that uncertainty can be told.
        upsampling: Cells of the logits for one cell of the finest map; 1 but in decoders that upsample by themselves.

    Raises:
        ValueError: If `in_channels` or `num_classes` is below 1 or of the wrong kind, or `head(x)` gets another shape.
    """

    multi_level: ClassVar[bool] = False
    preferred_pyramid: ClassVar[str | None] = "fpn"
    max_levels: ClassVar[int] = 4
    num_blocks: ClassVar[int | None] = None
    needs_class_token: bool = False
    is_ensemble: ClassVar[bool] = False
    upsampling: int = 1
    in_channels: Any  # int, or list[int] in a multi-level head

    def __init__(self, in_channels: int | Sequence[int], num_classes: int) -> None:
        super().__init__()
        name = type(self).__name__
        if self.multi_level and (isinstance(in_channels, int) or not in_channels):
            raise ValueError(f"{name} takes a list of maps: in_channels must list their channels; got {in_channels!r}")
        if not self.multi_level and not isinstance(in_channels, int):
            raise ValueError(f"{name} takes one map: in_channels must be an integer; got {in_channels!r}")
        channels = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        if min(channels) < 1 or num_classes < 1:
            raise ValueError(f"in_channels and num_classes must be 1 or more; got {in_channels} and {num_classes}")
        self.in_channels = channels if self.multi_level else channels[0]
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, x: Any) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`, or of a list of them."""

    @property
    def averages_probabilities(self) -> bool:
        """Whether predictions interpolate and average not logits but the probabilities whose logarithms these are."""
        return False

    def predictions(self, x: Any) -> list[Tensor]:
        """The logits that training supervises, the final ones first; a plain head has one entry."""
        return [self(x)]

    def loss(self, x: Any, labels: Tensor, criterion: Criterion) -> Tensor:
        """The criterion on the first of `predictions`, plus its mean over the others; a head may own its loss.

        Args:
            x: What `forward` takes.
            labels: Class of each pixel, `(B, H, W)`.
            criterion: Compares logits on the head's grid with the labels.

        Returns:
            A scalar.
        """
        first, *rest = self.predictions(x)
        loss = criterion(first, labels)
        return loss + sum(criterion(logits, labels) for logits in rest) / len(rest) if rest else loss

    def settings(self) -> dict[str, Any]:
        """Attributes of this head, not of heads inside it, that may be changed later; a saved model keeps them."""
        return {}

    def _check(self, x: Any) -> None:
        if self.multi_level:
            shapes = [tuple(level.shape) for level in x] if isinstance(x, (list, tuple)) else tuple(x.shape)
            if not isinstance(x, (list, tuple)) or [shape[1:2] for shape in shapes] != [(C,) for C in self.in_channels]:
                raise ValueError(
                    f"{type(self).__name__} takes a list of maps (B, C_i, h_i, w_i), fine to coarse, of channels "
                    f"{self.in_channels}; got {shapes}"
                )
        elif not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.in_channels:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{type(self).__name__} takes a map of shape (B, {self.in_channels}, h, w); got {got}")
