"""Folders that segmentation-models-pytorch's `save_pretrained` wrote."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import timm

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
}
LEVELS = {"fpn": 4, "upernet": 4}  # the others take DEPTH
ENLARGED = {"fpn", "upernet", "segformer"}  # logits of stride 4
DEPTH = 5
NO_DECODER = {  # options of the other parts; an activation changes no label
    *("_model_class", "encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "upsampling"),
    *("activation", "aux_params"),
}
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
    if (depth := config.get("encoder_depth", DEPTH)) != DEPTH:
        raise ValueError(f"smp's {kind} with encoder_depth {depth} cannot be converted, only with {DEPTH}")
    decoder, encoder = KINDS[kind], str(config["encoder_name"])
    known = set(inspect.signature(DECODERS[decoder].build).parameters)
    if unknown := sorted(config.keys() - known - NO_DECODER):
        raise ValueError(f"smp's {kind} has options here that are not known: {', '.join(unknown)}")
    options = {key: x for key, x in config.items() if key in known and key != "encoder_channels"}
    if decoder in ENLARGED:
        options["upsampling"] = int(config.get("upsampling", 4))
    name = _timm_name(encoder)
    levels = LEVELS.get(decoder, DEPTH if _has_half_resolution(name) else DEPTH - 1)
    model = create_model(
        name,
        f"smp:{decoder}",
        int(config.get("classes", 1)),
        pretrained=False,
        pyramid=None,
        backbone_kwargs={"in_chans": int(config.get("in_channels", 3)), "levels": levels},
        head_kwargs=options,
        loss="bce" if config.get("classes", 1) == 1 else "ce",
    )
    body = {f"model.{_layer_name(key, encoder)}": x for key, x in without_prefix(state, "encoder.").items()}
    own = {f"model.{key}" for key in model.backbone.model.state_dict()}
    body = {key: x for key, x in body.items() if key in own or not CLASSIFIER.match(key)}
    head = {key: x for key, x in state.items() if key.startswith(("decoder.", "segmentation_head."))}
    return load_model(model, body, head, "smp")


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
