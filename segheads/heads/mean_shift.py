"""The MeanShifter's head: mean shift, then any single-level head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from segheads.heads.base import Head
from segheads.heads.registry import find_head
from segheads.mean_shift import MeanShift, ShiftOptions


def _of_the_shift(name: str, doc: str) -> Any:
    """An attribute of the block, to be read and set on the head, too."""
    return property(lambda head: getattr(head.shift, name), lambda head, x: setattr(head.shift, name, x), doc=doc)


class MeanShiftHead(Head):
    """Mean shift, then a single-level head on the shifted features.

    The MeanShifter is mean shift before a linear layer, which is the default here; the thesis' best configuration is
    one layer with `shift_channels` 192 on ViT-Ti/16 (its published class defaults to 3 layers and its published
    configuration has 2). Any other head as `decoder`, such as a mask transformer, is the thesis' future work.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.
        decoder: The head after the shift: a name in `segheads.heads.HEADS`, or a callable that takes `in_channels` and
            `num_classes` and returns a head.
        concat_input: Give the decoder the unshifted features beside the shifted ones, `2 in_channels` in all (as the
            option of this name of MMSegmentation's FCN head does).
        **shift: Options of `segheads.MeanShift`, such as `num_layers` (L_ms) and `shift_channels` (d_ms).

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If `decoder` is an unknown name, an option is out of range, or the map has other channels.

    Examples:
        >>> import torch
        >>> head = MeanShiftHead(192, 150, num_layers=1)
        >>> head(torch.randn(2, 192, 16, 24)).shape
        torch.Size([2, 150, 16, 24])
        >>> head.num_layers = 3  # more shift at inference than in training
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        decoder: str | Callable[[int, int], Head] = "linear",
        concat_input: bool = False,
        **shift: Unpack[ShiftOptions],
    ) -> None:
        super().__init__(in_channels, num_classes)
        build: Callable[[int, int], Head] = find_head(decoder) if isinstance(decoder, str) else decoder
        self.shift = MeanShift(in_channels, **shift)
        self.concat_input = concat_input
        self.decoder = build(in_channels * (2 if concat_input else 1), num_classes)

    num_layers = _of_the_shift("num_layers", "How often to shift; 0 means no shift.")
    bandwidth = _of_the_shift("bandwidth", "The bandwidth h of the kernel.")
    spatial_bandwidth = _of_the_shift("spatial_bandwidth", "The bandwidth s of places, in cells of the map.")

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        return self.decoder(self._shifted(x))

    def predictions(self, x: Tensor) -> list[Tensor]:
        """What training supervises: the decoder's own predictions on the shifted features."""
        self._check(x)
        return self.decoder.predictions(self._shifted(x))

    def _shifted(self, x: Tensor) -> Tensor:
        shifted = self.shift(x)
        return torch.cat([x, shifted], dim=1) if self.concat_input else shifted
