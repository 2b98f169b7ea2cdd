"""Mean shift as a block from features to features, and the MeanShifter's head."""

from collections.abc import Callable
from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from segheads.functional import mean_shift
from segheads.heads.base import Head


class MeanShift(nn.Module):
    """Shifts tokens towards the modes of their density, `num_layers` times with the same weights.

    The block of the MeanShifter; the formula is at `segheads.functional.mean_shift`. Features in, features out, so it
    may stand before any head. The published code has a bias in the projection, which the thesis' formula leaves out.

    `num_layers` may be changed at any time, since all layers share one projection (thesis, Table 2); 0 means no
    shift. A block *built* with 0 layers freezes its projection, which could never receive a gradient.

    Args:
        channels: Channels C of the features.
        shift_channels: Width D of the space in which distances are measured (the thesis' d_ms); None means `channels`.
        num_layers: How often to shift (the thesis' L_ms).

    Shape:
        `(B, C, h, w)` or `(B, N, C)`, in and out.

    Raises:
        ValueError: If `num_layers` is negative, `shift_channels` below 1, or the input has other channels.

    Examples:
        >>> import torch
        >>> shift = MeanShift(192, num_layers=1)
        >>> shift(torch.randn(2, 192, 16, 24)).shape, shift(torch.randn(2, 384, 192)).shape
        (torch.Size([2, 192, 16, 24]), torch.Size([2, 384, 192]))
    """

    def __init__(self, channels: int, shift_channels: int | None = None, num_layers: int = 1) -> None:
        super().__init__()
        shift_channels = channels if shift_channels is None else shift_channels
        if channels < 1 or shift_channels < 1:
            raise ValueError(f"channels and shift_channels must be 1 or more; got {channels} and {shift_channels}")
        self.projection = nn.Linear(channels, shift_channels)
        trunc_normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)
        self.num_layers = num_layers
        if num_layers == 0:
            self.projection.requires_grad_(False)

    @property
    def num_layers(self) -> int:
        """How often to shift."""
        return self._num_layers

    @num_layers.setter
    def num_layers(self, num_layers: int) -> None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0:
            raise ValueError(f"num_layers must be an integer of 0 or more; got {num_layers!r}")
        self._num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        """Shifted features, in the shape of x."""
        return mean_shift(x, self.projection.weight, self.projection.bias, num_layers=self._num_layers)

    def extra_repr(self) -> str:
        """Adds the number of layers to the module's representation."""
        return f"num_layers={self._num_layers}"


class MeanShiftHead(Head):
    """Mean shift, then a single-level head on the shifted features.

    The MeanShifter is mean shift before a linear layer, which is the default here; the thesis' best configuration is
    one layer with `shift_channels` 192 on ViT-Ti/16 (its published class defaults to 3 layers and its published
    configuration has 2). Any other head as `decoder`, such as a mask transformer, is the thesis' future work.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.
        shift_channels: Width in which distances are measured (d_ms); None means `in_channels`.
        num_layers: How often to shift (L_ms); an attribute that may be changed on a trained head.
        decoder: The head after the shift: a name in `segheads.heads.HEADS`, or a callable that takes `in_channels` and
            `num_classes` and returns a head.

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If `decoder` is an unknown name, a size is out of range, or the map has other channels.

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
        shift_channels: int | None = None,
        num_layers: int = 1,
        decoder: str | Callable[[int, int], Head] = "linear",
    ) -> None:
        super().__init__(in_channels, num_classes)
        from segheads.heads import find_head  # the registry holds this class too

        build: Callable[[int, int], Head] = find_head(decoder) if isinstance(decoder, str) else decoder
        self.shift = MeanShift(in_channels, shift_channels, num_layers)
        self.decoder = build(in_channels, num_classes)

    @property
    def num_layers(self) -> int:
        """How often to shift; 0 means no shift."""
        return self.shift.num_layers

    @num_layers.setter
    def num_layers(self, num_layers: int) -> None:
        self.shift.num_layers = num_layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        return self.decoder(self.shift(x))

    def predictions(self, x: Tensor) -> list[Tensor]:
        """What training supervises: the decoder's own predictions on the shifted features."""
        self._check(x)
        return self.decoder.predictions(self.shift(x))

    def settings(self) -> dict[str, Any]:
        """`num_layers`, which may be changed on a trained head."""
        return {"num_layers": self.num_layers}
