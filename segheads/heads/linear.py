"""Point-wise linear head."""

import torch.nn.functional as F
from torch import Tensor, nn

from segheads.heads.base import Head
from segheads.modules import weight_and_bias


class LinearHead(Head):
    """One linear layer, applied to each position.

    The linear decoder of Segmenter (Strudel et al., ICCV 2021, https://arxiv.org/abs/2105.05633), which is also the
    MeanShifter without a shift. Kept as a matrix rather than a 1x1 convolution: same numbers, and the weight of
    either loads into the other by a reshape (`segheads.convert`).

    Args:
        in_channels: Channels of the feature map.
        num_classes: Number of classes K.

    Shape:
        `(B, C, h, w)` to `(B, K, h, w)`.

    Raises:
        ValueError: If the map has other than `in_channels` channels.

    Examples:
        >>> import torch
        >>> LinearHead(192, 150)(torch.randn(2, 192, 32, 32)).shape
        torch.Size([2, 150, 32, 32])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.classifier = nn.Linear(in_channels, num_classes)  # PyTorch's default initialisation, as published

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, K, h, w)` of a feature map `(B, C, h, w)`."""
        self._check(x)
        weight, bias = weight_and_bias(self.classifier)
        return F.conv2d(x, weight[:, :, None, None], bias)
