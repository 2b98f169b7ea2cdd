"""Backbones of published states as timm has them: ResNet, Swin and ConvNeXt, with a norm for each map or without."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segheads.convert.states import State, count, rename

RESNET = [  # MMSegmentation's deep stem; the rest has torchvision's names, as timm
    (r"^stem\.7\.", "bn1."),
    (r"^stem\.", "conv1."),
]
SWIN = [  # MMSegmentation's, transformers' and the authors' own names
    (r"^(?:encoder\.)?(?:stages|layers)\.(\d+)\.", r"layers.\1."),
    (r"^patch_embed\.projection\.|^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"\.attn\.w_msa\.|\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.|\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.|\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
]
CONVNEXT = [  # MMPretrain's and transformers'
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^(?:encoder\.)?stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^(?:encoder\.)?stages\.(\d+)\.(?:layers\.)?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.(?:depthwise_conv|dwconv)\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.(?:pointwise_conv|pwconv)([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
]
UNUSED = re.compile(r"(relative_position_index|attn_mask|^fc\.(weight|bias)|^(swin\.)?layernorm\.(weight|bias))$")


class Backbone(NamedTuple):
    """How `create_model` builds a backbone, and its state."""

    name: str
    kwargs: dict[str, Any]
    state: dict[str, Tensor]  # names of TimmBackbone


def read_backbone(state: State, source: str, output_stride: int = 32) -> Backbone:
    """A backbone by the names in its state.

    Args:
        state: Without the prefix of the backbone.
        source: For messages.
        output_stride: Pixels per cell of the last map of a ResNet, which no shape tells.

    Raises:
        ValueError: If it is none that timm has.
    """
    state = {_level_norm(key): value for key, value in state.items() if not UNUSED.search(key)}
    kinds: tuple[tuple[str, Callable[[State], Backbone]], ...] = (
        (r"layer1\.0\.conv1\.weight$", partial(_resnet, output_stride=output_stride)),
        (r".*\.0\.0\.(depthwise_conv|dwconv)\.|encoder\.stages\.0\.layers\.0\.dwconv\.", _convnext),
        (r".*relative_position_bias_table$", _swin),
    )
    for pattern, read in kinds:
        if any(re.match(pattern, key) for key in state):
            return read(state)
    raise ValueError(
        f"the backbone of this {source} state is no ResNet, Swin or ConvNeXt in the names of MMSegmentation, "
        f"transformers or SenFormer; got {sorted(state)[:4]}"
    )


def _resnet(state: State, output_stride: int) -> Backbone:
    layers = tuple(count(state, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    deep, bottleneck = "stem.0.weight" in state, "layer1.0.conv3.weight" in state
    blocks = sum(layers) * (3 if bottleneck else 2) + 2
    name = f"resnet{blocks}" if f"resnet{blocks}" in ("resnet18", "resnet34", "resnet101", "resnet152") else "resnet50"
    options: dict[str, Any] = {"layers": layers, "output_stride": output_stride}
    widths = [state[f"layer{stage}.0.conv{3 if bottleneck else 2}.weight"].shape[0] for stage in range(1, 5)]
    options["channels"] = tuple(width // (4 if bottleneck else 1) for width in widths)
    if not bottleneck and name == "resnet50":
        name = "resnet18"
    if deep:
        options |= {"stem_width": state["stem.0.weight"].shape[0], "stem_type": "deep"}
    first = state["stem.0.weight" if deep else "conv1.weight"]
    return Backbone(
        name, {"in_chans": first.shape[1], "model_kwargs": options}, _inside(rename(state, RESNET) if deep else state)
    )


def _swin(state: State) -> Backbone:
    found = rename(state, SWIN)
    found = joined_qkv(found)
    stages = range(count(found, r"layers\.(\d+)\."))
    tables = {i: found[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages}
    depths = tuple(count(found, rf"layers\.{i}\.blocks\.(\d+)\.") for i in tables)
    window = (round(tables[0].shape[0] ** 0.5) + 1) // 2  # a table has (2 window - 1)² rows
    patches = found["patch_embed.proj.weight"]
    unfolded = any(name.startswith("stages.") for name in state)  # MMSegmentation's
    moved = {}
    for key, value in found.items():
        if match := re.match(r"layers\.(\d+)\.downsample\.(.*)", key):  # behind a stage there, before the next in timm
            moved[f"layers.{int(match[1]) + 1}.downsample.{match[2]}"] = _cells_first(value) if unfolded else value
        else:
            moved[key] = value
    options = {
        "patch_size": patches.shape[-1],
        "embed_dim": patches.shape[0],
        "depths": depths,
        "num_heads": tuple(table.shape[1] for table in tables.values()),
        "window_size": window,
        "mlp_ratio": found["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / patches.shape[0],
    }
    # so large that no stage fits into one window, where timm would leave the shift out
    side = 2 * window * patches.shape[-1] * 2 ** (len(depths) - 1)
    kwargs = {"in_chans": patches.shape[1], "img_size": side, "swin_padding": "published", "model_kwargs": options}
    kwargs |= _normed(moved)
    return Backbone("swin_tiny_patch4_window7_224", kwargs, _inside(moved))


def _convnext(state: State) -> Backbone:
    found = rename(state, CONVNEXT)
    found = {key: value.flatten() if key.endswith(".gamma") else value for key, value in found.items()}
    stages = range(count(found, r"stages\.(\d+)\."))
    options = {
        "depths": tuple(count(found, rf"stages\.{i}\.blocks\.(\d+)\.") for i in stages),
        "dims": tuple(found[f"stages.{i}.blocks.0.norm.weight"].shape[0] for i in stages),
        "ls_init_value": 1e-6 if "stages.0.blocks.0.gamma" in found else None,
        "conv_mlp": found["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4,
    }
    kwargs = {"in_chans": found["stem.0.weight"].shape[1], "norm_eps": 1e-6, "model_kwargs": options}
    return Backbone("convnext_tiny", {**kwargs, **_normed(found)}, _inside(found))


def _level_norm(key: str) -> str:
    """The norm of a map: `norm0` in MMSegmentation and SenFormer, `hidden_states_norms.stage1` in transformers."""
    if match := re.match(r"hidden_states_norms\.stage(\d)\.(.*)", key):
        return f"norms.{int(match[1]) - 1}.{match[2]}"
    return re.sub(r"^norm(\d)\.", r"norms.\1.", key)


def _normed(state: State) -> dict[str, Any]:
    return {"level_norms": True} if any(key.startswith("norms.") for key in state) else {}


def _inside(state: State) -> dict[str, Tensor]:
    return {key if key.startswith("norms.") else f"model.{key}": value for key, value in state.items()}


def joined_qkv(state: State) -> dict[str, Tensor]:
    """One linear layer for query, key and value, which transformers has apart."""
    joined = {key: value for key, value in state.items() if not re.search(r"\.attn\.(query|key|value)\.", key)}
    for key in state:
        if ".attn.query." in key:
            parts = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            joined[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    return joined


def _cells_first(value: Tensor) -> Tensor:
    """Inputs of a merging of 2 x 2 cells, in order of column, row, channel instead of channel, row, column."""
    cells = value.unflatten(-1, (-1, 2, 2))  # (..., C, rows, columns)
    return cells.transpose(-1, -3).flatten(-3).contiguous()
