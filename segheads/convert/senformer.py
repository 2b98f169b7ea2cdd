"""SenFormer's published states: model, neck, head, or the latter two."""

import re
from typing import Any, NamedTuple

from torch import Tensor, nn

from segheads.convert.backbones import Backbone, read_backbone
from segheads.convert.mmseg import build
from segheads.convert.states import State, count, load, load_model, rename, without_prefix
from segheads.heads import SenFormerHead
from segheads.model import SegmentationModel
from segheads.pyramids import Pyramid, find_pyramid

# Regular expressions from the names of the published code to ours, applied in turn.
HEAD = [
    (r"\.queries$", ".class_embeddings"),
    (r"\.layers\.(\d+)\.attn\.", r".blocks.\1.self_attention."),
    (r"\.layers\.(\d+)\.cross_attn\.to_q\.", r".blocks.\1.cross_attention.q."),
    (r"\.layers\.(\d+)\.cross_attn\.", r".blocks.\1.cross_attention."),
    (r"\.layers\.", ".blocks."),
    (r"\.norm_embs\.", ".norm."),
]
NECK = [
    (r"^lateral_convs\.(\d+)\.conv\.", r"laterals.\1."),
    (r"^fpn_convs\.(\d+)\.conv\.", r"outputs.\1."),
    (r"^fpn_swins\.(\d+)\.swin_blocks\.blocks\.", r"outputs.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
UNUSED = re.compile(r"(^|\.)(conv_seg\..*|relative_position_index)$")  # in the published states, in no result


class Part(NamedTuple):
    """A neck or a head in words, and its state."""

    name: str
    kwargs: dict[str, Any]
    state: dict[str, Tensor]


def from_senformer(
    state: State,
    num_heads: int | None,
    neck_heads: int | None,
    window_size: int | None,
    num_layers: int,
    output_stride: int | None = None,
) -> SegmentationModel | Pyramid | SenFormerHead | nn.Sequential:
    """Model, neck, head, or the latter two in a row, of a state dict of https://github.com/WalBouss/SenFormer."""
    body = without_prefix(state, "backbone.")
    state = {key: value for key, value in state.items() if not (UNUSED.search(key) or key.startswith("backbone."))}
    neck, head = without_prefix(state, "neck."), without_prefix(state, "decode_head.")
    if not neck and not head:
        neck = {key: value for key, value in state.items() if key.startswith(("lateral_convs.", "fpn_"))}
        head = {key: value for key, value in state.items() if key.startswith("learners.")}
    if len(neck) + len(head) < len(state) or not state or (body and not (neck and head)):
        raise ValueError(
            "a senformer state has keys backbone.*, neck.* and decode_head.*, or the latter two, or those of one of "
            f"them (lateral_convs.*, learners.*); got {sorted(state)[:4]}{' and backbone.*' if body else ''}"
        )
    parts = [_neck(neck, neck_heads, window_size)] if neck else []
    parts += [_head(head, num_heads, num_layers)] if head else []
    if body:
        return _model(read_backbone(body, "senformer", output_stride or 32), *parts)
    built = [_built(part) for part in parts]
    return built[0] if len(built) == 1 else nn.Sequential(*built)


def _model(backbone: Backbone, neck: Part, head: Part) -> SegmentationModel:
    K = head.state["learners.0.class_embeddings"].shape[1]
    options = {key: value for key, value in neck.kwargs.items() if key != "in_channels"}
    model = build(backbone, "senformer", K, pyramid=neck.name, pyramid_kwargs=options, head_kwargs=head.kwargs)
    assert model.pyramid is not None
    load(model.pyramid, neck.state, "senformer")
    return load_model(model, backbone.state, head.state, "senformer")


def _built(part: Part) -> Pyramid | SenFormerHead:
    if part.name == "senformer":
        _, K, D = part.state["learners.0.class_embeddings"].shape
        levels = count(part.state, r"learners\.(\d+)\.class_embeddings$")
        return load(SenFormerHead([D] * levels, K, **part.kwargs), part.state, "senformer")
    return load(find_pyramid(part.name)(**part.kwargs), part.state, "senformer")


def _neck(state: State, num_heads: int | None, window_size: int | None) -> Part:
    state = rename(state, NECK)
    laterals = [state[f"laterals.{i}.weight"] for i in range(count(state, r"laterals\.(\d+)\."))]
    if not laterals:
        raise ValueError(f"a senformer neck has lateral_convs.*, which the state lacks; got {sorted(state)[:4]}")
    widths = {"in_channels": [weight.shape[1] for weight in laterals], "out_channels": laterals[0].shape[0]}
    table = state.get("outputs.0.0.attn.relative_position_bias_table")
    if table is None:
        return Part("fpn", widths, state)
    # ((2 window - 1)^2, heads): the shape tells both
    side = (round(table.shape[0] ** 0.5) + 1) // 2
    for name, given, found in (("neck_heads", num_heads, table.shape[1]), ("window_size", window_size, side)):
        if given not in (None, found):
            raise ValueError(f"{name} is {given}, but the state's position tables {tuple(table.shape)} say {found}")
    options = {
        "num_layers": count(state, r"outputs\.0\.(\d+)\."),
        "num_heads": table.shape[1],
        "window_size": side,
        "mlp_ratio": state["outputs.0.0.mlp.fc1.weight"].shape[0] / laterals[0].shape[0],
    }
    return Part("fpnt", {**widths, **options}, state)


def _head(state: State, num_heads: int | None, num_layers: int) -> Part:
    state = rename(state, HEAD)
    embeddings = state.get("learners.0.class_embeddings")
    blocks = count(state, r"learners\.0\.blocks\.(\d+)\.")
    if embeddings is None or embeddings.ndim != 3 or not blocks:
        raise ValueError(f"a senformer head has learners.*.queries (1, K, D) and blocks; got {sorted(state)[:4]}")
    D = embeddings.shape[2]
    if blocks > 1 and num_layers not in (1, blocks):
        raise ValueError(f"num_layers is {num_layers}, but the state has {blocks} blocks of their own in each learner")
    learner_kwargs: dict[str, Any] = {
        "num_layers": max(blocks, num_layers),
        "num_heads": num_heads,
        "shared_block": blocks == 1,
        "mlp_ratio": state["learners.0.blocks.0.mlp.fc1.weight"].shape[0] / D,
    }
    return Part("senformer", {"learner_kwargs": learner_kwargs}, state)
