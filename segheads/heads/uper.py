"""UPerNet, and its self-ensembled form."""

from collections.abc import Sequence
from functools import partial

from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from segheads.heads.base import Head
from segheads.heads.classifier import Init, pixel_classifier
from segheads.heads.fcn import FCNHead
from segheads.heads.senformer import SenFormerHead
from segheads.heads.smp import tolerate_single_values


class UPerHead(Head):
    """Pyramid pooling, top-down pyramid, fusion of all levels, classifier.

    UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
    https://arxiv.org/abs/1807.10221), the feature-fusion baseline of SenFormer. The decoder is that of
    segmentation-models-pytorch; it normalises each map over its channels first, which the paper does only for
    transformers and MMSegmentation not at all. Channels default to 512 and dropout to 0.1, as published (smp: 256 and
    none).

    Args:
        in_channels: Channels of two or more maps, fine to coarse.
        num_classes: Number of classes K.
        channels: Channels of the pyramid and the fusion.
        drop_rate: Probability with which whole channels are dropped before the classifier.
        init: How the classifier starts, see `FCNHead`.
        normalize: Whether each map is first normalised over its channels; MMSegmentation's head does not.

    Shape:
        A list of `(B, C_i, h_i, w_i)`, fine to coarse, to `(B, K, h_0, w_0)`.

    Raises:
        ValueError: If there are fewer than two maps, a size is below 1, `init` is unknown, or a map has other channels.

    Examples:
        >>> import torch
        >>> maps = [torch.randn(2, 8, 19, 26), torch.randn(2, 16, 10, 13), torch.randn(2, 32, 5, 7)]
        >>> UPerHead([8, 16, 32], 5, channels=16)(maps).shape
        torch.Size([2, 5, 19, 26])
    """

    multi_level = True
    preferred_pyramid = None

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        drop_rate: float = 0.1,
        init: Init = "xavier",
        normalize: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes)
        self.decoder = _decoder(self.in_channels, channels)
        if not normalize:
            self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in self.in_channels)
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = pixel_classifier(channels, num_classes, init)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Logits `(B, K, h_0, w_0)` of maps `(B, C_i, h_i, w_i)`."""
        self._check(x)
        fused = self.decoder([x[0], x[0], *x])  # smp takes no notice of the first two, image and stride 2
        return self.classifier(self.dropout(fused))


class SenUPer(Head):
    """UPerNet's pyramid with a convolutional decoder on each level, merged instead of fused.

    The self-ensembled UPerNet of SenFormer's comparison (Bousselham et al., BMVC 2022,
    https://arxiv.org/abs/2111.13280, Sec. 4.2): the same pyramid pooling and top-down pyramid as `UPerHead`, no
    fusion, and one `FCNHead` per level with weights of its own, whose predictions are merged and supervised like those
    of `SenFormerHead`. `merge` and `levels` may be changed on a trained head.

    Args:
        in_channels: Channels of two or more maps, fine to coarse.
        num_classes: Number of classes K.
        channels: Channels of the pyramid and of the learners.
        merge: A name in `segheads.merges.MERGES`.
        drop_rate: Probability with which whole channels are dropped before each learner's classifier.
        levels: Which levels have a learner, 0 the finest; None means all.
        init: How the learners' classifiers start, see `FCNHead`.

    Shape:
        A list of `(B, C_i, h_i, w_i)`, fine to coarse, to log-probabilities `(B, K, h_0, w_0)`.

    Raises:
        ValueError: If there are fewer than two maps, a size is below 1, `init` is unknown, a map has other
            channels, or `merge` or `levels` is not one that `SenFormerHead` takes.

    Examples:
        >>> import torch
        >>> maps = [torch.randn(2, 8, 19, 26), torch.randn(2, 16, 10, 13), torch.randn(2, 32, 5, 7)]
        >>> head = SenUPer([8, 16, 32], 5, channels=16)
        >>> head(maps).shape, len(head.predictions(maps))
        (torch.Size([2, 5, 19, 26]), 4)
    """

    multi_level = True
    preferred_pyramid = None
    is_ensemble = True

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        channels: int = 512,
        merge: str = "average",
        drop_rate: float = 0.1,
        levels: Sequence[int] | None = None,
        init: Init = "xavier",
    ) -> None:
        super().__init__(in_channels, num_classes)
        self.decoder = _decoder(self.in_channels, channels)
        del self.decoder.fusion_block
        self.ensemble = SenFormerHead(
            [channels] * len(self.in_channels),
            num_classes,
            learner=partial(FCNHead, channels=channels, drop_rate=drop_rate, init=init),
            merge=merge,
            levels=levels,
        )
        self._finest = min(self.ensemble.levels)
        for level, block in enumerate(
            reversed(range(len(self.in_channels) - 1))
        ):  # smp counts blocks from the coarsest
            if level not in self.ensemble.levels:
                self.decoder.fpn_conv_blocks[block] = nn.Identity()
            if level < self._finest:
                self.decoder.feature_norms[level] = self.decoder.fpn_lateral_blocks[block] = nn.Identity()

    @property
    def merge(self) -> str:
        """Name of the merge, see `SenFormerHead`."""
        return self.ensemble.merge

    @merge.setter
    def merge(self, merge: str) -> None:
        self.ensemble.merge = merge

    @property
    def averages_probabilities(self) -> bool:
        """Whether predictions upsample probabilities, see `SenFormerHead`."""
        return self.ensemble.averages_probabilities

    @property
    def levels(self) -> list[int]:
        """The levels whose learners vote, 0 the finest."""
        return self.ensemble.levels

    @levels.setter
    def levels(self, levels: Sequence[int] | None) -> None:
        self.ensemble.levels = levels

    def forward(self, x: list[Tensor]) -> Tensor:
        """Log-probabilities `(B, K, h_0, w_0)` of the merged prediction."""
        return self.ensemble(self._pyramid(x))

    def predictions(self, x: list[Tensor]) -> list[Tensor]:
        """The merged log-probabilities, then each voting learner's logits, all on the finest grid."""
        return self.ensemble.predictions(self._pyramid(x))

    def _pyramid(self, x: list[Tensor]) -> list[Tensor]:
        """UPerNet's maps before the fusion, fine to coarse, each `(B, channels, h_i, w_i)`."""
        self._check(x)
        maps = [norm(level) for norm, level in zip(self.decoder.feature_norms, x, strict=True)]
        states = [self.decoder.psp(maps[-1])]  # coarse to fine
        for lateral, level in zip(self.decoder.fpn_lateral_blocks, maps[-2::-1], strict=True):
            if len(states) < len(maps) - self._finest:
                states.append(lateral(states[-1], level))
            else:  # nothing that has a learner depends on it, but its size counts
                states.append(states[0].new_zeros(()).expand(*states[0].shape[:2], *level.shape[2:]))
        outputs = [conv(state) for conv, state in zip(self.decoder.fpn_conv_blocks, states[1:], strict=True)]
        return [*outputs[::-1], states[0]]


def _decoder(in_channels: list[int], channels: int) -> UPerNetDecoder:
    if len(in_channels) < 2:
        raise ValueError(f"UPerNet needs two maps or more; got one, of {in_channels[0]} channels")
    if channels < 1:
        raise ValueError(f"channels must be 1 or more; got {channels}")
    decoder = UPerNetDecoder([0, 0, *in_channels], decoder_channels=channels)
    initialize_decoder(decoder)
    return tolerate_single_values(decoder)
