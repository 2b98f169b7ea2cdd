"""Folders of Hugging Face's transformers: UPerNet on Swin or ConvNeXt, and DPT on a plain ViT."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from segheads.build import create_model
from segheads.classes import Classes
from segheads.convert.backbones import joined_qkv
from segheads.convert.mmseg import from_mmseg
from segheads.convert.states import State, count, load_model, rename, without_prefix
from segheads.model import SegmentationModel

REFUSED = {
    "segformer": "timm has no Mix Transformer",
    "beit": "its neck of transposed convolutions is no pyramid here",
    "data2vec-vision": "its neck of transposed convolutions is no pyramid here",
    "mobilevit": "its DeepLab head is dilated inside the backbone",
    "mobilenet_v2": "its DeepLab head is dilated inside the backbone",
    "mask2former": "it predicts masks, not a class for each pixel",
    "maskformer": "it predicts masks, not a class for each pixel",
    "oneformer": "it predicts masks, not a class for each pixel",
}

READOUTS = {"project": "cat", "add": "add", "ignore": "ignore"}
# Option: its default, and what is taken.
DPT_OPTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "is_hybrid": (False, (False,)),
    "backbone_config": (None, (None,)),
    "backbone": (None, (None,)),
    "readout_type": ("project", tuple(READOUTS)),
    "reassemble_factors": ([4, 2, 1, 0.5], ([4, 2, 1, 0.5],)),
    "use_batch_norm_in_fusion_residual": (False, (True,)),
    "use_bias_in_fusion_residual": (None, (None, False)),
    "head_in_index": (-1, (-1,)),
    "hidden_act": ("gelu", ("gelu",)),
}
DPT = [
    (r"^dpt\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (r"^dpt\.embeddings\.position_embeddings$", "backbone.pos_embed"),
    (r"^dpt\.embeddings\.cls_token$", "backbone.cls_token"),
    (r"^dpt\.encoder\.layer\.(\d+)\.", r"backbone.blocks.\1."),
    (r"^dpt\.layernorm\.", "backbone.norm."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", r"decoder.projection_blocks.\1.project.0."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"decoder.reassemble_blocks.\1.project_to_out_channel."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"decoder.reassemble_blocks.\1.upsample."),
    (r"^neck\.convs\.(\d)\.", r"decoder.reassemble_blocks.\1.project_to_feature_dim."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.projection\.", r"decoder.fusion_blocks.\1.project."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.", r"decoder.fusion_blocks.\1.residual_conv_block\2."),
    (r"\.convolution(\d)\.", r".conv_\1."),
    (r"\.batch_norm(\d)\.", r".batch_norm_\1."),
    (r"^head\.head\.", "segmentation_head.head."),
]


def from_transformers(state: State, config: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> SegmentationModel:
    """A model of transformers.

    Args:
        state: Its weights.
        config: Its config.json.
        preprocessing: Its preprocessor_config.json, or an empty mapping.

    Raises:
        ValueError: If it is of a kind that cannot be converted, or does not fit.
    """
    kind = str(config.get("model_type"))
    if kind not in KINDS:
        why = REFUSED.get(kind, "this library has no such model")
        raise ValueError(f"transformers' model_type {kind!r} cannot be converted ({why}); {', '.join(KINDS)} can")
    model = KINDS[kind]({key: x for key, x in state.items() if not key.startswith("auxiliary_head.")}, config)
    names = config.get("id2label") or {}
    if len(names) == model.num_classes:
        model.classes = Classes(tuple(str(names[key]) for key in sorted(names, key=int)))
    if "image_mean" in preprocessing and "image_std" in preprocessing:
        model.set_input(mean=preprocessing["image_mean"], std=preprocessing["image_std"])
    return model


def _upernet(state: State, config: Mapping[str, Any]) -> SegmentationModel:
    scales = list(config.get("pool_scales", (1, 2, 3, 6)))
    if scales != [1, 2, 3, 6]:
        raise ValueError(f"transformers' UPerNet with pool_scales {scales} cannot be converted, only with [1, 2, 3, 6]")
    return from_mmseg(state, "transformers")


def _dpt(state: State, config: Mapping[str, Any]) -> SegmentationModel:
    """DPT for segmentation on a ViT of its own: smp's decoder, whose numbers are the same.

    Its first fusion leaves a residual unit out that smp's applies: there the norm behind it becomes 0.
    """
    for key, (default, taken) in DPT_OPTIONS.items():
        if (value := config.get(key, default)) not in taken:
            raise ValueError(f"transformers' DPT with {key} {value!r} cannot be converted, only with {taken[0]!r}")
    readout = READOUTS[config.get("readout_type", "project")]
    state = rename(state, DPT)
    for part in ("weight", "bias"):
        key = f"decoder.fusion_blocks.0.residual_conv_block1.batch_norm_2.{part}"
        state[key] = torch.zeros_like(state[key])
    body = joined_qkv(without_prefix(state, "backbone."))
    patches, position = body["patch_embed.proj.weight"], body["pos_embed"]
    width, depth = patches.shape[0], count(body, r"blocks\.(\d+)\.")
    side = round((position.shape[1] - 1) ** 0.5) * patches.shape[-1]
    architecture = {
        "patch_size": patches.shape[-1],
        "embed_dim": width,
        "depth": depth,
        "num_heads": int(config.get("num_attention_heads", 12)),
        "mlp_ratio": body["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in body,
    }
    reads_token = readout != "ignore"
    model = create_model(
        "vit_base_patch16_224",
        "smp:dpt",
        state["segmentation_head.head.4.weight"].shape[0],
        pretrained=False,
        pyramid=None,
        backbone_kwargs={
            "in_chans": patches.shape[1],
            "img_size": side,
            "levels": 4,
            "pos_embed_resize": "bilinear",
            "norm_eps": float(config.get("layer_norm_eps", 1e-12)),
            "final_norm": False,
            "class_token": reads_token,
            "model_kwargs": architecture,
        },
        head_kwargs={
            "decoder_readout": readout,
            "encoder_has_prefix_tokens": reads_token,
            "decoder_intermediate_channels": [
                state[f"decoder.reassemble_blocks.{index}.project_to_out_channel.weight"].shape[0] for index in range(4)
            ],
            "decoder_fusion_channels": state["segmentation_head.head.0.weight"].shape[0],
            "upsampling": 2,
        },
    )
    blocks = list(config.get("backbone_out_indices", (2, 5, 8, 11)))
    if blocks != model.backbone.indices:
        raise ValueError(f"transformers' DPT of blocks {blocks} cannot be converted, only of {model.backbone.indices}")
    head = {key: x for key, x in state.items() if key.startswith(("decoder.", "segmentation_head."))}
    return load_model(model, {f"model.{key}": x for key, x in body.items()}, head, "transformers")


KINDS: dict[str, Callable[[State, Mapping[str, Any]], SegmentationModel]] = {"upernet": _upernet, "dpt": _dpt}
