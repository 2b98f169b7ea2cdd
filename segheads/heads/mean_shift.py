"""The MeanShifter's head: mean shift, then any single-level head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segheads.functional.affinity import Kernel
from segheads.heads.base import Head
from segheads.heads.mean_shift_block import MeanShift


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
        concat_input: Give the decoder the unshifted features beside the shifted ones, `2 in_channels` in all (as the
            option of this name of MMSegmentation's FCN head does).
        kernel: `"dot"` (the thesis'), `"gaussian"` or `"cosine"`; this and what follows is `MeanShift`'s.
        bandwidth: The bandwidth h; an attribute that may be changed on a trained head. None means the kernel's own, see
            `MeanShift`.
        spatial_bandwidth: Also weigh tokens by their distance in the map, with this bandwidth in cells of the map; an
            attribute that may be changed on a trained head that has one.
        learn_bandwidth: Learn the bandwidths.
        blurring: Shift the tokens among themselves, rather than against the original ones.
        step: How far to go towards the average, as a fraction.
        learn_step: Learn the step.

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
        shift_channels: int | None = None,
        num_layers: int = 1,
        decoder: str | Callable[[int, int], Head] = "linear",
        concat_input: bool = False,
        kernel: Kernel = "dot",
        bandwidth: float | None = None,
        spatial_bandwidth: float | None = None,
        learn_bandwidth: bool = False,
        blurring: bool = True,
        step: float = 1.0,
        learn_step: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes)
        from segheads.heads import find_head  # the registry holds this class too

        build: Callable[[int, int], Head] = find_head(decoder) if isinstance(decoder, str) else decoder
        self.shift = MeanShift(
            in_channels,
            shift_channels,
            num_layers,
            kernel=kernel,
            bandwidth=bandwidth,
            spatial_bandwidth=spatial_bandwidth,
            learn_bandwidth=learn_bandwidth,
            blurring=blurring,
            step=step,
            learn_step=learn_step,
        )
        self.concat_input = concat_input
        self.decoder = build(in_channels * (2 if concat_input else 1), num_classes)

    @property
    def num_layers(self) -> int:
        """How often to shift; 0 means no shift."""
        return self.shift.num_layers

    @num_layers.setter
    def num_layers(self, num_layers: int) -> None:
        self.shift.num_layers = num_layers

    @property
    def bandwidth(self) -> float:
        """The bandwidth h of the kernel."""
        return self.shift.bandwidth

    @bandwidth.setter
    def bandwidth(self, bandwidth: float) -> None:
        self.shift.bandwidth = bandwidth

    @property
    def spatial_bandwidth(self) -> float | None:
        """The bandwidth s of places, in cells of the map."""
        return self.shift.spatial_bandwidth

    @spatial_bandwidth.setter
    def spatial_bandwidth(self, spatial_bandwidth: float) -> None:
        self.shift.spatial_bandwidth = spatial_bandwidth

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        return self.decoder(self._shifted(x))

    def predictions(self, x: Tensor) -> list[Tensor]:
        """What training supervises: the decoder's own predictions on the shifted features."""
        self._check(x)
        return self.decoder.predictions(self._shifted(x))

    def settings(self) -> dict[str, Any]:
        """What may be changed on a trained head: `num_layers`, and the bandwidths where they are no weights."""
        settings: dict[str, Any] = {"num_layers": self.num_layers}
        if not self.shift.learns_bandwidth:
            settings["bandwidth"] = self.bandwidth
            if self.spatial_bandwidth is not None:
                settings["spatial_bandwidth"] = self.spatial_bandwidth
        return settings

    def _shifted(self, x: Tensor) -> Tensor:
        shifted = self.shift(x)
        return torch.cat([x, shifted], dim=1) if self.concat_input else shifted
