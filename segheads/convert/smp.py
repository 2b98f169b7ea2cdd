"""Folders that segmentation-models-pytorch's `save_pretrained` wrote."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm
from segmentation_models_pytorch.encoders.timm_vit import sample_block_indices_uniformly

from segheads.build import create_model
from segheads.convert.states import State, load_model, without_prefix
from segheads.heads.smp_decoders import DECODERS
from segheads.model import SegmentationModel

KINDS = {
    "Unet": "unet",
    "UnetPlusPlus": "unetplusplus",
    "MAnet": "manet",
    "Linknet": "linknet",
    "FPN": "fpn",
    "UPerNet": "upernet",
    "Segformer": "segformer",
    "DPT": "dpt",
}
LEVELS = {"fpn": 4, "upernet": 4, "dpt": 4}  # the others take the depth
ENLARGED = {"fpn": 4, "upernet": 4, "segformer": 4, "dpt": 2}  # by the segmentation head
DEPTH = {"dpt": 4}  # of the encoder; 5 of the others
NO_DECODER = {  # options of the other parts; an activation changes no label
    *("_model_class", "encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "upsampling"),
    *("activation", "aux_params"),
}
OF_VIT = {"encoder_output_indices", "dynamic_img_size", "img_size"}  # further options of DPT's encoder
CLASSIFIER = re.compile(r"model\.(fc|conv_head|bn2|classifier|head)\.")  # of an encoder, in no result


def from_smp(state: State, config: Mapping[str, Any]) -> SegmentationModel:
    """A model of segmentation-models-pytorch, whose encoder timm has under the same names of weights.

    Args:
        state: Its weights.
        config: Its config.json.

    Raises:
        ValueError: If its kind, its encoder or one of its options cannot be converted, or the state does not fit.
    """
    kind = str(config.get("_model_class"))
    if kind not in KINDS:
        raise ValueError(
            f"smp's {kind} cannot be converted ({', '.join(KINDS)} can): its encoder is dilated or gives tokens as "
            "backbones here do not"
        )
    decoder, encoder = KINDS[kind], str(config["encoder_name"])
    own_depth = DEPTH.get(decoder, 5)
    if (depth := config.get("encoder_depth", own_depth)) != own_depth:
        raise ValueError(f"smp's {kind} with encoder_depth {depth} cannot be converted, only with {own_depth}")
    known = set(inspect.signature(DECODERS[decoder].build).parameters)
    if unknown := sorted(config.keys() - known - NO_DECODER - (OF_VIT if decoder == "dpt" else set())):
        raise ValueError(f"smp's {kind} has options here that are not known: {', '.join(unknown)}")
    options = {key: x for key, x in config.items() if key in known and key != "encoder_channels"}
    if decoder in ENLARGED:
        options["upsampling"] = int(config.get("upsampling", ENLARGED[decoder]))
    name = _timm_name(encoder)
    body_options: dict[str, Any] = {"in_chans": int(config.get("in_channels", 3))}
    if decoder == "dpt":
        readout = options.setdefault("decoder_readout", "cat")
        options["encoder_has_prefix_tokens"] = readout != "ignore"
        body_options |= {"class_token": readout != "ignore", "final_norm": False, "img_size": config.get("img_size")}
    levels = LEVELS[decoder] if decoder in LEVELS else 5 if _has_half_resolution(name) else 4
    model = create_model(
        name,
        f"smp:{decoder}",
        int(config.get("classes", 1)),
        pretrained=False,
        pyramid=None,
        backbone_kwargs={**body_options, "levels": levels},
        head_kwargs=options,
        loss="bce" if config.get("classes", 1) == 1 else "ce",
    )
    if decoder == "dpt":
        _check_blocks(model, config)
    body = {f"model.{_layer_name(key, encoder)}": x for key, x in without_prefix(state, "encoder.").items()}
    own = {f"model.{key}" for key in model.backbone.model.state_dict()}
    body = {key: x for key, x in body.items() if key in own or not CLASSIFIER.match(key)}
    head = {key: x for key, x in state.items() if key.startswith(("decoder.", "segmentation_head."))}
    return load_model(model, body, head, "smp")


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
