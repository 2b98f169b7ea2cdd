"""Fully convolutional head."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from segheads.heads.base import Head
from segheads.heads.classifier import Init, pixel_classifier


class FCNHead(Head):
    """A few 3x3 convolutions and a classifier on one map.

    The decoder of Long et al., "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015,
    https://arxiv.org/abs/1411.4038) as MMSegmentation has it (`FCNHead`): the auxiliary head of PSPNet, UPerNet and
    SenFormer on the third stage, and the learner of `SenUPer`. Convolutions start as He et al. have it.

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.
        channels: Channels of the convolutions.
        num_layers: Number of convolutions, each with batch normalisation and ReLU; 0 leaves the classifier alone.
        kernel_size: Size of the convolutions' kernels, odd.
        drop_rate: Probability with which whole channels are dropped before the classifier.
        init: How the classifier starts: `"xavier"`, like other heads here, or `"published"`, with a standard deviation
            of 0.01, which learns later.
        concat_input: Whether one more convolution takes the input beside what the others made of it, as in
            MMSegmentation's main head.

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If a size is out of range, `init` is unknown, or the map has other than `in_channels` channels.

    Examples:
        >>> import torch
        >>> FCNHead(1024, 150)(torch.randn(2, 1024, 32, 32)).shape
        torch.Size([2, 150, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        num_layers: int = 1,
        kernel_size: int = 3,
        drop_rate: float = 0.1,
        init: Init = "xavier",
        concat_input: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes)
        if channels < 1 or num_layers < 0:
            raise ValueError(f"channels must be 1 or more and num_layers 0 or more; got {channels} and {num_layers}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the grid stays the same; got {kernel_size}")
        widths = [in_channels] + [channels] * num_layers
        self.layers = nn.Sequential(*(_conv_norm_relu(narrow, wide, kernel_size) for narrow, wide in pairwise(widths)))
        self.concat = _conv_norm_relu(in_channels + widths[-1], channels, kernel_size) if concat_input else None
        widths.append(channels if concat_input else widths[-1])
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = pixel_classifier(widths[-1], num_classes, init)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        features = self.layers(x)
        if self.concat is not None:
            features = self.concat(torch.cat([x, features], 1))
        return self.classifier(self.dropout(features))


def _conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
