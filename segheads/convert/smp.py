"""Folders that segmentation-models-pytorch's `save_pretrained` wrote."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
from segmentation_models_pytorch.encoders.timm_vit import sample_block_indices_uniformly

from segheads.build import create_model
from segheads.convert.states import State, load_model, without_prefix
from segheads.heads.smp_decoders import DECODERS
from segheads.model import SegmentationModel


class Kind(NamedTuple):
    """One of smp's models: its decoder, and what holds where config.json says nothing."""

    decoder: str
    upsampling: int | None = None  # by the segmentation head; None: the encoder's stride
    levels: int | None = None  # maps that it takes, the coarsest; None: all
    depth: int = 5  # of the encoder
    output_stride: int = 32  # pixels per cell of the encoder's last map


KINDS = {
    "Unet": Kind("unet"),
    "UnetPlusPlus": Kind("unetplusplus"),
    "MAnet": Kind("manet"),
    "Linknet": Kind("linknet"),
    "FPN": Kind("fpn", 4, 4),
    "UPerNet": Kind("upernet", 4, 4),
    "Segformer": Kind("segformer", 4),
    "PSPNet": Kind("pspnet", 8, 1, depth=3),
    "PAN": Kind("pan", 4, 4, output_stride=16),
    "DeepLabV3": Kind("deeplabv3", None, 1, output_stride=8),
    "DeepLabV3Plus": Kind("deeplabv3plus", 4, output_stride=16),
    "DPT": Kind("dpt", 2, 4, depth=4),
}
NO_DECODER = {  # options of the other parts; an activation changes no label
    *("_model_class", "encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "upsampling"),
    *("activation", "aux_params", "encoder_output_stride"),
}
OF_VIT = {"encoder_output_indices", "dynamic_img_size", "img_size"}  # further options of DPT's encoder
# Of an encoder, in no result: its classifier; in a PSPNet also stages behind the one that is read, which a ResNet keeps
UNREAD = re.compile(r"model\.(fc|conv_head|bn2|classifier|head)\.")
UNREAD_OF_PSPNET = re.compile(rf"{UNREAD.pattern}|model\.layer[34]\.")


def from_smp(state: State, config: Mapping[str, Any]) -> SegmentationModel:
    """A model of segmentation-models-pytorch, whose encoder timm has under the same names of weights.

    Args:
        state: Its weights.
        config: Its config.json.

    Raises:
        ValueError: If its kind, its encoder or one of its options cannot be converted, or the state does not fit.
    """
    name = str(config.get("_model_class"))
    if name not in KINDS:
        raise ValueError(f"smp's {name} cannot be converted; {', '.join(KINDS)} can")
    kind, encoder = KINDS[name], str(config["encoder_name"])
    decoder, spec = kind.decoder, DECODERS[kind.decoder]
    known = set(inspect.signature(spec.build).parameters)
    if unknown := sorted(config.keys() - known - NO_DECODER - (OF_VIT if decoder == "dpt" else set())):
        raise ValueError(f"smp's {name} has options here that are not known: {', '.join(unknown)}")
    options = {key: x for key, x in config.items() if key in known and key != "encoder_channels"}
    output_stride = int(config.get("encoder_output_stride", kind.output_stride))
    if not spec.upsamples:
        options["upsampling"] = int(config.get("upsampling") or kind.upsampling or output_stride)
    backbone = {"in_chans": int(config.get("in_channels", 3)), **_of_encoder(name, encoder, output_stride, config)}
    if decoder == "pan":
        options["encoder_output_stride"] = output_stride
    if decoder == "dpt":
        options.setdefault("decoder_readout", "cat")
        options["encoder_has_prefix_tokens"] = backbone["class_token"]
    model = create_model(
        _timm_name(encoder),
        f"smp:{decoder}",
        int(config.get("classes", 1)),
        pretrained=False,
        pyramid=None,
        backbone_kwargs=backbone,
        head_kwargs=options,
        loss="bce" if config.get("classes", 1) == 1 else "ce",
    )
    if decoder == "dpt":
        _check_blocks(model, config)
    body = {f"model.{_layer_name(key, encoder)}": x for key, x in without_prefix(state, "encoder.").items()}
    unread = UNREAD_OF_PSPNET if decoder == "pspnet" else UNREAD
    own = {f"model.{key}" for key in model.backbone.model.state_dict()}
    body = {key: x for key, x in body.items() if key in own or not unread.match(key)}
    head = {key: x for key, x in state.items() if key.startswith(("decoder.", "segmentation_head."))}
    return load_model(model, body, head, "smp")


def _of_encoder(name: str, encoder: str, output_stride: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the backbone that gives the maps of an encoder of smp."""
    kind = KINDS[name]
    depth = config.get("encoder_depth", kind.depth)
    if depth != kind.depth and (kind.decoder != "pspnet" or depth not in (3, 4, 5)):
        raise ValueError(f"smp's {name} with encoder_depth {depth} cannot be converted, only with {kind.depth}")
    if kind.decoder == "dpt":
        reads_token = config.get("decoder_readout", "cat") != "ignore"
        return {"levels": 4, "class_token": reads_token, "final_norm": False, "img_size": config.get("img_size")}
    if kind.decoder == "pspnet":
        return {"levels": 1, "max_stride": 2**depth}
    taken = {"pan": (16, 32), "deeplabv3": (8, 16), "deeplabv3plus": (8, 16)}
    if output_stride not in taken.get(kind.decoder, (32,)):
        raise ValueError(f"smp's {name} with encoder_output_stride {output_stride} cannot be converted")
    levels = kind.levels or (5 if output_stride == 32 and _has_half_resolution(_timm_name(encoder)) else 4)
    if kind.decoder == "deeplabv3plus":
        levels = {8: 2, 16: 3}[output_stride]  # from stride 4 on
    if output_stride == 32:
        return {"levels": levels}
    dilation = "timm" if encoder.startswith("tu-") else "smp"
    options = {"levels": levels, "dilation": dilation, "model_kwargs": {"output_stride": output_stride}}
    return {**options, "every_stage": True} if kind.decoder == "pan" else options


def _check_blocks(model: SegmentationModel, config: Mapping[str, Any]) -> None:
    """Whether DPT reads the blocks that a backbone gives here, and of tokens without a place only the first."""
    vit, own = model.backbone.model, model.backbone.indices
    indices = config.get("encoder_output_indices") or sample_block_indices_uniformly(4, len(vit.blocks))
    if list(indices) != own:
        raise ValueError(f"smp's DPT of blocks {list(indices)} cannot be converted, only of {own}")
    tokens = vit.num_prefix_tokens
    if config.get("decoder_readout") == "add" and tokens != 1:
        raise ValueError(
            f"smp's DPT that adds the mean of {tokens} tokens cannot be converted, only of the class token"
        )


def _timm_name(encoder: str) -> str:
    """Timm's name of an encoder of smp, whose weights have the same names."""
    name = encoder.removeprefix("tu-")
    if not timm.is_model(name) or not encoder.startswith(("tu-", "resnet", "resnext")):
        raise ValueError(
            f"smp's encoder {encoder!r} cannot be converted; resnet*, resnext* and tu-* can, where timm has them"
        )
    return name


def _layer_name(key: str, encoder: str) -> str:
    """A weight's name in timm's model: smp's `tu-` encoders hold it as `model`, its stages flattened."""
    if not encoder.startswith("tu-"):
        return key
    return re.sub(r"^(stem|stages|layers|blocks)_(\d+)\.", r"\1.\2.", key.removeprefix("model."))


def _has_half_resolution(name: str) -> bool:
    model: Any = timm.create_model(name, features_only=True)
    return min(model.feature_info.reduction()) <= 2
