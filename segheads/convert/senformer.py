"""SenFormer's published states: neck, head, or both."""

import re
from typing import Any

from torch import nn

from segheads.convert.states import State, load, rename, without_prefix
from segheads.heads import SenFormerHead
from segheads.pyramids import FPN, FPNT, Pyramid

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


def from_senformer(
    state: State, num_heads: int | None, neck_heads: int | None, window_size: int | None, num_layers: int
) -> Pyramid | SenFormerHead | nn.Sequential:
    """The neck, the head, or both in a row, of a state dict of https://github.com/WalBouss/SenFormer."""
    state = {key: value for key, value in state.items() if not UNUSED.search(key)}
    neck, head = without_prefix(state, "neck."), without_prefix(state, "decode_head.")
    if not neck and not head:
        neck = {key: value for key, value in state.items() if key.startswith(("lateral_convs.", "fpn_"))}
        head = {key: value for key, value in state.items() if key.startswith("learners.")}
    if len(neck) + len(head) < len(state) or not state:
        raise ValueError(
            "a senformer state has keys neck.* and decode_head.*, or those of one of the two (lateral_convs.*, "
            f"learners.*), and the backbone's must be left out; got {sorted(state)[:4]}"
        )
    if not head:
        return _neck(neck, neck_heads, window_size)
    if not neck:
        return _head(head, num_heads, num_layers)
    return nn.Sequential(_neck(neck, neck_heads, window_size), _head(head, num_heads, num_layers))


def _neck(state: State, num_heads: int | None, window_size: int | None) -> Pyramid:
    state = rename(state, NECK)
    laterals = [state[f"laterals.{i}.weight"] for i in range(_count(state, r"laterals\.(\d+)\."))]
    if not laterals:
        raise ValueError(f"a senformer neck has lateral_convs.*, which the state lacks; got {sorted(state)[:4]}")
    channels, out_channels = [weight.shape[1] for weight in laterals], laterals[0].shape[0]
    table = state.get("outputs.0.0.attn.relative_position_bias_table")
    if table is None:
        return load(FPN(channels, out_channels), state, "senformer")
    # ((2 window - 1)^2, heads): the shape tells both
    side = (round(table.shape[0] ** 0.5) + 1) // 2
    for name, given, found in (("neck_heads", num_heads, table.shape[1]), ("window_size", window_size, side)):
        if given not in (None, found):
            raise ValueError(f"{name} is {given}, but the state's position tables {tuple(table.shape)} say {found}")
    neck = FPNT(
        channels,
        out_channels,
        num_layers=_count(state, r"outputs\.0\.(\d+)\."),
        num_heads=table.shape[1],
        window_size=side,
        mlp_ratio=state["outputs.0.0.mlp.fc1.weight"].shape[0] / out_channels,
    )
    return load(neck, state, "senformer")


def _head(state: State, num_heads: int | None, num_layers: int) -> SenFormerHead:
    state = rename(state, HEAD)
    embeddings = [
        state[f"learners.{i}.class_embeddings"] for i in range(_count(state, r"learners\.(\d+)\.class_embeddings$"))
    ]
    if not embeddings:
        raise ValueError(f"a senformer head has learners.*.queries; got {sorted(state)[:4]}")
    _, K, D = embeddings[0].shape
    blocks = _count(state, r"learners\.0\.blocks\.(\d+)\.")
    if blocks > 1 and num_layers not in (1, blocks):
        raise ValueError(f"num_layers is {num_layers}, but the state has {blocks} blocks of their own in each learner")
    learner_kwargs: dict[str, Any] = {
        "num_layers": max(blocks, num_layers),
        "num_heads": num_heads,
        "shared_block": blocks == 1,
        "mlp_ratio": state["learners.0.blocks.0.mlp.fc1.weight"].shape[0] / D,
    }
    return load(SenFormerHead([D] * len(embeddings), K, learner_kwargs=learner_kwargs), state, "senformer")


def _count(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)
