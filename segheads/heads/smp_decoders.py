"""The decoders of segmentation-models-pytorch, built for any maps with smp's own options and defaults."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder, DeepLabV3PlusDecoder
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder
from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder
from segmentation_models_pytorch.decoders.pan.decoder import PANDecoder
from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import nn

# One function per decoder: smp's options and defaults, to the decoder and the number of channels that it gives.
# `encoder_channels` begins with a 0 for the image and, with fewer than five maps, another for the stride-2 map.

_UNET_CHANNELS = (256, 128, 64, 32, 16)


def _unet(
    encoder_channels: list[int],
    decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
    decoder_channels: Sequence[int] = _UNET_CHANNELS,
    decoder_attention_type: str | None = None,
    decoder_interpolation: str = "nearest",
) -> tuple[nn.Module, int]:
    blocks = len(encoder_channels) - 1
    decoder = UnetDecoder(
        encoder_channels,
        decoder_channels[:blocks],
        blocks,
        use_norm=decoder_use_norm,
        attention_type=decoder_attention_type,
        interpolation_mode=decoder_interpolation,
    )
    decoder.blocks[-1].attention1 = nn.Identity()  # never called: this block has no skip connection
    return decoder, decoder_channels[blocks - 1]


def _unetplusplus(
    encoder_channels: list[int],
    decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
    decoder_channels: Sequence[int] = _UNET_CHANNELS,
    decoder_attention_type: str | None = None,
    decoder_interpolation: str = "nearest",
) -> tuple[nn.Module, int]:
    blocks = len(encoder_channels) - 1
    decoder = UnetPlusPlusDecoder(
        encoder_channels,
        decoder_channels[:blocks],
        blocks,
        use_norm=decoder_use_norm,
        attention_type=decoder_attention_type,
        interpolation_mode=decoder_interpolation,
    )
    decoder.blocks[f"x_0_{blocks - 1}"].attention1 = nn.Identity()  # as in unet
    return decoder, decoder_channels[blocks - 1]


def _manet(
    encoder_channels: list[int],
    decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
    decoder_channels: Sequence[int] = _UNET_CHANNELS,
    decoder_pab_channels: int = 64,
    decoder_interpolation: str = "nearest",
) -> tuple[nn.Module, int]:
    blocks = len(encoder_channels) - 1
    decoder = MAnetDecoder(
        encoder_channels,
        decoder_channels[:blocks],
        blocks,
        use_norm=decoder_use_norm,
        pab_channels=decoder_pab_channels,
        interpolation_mode=decoder_interpolation,
    )
    return decoder, decoder_channels[blocks - 1]


def _linknet(
    encoder_channels: list[int], decoder_use_norm: bool | str | dict[str, Any] = "batchnorm"
) -> tuple[nn.Module, int]:
    if min(encoder_channels[2:]) < 4:
        raise ValueError(f"smp's decoder 'linknet' divides channels by 4; got maps of {encoder_channels} channels")
    return LinknetDecoder(encoder_channels, 32, len(encoder_channels) - 1, use_norm=decoder_use_norm), 32


def _fpn(
    encoder_channels: list[int],
    decoder_pyramid_channels: int = 256,
    decoder_segmentation_channels: int = 128,
    decoder_merge_policy: str = "add",
    decoder_dropout: float = 0.2,
    decoder_interpolation: str = "nearest",
) -> tuple[nn.Module, int]:
    decoder = FPNDecoder(
        encoder_channels,
        pyramid_channels=decoder_pyramid_channels,
        segmentation_channels=decoder_segmentation_channels,
        dropout=decoder_dropout,
        merge_policy=decoder_merge_policy,
        interpolation_mode=decoder_interpolation,
    )
    return decoder, decoder.out_channels


def _pspnet(
    encoder_channels: list[int],
    psp_out_channels: int = 512,
    decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
    psp_dropout: float = 0.2,
) -> tuple[nn.Module, int]:
    if encoder_channels[-1] % 4:
        raise ValueError(
            f"smp's decoder 'pspnet' divides the coarsest map's channels by 4; got {encoder_channels[-1]} channels"
        )
    decoder = PSPDecoder(encoder_channels, decoder_use_norm, psp_out_channels, psp_dropout)
    return decoder, psp_out_channels


def _deeplabv3(
    encoder_channels: list[int],
    decoder_channels: int = 256,
    decoder_atrous_rates: Sequence[int] = (12, 24, 36),
    decoder_aspp_separable: bool = False,
    decoder_aspp_dropout: float = 0.5,
) -> tuple[nn.Module, int]:
    decoder = DeepLabV3Decoder(
        encoder_channels[-1], decoder_channels, decoder_atrous_rates, decoder_aspp_separable, decoder_aspp_dropout
    )
    return decoder, decoder_channels


def _deeplabv3plus(
    encoder_channels: list[int],
    decoder_channels: int = 256,
    decoder_atrous_rates: Sequence[int] = (12, 24, 36),
    decoder_aspp_separable: bool = True,
    decoder_aspp_dropout: float = 0.5,
) -> tuple[nn.Module, int]:
    decoder = DeepLabV3PlusDecoder(
        encoder_channels,
        5,
        decoder_channels,
        decoder_atrous_rates,
        16,
        decoder_aspp_separable,
        decoder_aspp_dropout,
    )
    # smp's factor is 4, from a dilated stride 16 to stride 4; ours is that of the maps
    decoder.up = nn.Upsample(scale_factor=2.0 ** (len(encoder_channels) - 3), mode="bilinear", align_corners=True)
    return decoder, decoder_channels


def _pan(
    encoder_channels: list[int],
    decoder_channels: int = 32,
    decoder_interpolation: str = "bilinear",
    encoder_output_stride: int = 32,
) -> tuple[nn.Module, int]:
    if encoder_output_stride not in (16, 32):
        raise ValueError(f"encoder_output_stride of smp's decoder 'pan' must be 16 or 32; got {encoder_output_stride}")
    decoder = PANDecoder(encoder_channels, len(encoder_channels) - 1, decoder_channels, decoder_interpolation)
    return decoder, decoder_channels


def _upernet(
    encoder_channels: list[int],
    decoder_channels: int = 256,
    decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
) -> tuple[nn.Module, int]:
    decoder = UPerNetDecoder(encoder_channels, decoder_channels=decoder_channels, use_norm=decoder_use_norm)
    return decoder, decoder_channels


def _segformer(encoder_channels: list[int], decoder_segmentation_channels: int = 256) -> tuple[nn.Module, int]:
    decoder = SegformerDecoder(encoder_channels, segmentation_channels=decoder_segmentation_channels)
    return decoder, decoder_segmentation_channels


def _dpt(
    encoder_channels: list[int],
    decoder_readout: str = "ignore",
    decoder_intermediate_channels: Sequence[int] = (256, 512, 1024, 1024),
    decoder_fusion_channels: int = 256,
    encoder_output_strides: Sequence[int] = (16, 16, 16, 16),
    encoder_has_prefix_tokens: bool = False,
) -> tuple[nn.Module, int]:
    if decoder_readout == "add" and not encoder_has_prefix_tokens:
        raise ValueError(
            "decoder_readout='add' adds the class token, which maps have with encoder_has_prefix_tokens=True alone"
        )
    count = len(encoder_channels)
    decoder = DPTDecoder(
        [channels // 2 for channels in encoder_channels] if encoder_has_prefix_tokens else encoder_channels,
        encoder_output_strides[:count],
        encoder_has_prefix_tokens=encoder_has_prefix_tokens,
        readout=decoder_readout,
        intermediate_channels=decoder_intermediate_channels[:count],
        fusion_channels=decoder_fusion_channels,
    )
    return decoder, decoder_fusion_channels


class Decoder(NamedTuple):
    """How to build one of smp's decoders, and what it takes."""

    build: Callable[..., tuple[nn.Module, int]]
    fewest: int  # maps that it needs
    most: int  # maps that it uses, the coarsest ones
    kernel_size: int = 1  # of the classifier
    upsamples: bool = False  # beyond the finest map
    least: int = 1  # cells of the coarsest map along each side
    initialises: bool = True  # as smp's other models


DECODERS: dict[str, Decoder] = {
    "unet": Decoder(_unet, 1, 5, kernel_size=3, upsamples=True),
    "unetplusplus": Decoder(_unetplusplus, 2, 5, kernel_size=3, upsamples=True),
    "manet": Decoder(_manet, 1, 5, kernel_size=3, upsamples=True),
    "linknet": Decoder(_linknet, 1, 5, upsamples=True),
    "fpn": Decoder(_fpn, 4, 4),
    "pspnet": Decoder(_pspnet, 1, 1, kernel_size=3),
    "deeplabv3": Decoder(_deeplabv3, 1, 1, initialises=False),
    "deeplabv3plus": Decoder(_deeplabv3plus, 2, 4, initialises=False),
    "pan": Decoder(_pan, 2, 4, kernel_size=3, least=8),  # three poolings by 2 inside
    "upernet": Decoder(_upernet, 2, 4),
    "segformer": Decoder(_segformer, 1, 5),
    "dpt": Decoder(_dpt, 2, 4),
}
