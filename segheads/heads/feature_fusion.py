"""The baseline that fuses features where an ensemble merges predictions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segheads.functional import upsample
from segheads.heads.base import Head
from segheads.heads.class_attention import ClassAttentionHead
from segheads.heads.smp import tolerate_single_values


class FeatureFusionHead(Head):
    """All levels are resized to the finest, concatenated, convolved (3x3, batch norm, ReLU) and read by one decoder.

    What SenFormer is measured against on equal terms (Bousselham et al., BMVC 2022, https://arxiv.org/abs/2111.13280,
    Fig. 3): the same pyramid and class-attention decoder, but one decoder on fused features.

    Args:
        in_channels: Channels of each map, fine to coarse.
        num_classes: Number of classes K.
        channels: Channels of the fused map; None means those of the finest.
        decoder_kwargs: Further arguments of the `ClassAttentionHead`, such as `{"num_layers": 3}`.
        norm: False leaves out batch norm and ReLU, as in version 0.1.0.

    Shape:
        A list of `(B, C_i, h_i, w_i)`, fine to coarse, to `(B, K, h_0, w_0)`.

    Raises:
        ValueError: If the maps have other channels, or an argument of the decoder is out of range.

    Examples:
        >>> features = [torch.randn(1, 64, n, 2 * n) for n in (16, 8, 4, 2)]
        >>> FeatureFusionHead([64, 64, 64, 64], 19)(features).shape
        torch.Size([1, 19, 16, 32])
    """

    multi_level = True
    preferred_pyramid = "fpnt"

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int | None = None,
        decoder_kwargs: dict[str, Any] | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes)
        channels = self.in_channels[0] if channels is None else channels
        self.fuse = nn.Conv2d(sum(self.in_channels), channels, 3, padding=1, bias=not norm)  # a norm has one
        normed = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.norm = tolerate_single_values(normed) if norm else nn.Identity()
        self.decoder = ClassAttentionHead(channels, num_classes, **(decoder_kwargs or {}))

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Logits `(B, K, h_0, w_0)` of a list of maps."""
        self._check(x)
        size = (x[0].shape[2], x[0].shape[3])
        levels = [x[0], *(upsample(level, size).to(x[0].dtype) for level in x[1:])]
        return self.decoder(self.norm(self.fuse(torch.cat(levels, dim=1))))
