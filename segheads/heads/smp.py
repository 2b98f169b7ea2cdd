"""Decoders of segmentation-models-pytorch as heads."""

import difflib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from segmentation_models_pytorch.base.heads import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from segmentation_models_pytorch.decoders.dpt.decoder import DPTSegmentationHead
from torch import Tensor, nn

from segheads.functional.shapes import crop, extend, is_dynamic, whole
from segheads.heads.base import Head
from segheads.heads.registry import DecoderEntry
from segheads.heads.smp_decoders import DECODERS, Decoder


class SmpHead(Head):
    """A decoder of segmentation-models-pytorch (https://github.com/qubvel-org/segmentation_models.pytorch) on any maps.

    smp's own decoder and segmentation head, with its options, defaults and initialisation, without its encoder and
    without its last upsampling, which the model does. `create_model(backbone, "smp:unet", K)` builds one by name.

    Maps are taken as neighbours that differ by a factor of 2, the coarsest last; each is padded at the bottom and
    right (by its last row and column) to the size that makes the factors exact, and the logits are cropped.

    - `unet`, `unetplusplus`, `manet`, `linknet` upsample beyond the finest map: five maps (strides 2 to 32, a ResNet)
      give twice its grid, fewer (strides 4 to 32, a ConvNeXt or Swin) four times, as smp does on both. The length of
      `decoder_channels` chooses: as many entries as maps for twice the grid, one more for four times.
    - `fpn`, `deeplabv3plus`, `pan`, `upernet` use the four coarsest maps, `pspnet` and `deeplabv3` the coarsest only.
      Where there are more, the logits are enlarged to the finest map's grid. `segformer` uses all five, as smp does.
    - `deeplabv3`, `deeplabv3plus`, `pan`, `pspnet` come with dilated encoders in smp (and `pspnet` reads the stride-8
      map). Here they run undilated, on the backbone's own maps; rates stay as they are unless set. For a `pan` as there
      say `encoder_output_stride=16`, and `model_kwargs={"output_stride": 16}` and `every_stage=True` to the backbone.
    - `dpt` takes maps of equal size, blocks of one plain ViT (which `create_model` takes by itself), without
      the class token, therefore `decoder_readout="ignore"`; the logits have 8 x 8 cells per patch. For maps with it, as
      `TimmBackbone(class_token=True)` gives them, say `encoder_has_prefix_tokens=True` and `decoder_readout="cat"` or
      `"add"`. For maps that halve say `encoder_output_strides=[4, 8, 16, 32]`, as `create_model` does by itself: the
      logits then have 2 x 2 cells per cell of the finest map.

    Batch normalisation of a pooled 1x1 map of a single image, at which training in smp stops with "Expected more than
    1 value per channel", uses the running statistics here.

    Args:
        in_channels: Channels of the maps, fine to coarse.
        num_classes: Number of classes K.
        decoder: A name of `smp_decoders()`.
        upsampling: Factor by which the head itself enlarges the decoder's logits, with `align_corners=True` as smp does
            (4 for `fpn`, `upernet`, `segformer`, 2 for `dpt`); 1 leaves it to the model, which holds no full-resolution
            logits.
        **options: smp's options of that decoder, in smp's words, such as `decoder_channels` or `decoder_use_norm`.

    Shape:
        A list of `(B, C_i, h_i, w_i)` to `(B, K, h_0 * upsampling, w_0 * upsampling)`.

    Raises:
        ValueError: If the decoder or an option of it is unknown, `upsampling` is none that it takes, the maps are too
            few or too many for it, or their sizes are not those that it takes.

    Examples:
        >>> import torch
        >>> maps = [torch.randn(2, 8, 19, 26), torch.randn(2, 16, 10, 13), torch.randn(2, 32, 5, 7)]
        >>> head = SmpHead([8, 16, 32], 5, decoder="unet", decoder_channels=[16, 8, 8])
        >>> head(maps).shape, head.upsampling
        (torch.Size([2, 5, 38, 52]), 2)
    """

    multi_level = True
    preferred_pyramid = None
    max_levels = 5

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        decoder: str = "unet",
        upsampling: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, num_classes)
        spec, count = _find(decoder), len(self.in_channels)
        known = [name for name in inspect.signature(spec.build).parameters if name != "encoder_channels"]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"smp's decoder {decoder!r} has no option {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(known) or 'none'}"
            )
        most = 4 if decoder == "dpt" else self.max_levels
        if not spec.fewest <= count <= most:
            raise ValueError(
                f"smp's decoder {decoder!r} takes {spec.fewest} to {most} maps; got {count} (channels "
                f"{self.in_channels}); choose another backbone, or its number of levels, or put a pyramid before it"
            )
        self.decoder_name = decoder
        self._used = min(count, spec.most)
        self._strides = [2**level for level in range(count)]  # relative to the finest map
        if decoder == "pan" and options.get("encoder_output_stride") == 16:
            self._strides[-1] = self._strides[-2]
        self._multiple = self._strides[-1]  # of the padded extent, in cells of the finest map
        self._least = spec.least * self._multiple
        self._num_dummies = _count_dummies(decoder, spec, self._used, options)
        self._enlarge = 1 if spec.upsamples else 2 ** max(0, count - min(spec.most, 4))
        self.needs_class_token = bool(options.get("encoder_has_prefix_tokens"))
        if decoder == "dpt":
            self._strides = _dpt_strides(count, options)
            self._multiple = max(*self._strides, 2 ** (count + 1))
            self.upsampling = self._strides[0] // 2
        elif spec.upsamples:
            self.upsampling = 2**self._num_dummies
        if upsampling != 1:
            if spec.upsamples or upsampling < 1 or upsampling % self._enlarge:
                raise ValueError(
                    f"upsampling is for smp's fpn, pan, pspnet, deeplabv3, deeplabv3plus, upernet, segformer and dpt, "
                    f"and a multiple of {self._enlarge} on {count} maps; got {upsampling} for {decoder!r}"
                )
            self.upsampling, self._enlarge = self.upsampling * upsampling // self._enlarge, 1

        encoder_channels = [0] * self._num_dummies + self.in_channels[-self._used :]
        try:
            built, channels = spec.build(encoder_channels, **options)
        except TypeError as error:
            raise ValueError(f"smp's decoder {decoder!r} cannot be built with {options}: {error}") from error
        self.decoder = tolerate_single_values(built)
        if decoder == "dpt":
            self.segmentation_head = DPTSegmentationHead(channels, num_classes, upsampling=upsampling)
        else:
            self.segmentation_head = SegmentationHead(channels, num_classes, spec.kernel_size, upsampling=upsampling)
        if spec.initialises:
            initialize_decoder(self.decoder)
            initialize_head(self.segmentation_head)
        tolerate_single_values(self.segmentation_head)

    def forward(self, x: list[Tensor]) -> Tensor:
        """Logits `(B, K, h, w)` of maps `(B, C_i, h_i, w_i)`, on `upsampling` times the finest map's grid."""
        self._check(x)
        h, w = x[0].shape[2:]
        if not is_dynamic(h, w):
            self._check_sizes(x)
        maps = self._pad(x)[-self._used :]
        if self.decoder_name == "dpt":
            decoded = self.decoder(*self._without_tokens(maps))
        else:
            decoded = self.decoder([*self._dummies(maps[0]), *maps])
        logits = self.segmentation_head(decoded)
        if self._enlarge > 1:
            logits = F.interpolate(logits, scale_factor=float(self._enlarge), mode="bilinear")
        return crop(logits, h * self.upsampling, w * self.upsampling)

    def _without_tokens(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """The maps, and apart from them the class token `(B, 1, C)` that stands behind each of their cells."""
        if not self.needs_class_token:
            return maps, [None] * len(maps)
        halves = [x.chunk(2, dim=1) for x in maps]
        return [x for x, _ in halves], [token[:, None, :, 0, 0] for _, token in halves]

    def _dummies(self, finest: Tensor) -> list[Tensor]:
        """What stands for the image and, where missing, for the stride-2 map: no channels, but a size."""
        (B, _, h, w), count = finest.shape, self._num_dummies
        return [finest.new_zeros(B, 0, h * 2**power, w * 2**power) for power in range(count, 0, -1)]

    def _pad(self, x: list[Tensor]) -> list[Tensor]:
        h, w = x[0].shape[2:]
        if is_dynamic(h, w):  # the finest map's extent tells, as coarser ones are rounded up
            extents = [whole(n * self._strides[0], self._multiple, self._least) for n in (h, w)]
            sizes = [[n // stride for n in extents] for stride in self._strides]
            return [extend(level, *size) for level, size in zip(x, sizes, strict=True)]
        extents = []
        for axis in (2, 3):
            covered = max(level.shape[axis] * stride for level, stride in zip(x, self._strides, strict=True))
            extents.append(max(-(-covered // self._multiple) * self._multiple, self._least))
        padded = []
        for level, stride in zip(x, self._strides, strict=True):
            bottom, right = (extent // stride - size for extent, size in zip(extents, level.shape[2:], strict=True))
            padded.append(F.pad(level, (0, right, 0, bottom), mode="replicate") if bottom or right else level)
        return padded

    def _check_sizes(self, x: list[Tensor]) -> None:
        for axis in (2, 3):
            sizes, strides = [level.shape[axis] for level in x], self._strides
            for i, (fine, coarse) in enumerate(pairwise(sizes)):
                ratio = strides[i + 1] / strides[i]
                if abs(fine - ratio * coarse) > max(ratio - 1, 0.1 * fine):  # rounded up or down, or not padded at all
                    shapes = [tuple(level.shape[2:]) for level in x]
                    raise ValueError(f"{self._wanted_sizes()}; got {shapes}")

    def _wanted_sizes(self) -> str:
        if self.decoder_name != "dpt":
            last = ", the last two of one size" if self._strides[-1:] == self._strides[-2:-1] else ""
            return (
                f"smp's decoder {self.decoder_name!r} takes maps that halve in size from each to the next{last}; "
                'maps of one size need a pyramid before it, such as pyramid="simple"'
            )
        return (
            f"smp's decoder 'dpt' was built for maps of strides {self._strides}; take blocks of one plain ViT, "
            'pyramid=None and backbone_kwargs={"levels": 4}, or set encoder_output_strides to the strides of the maps'
        )


def smp_decoders() -> list[str]:
    """Names of smp's decoders.

    Examples:
        >>> smp_decoders()[:3]
        ['unet', 'unetplusplus', 'manet']
    """
    return list(DECODERS)


def smp_entries() -> dict[str, DecoderEntry]:
    """An entry for each decoder: `smp:unet` and so on; `max_levels` is as many maps as the decoder uses."""
    return {
        f"smp:{name}": DecoderEntry(
            SmpHead,
            name,
            max_levels=decoder.most,
            num_blocks=4 if name == "dpt" else None,
            strides_option="encoder_output_strides" if name == "dpt" else None,
        )
        for name, decoder in DECODERS.items()
    }


class SingleValueBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that trains on a map of one value per channel too, with its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` to the same."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def tolerate_single_values(module: nn.Module) -> nn.Module:
    """Exchange the batch normalisations of a new module, in place, for ones that one image's pooled map does not stop.

    Args:
        module: A module just built, on which nothing has been trained.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                sizes = (child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                setattr(parent, name, SingleValueBatchNorm(*sizes))
    return module


def _find(decoder: str) -> Decoder:
    if decoder not in DECODERS:
        close = difflib.get_close_matches(decoder, DECODERS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"smp has no decoder {decoder!r}; known: {', '.join(DECODERS)}{hint}")
    return DECODERS[decoder]


def _count_dummies(decoder: str, spec: Decoder, used: int, options: dict[str, Any]) -> int:
    if decoder == "dpt":
        return 0
    if not spec.upsamples or "decoder_channels" not in options:
        return 1 if used == 5 else 2
    channels = options["decoder_channels"]
    if not isinstance(channels, Sequence) or len(channels) - used not in (0, 1):
        raise ValueError(
            f"decoder_channels must list {used} or {used + 1} numbers for {used} maps (twice or four times the finest "
            f"map's grid); got {channels!r}"
        )
    return len(channels) + 1 - used


def _dpt_strides(count: int, options: dict[str, Any]) -> list[int]:
    strides = list(options.get("encoder_output_strides", [16] * count))
    if len(strides) != count or any(stride < 2 or stride & (stride - 1) for stride in strides):
        raise ValueError(f"encoder_output_strides must be a power of 2 for each of {count} maps; got {strides}")
    return strides
