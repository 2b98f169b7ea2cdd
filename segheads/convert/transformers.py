"""Folders of Hugging Face's transformers: UPerNet on Swin or ConvNeXt."""

from collections.abc import Mapping
from typing import Any

from segheads.classes import Classes
from segheads.convert.mmseg import from_mmseg
from segheads.convert.states import State
from segheads.model import SegmentationModel

REFUSED = {
    "segformer": "timm has no Mix Transformer",
    "dpt": "its projected readout needs the class token, which backbones here do not give",
    "beit": "its neck of transposed convolutions is no pyramid here",
    "data2vec-vision": "its neck of transposed convolutions is no pyramid here",
    "mobilevit": "its DeepLab head is dilated inside the backbone",
    "mobilenet_v2": "its DeepLab head is dilated inside the backbone",
    "mask2former": "it predicts masks, not a class for each pixel",
    "maskformer": "it predicts masks, not a class for each pixel",
    "oneformer": "it predicts masks, not a class for each pixel",
}


def from_transformers(state: State, config: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> SegmentationModel:
    """A model of transformers.

    Args:
        state: Its weights.
        config: Its config.json.
        preprocessing: Its preprocessor_config.json, or an empty mapping.

    Raises:
        ValueError: If it is of a kind that cannot be converted, or does not fit.
    """
    kind = config.get("model_type")
    if kind != "upernet":
        why = REFUSED.get(str(kind), "this library has no such model")
        raise ValueError(f"transformers' model_type {kind!r} cannot be converted ({why}); 'upernet' can")
    scales = list(config.get("pool_scales", (1, 2, 3, 6)))
    if scales != [1, 2, 3, 6]:
        raise ValueError(f"transformers' UPerNet with pool_scales {scales} cannot be converted, only with [1, 2, 3, 6]")
    model = from_mmseg({key: x for key, x in state.items() if not key.startswith("auxiliary_head.")}, "transformers")
    names = config.get("id2label") or {}
    if len(names) == model.num_classes:
        model.classes = Classes(tuple(str(names[key]) for key in sorted(names, key=int)))
    if "image_mean" in preprocessing and "image_std" in preprocessing:
        model.set_input(mean=preprocessing["image_mean"], std=preprocessing["image_std"])
    return model
