"""Turns the state dict of a published implementation into a head or a model."""

import re
from typing import Any

from torch import Tensor, nn

from segheads.build import create_model
from segheads.convert.mmseg import from_mmseg, is_decoder
from segheads.convert.senformer import from_senformer
from segheads.convert.states import State, load, rename, without_prefix
from segheads.heads import Head, LinearHead, MaskTransformerHead, MeanShiftHead
from segheads.heads.mask_transformer import default_num_heads
from segheads.model import SegmentationModel
from segheads.pyramids import Pyramid
from segheads.states import plain_state

# Regular expressions from the names of the published code to ours, applied in turn.
BLOCKS_OF_MMSEG = [
    (r"^layers\.", "blocks."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
]
VIT_OF_MMSEG = [(r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^ln1\.", "norm."), *BLOCKS_OF_MMSEG]
MASK_HEAD = [
    (r"^cls_emb$", "class_embeddings"),
    (r"^(proj_dec|dec_proj)\.", "project."),
    (r"^decoder_norm\.", "norm."),
    (r"^(proj_patch$|patch_proj\.weight$)", "project_patches.weight"),
    (r"^(proj_classes$|classes_proj\.weight$)", "project_classes.weight"),
    *BLOCKS_OF_MMSEG,
]
PREFIXES = {  # source: prefix of the backbone, prefix of the head
    "segmenter": ("encoder.", "decoder."),
    "mmseg": ("backbone.", "decode_head."),
    "mmseg_segmenter": ("backbone.", "decode_head."),
    "meanshifter": ("backbone.", "decode_head."),
}
UNUSED = re.compile(r"^(encoder\.head(_dist)?|auxiliary_head)\.")  # in the published states, in no result


def from_reference(
    state: State,
    source: str,
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    img_size: tuple[int, int] | None = None,
    num_layers: int = 1,
    neck_heads: int | None = None,
    window_size: int | None = None,
    output_stride: int | None = None,
) -> SegmentationModel | Head | Pyramid | nn.Sequential:
    """Turn a state dict of a published implementation into a model, or into a head where it holds no backbone.

    What shapes tell is inferred: widths, depths, patch size, class count, linear or mask decoder, distillation token.
    A `"meanshifter"` state without `q.*` is a `LinearHead`. A model behaves as its source does: layer-norm eps,
    resizing of the position embeddings, padding (`stretch_logits`) and loss reduction. Two things are right rather than
    equal: for a grid of another shape but equal token count the published code adds the position embeddings unresized,
    in row-major order of the wrong grid; here they are resized. And images whose sides are no multiple of the coarsest
    stride are padded before a ResNet, Swin or ConvNeXt, not between its stages, which shows in the last cells.

    An `"mmseg"` state holds Segmenter, or UPerNet or FCN on a ResNet, Swin or ConvNeXt. What no shape tells is taken as
    published: `num_layers`, `output_stride`, and undilated convolutions in FCN's head (not so in `fcn_d6_*`).

    A `"senformer"` state gives a model on its ResNet or Swin; its neck (`FPN` or `FPNT`) or its head (`SenFormerHead`)
    where it holds only that; or where it holds `neck.*` and `decode_head.*` both in an `nn.Sequential`; these are
    called with the list of levels. The head's result is the logarithm of the mean of the learners' probabilities, where
    the published code gives their sum. Auxiliary heads are left out.

    Args:
        state: The state dict, or a checkpoint that holds it under `state_dict` (MMSegmentation), `model` (Segmenter) or
            `ema`; what DDP and torch.compile put before its names is taken off.
        source: `"segmenter"` (https://github.com/rstrudel/segmenter), `"mmseg"` (MMSegmentation; `"mmseg_segmenter"`
            means the same), `"meanshifter"` (its author's fork of MMSegmentation 0.29) or `"senformer"`
            (https://github.com/WalBouss/SenFormer).
        num_heads: Attention heads of the backbone, and of a mask decoder; None means width // 64. Of SenFormer's
            learners; None means 8.
        decoder_num_heads: Attention heads of a mask decoder where they differ from the backbone's.
        img_size: Height and width in pixels of the position embeddings' grid; needed where it is not square.
        num_layers: How often the mean shift runs (L_ms), or a SenFormer learner's one shared block, which no shape
            tells.
        neck_heads: Attention heads of SenFormer's neck, for checking: its position tables tell them.
        window_size: Window of SenFormer's neck, for checking likewise.
        output_stride: Pixels per cell of the last map of a ResNet, which dilation decides and no shape tells; None
            means 8 for FCN, 32 for others, as published.

    Raises:
        ValueError: If `source` is unknown, the state is of another kind or contradicts an argument, or `num_heads` or
            `img_size` is needed.

    Examples:
        >>> import torch
        >>> state = {"q.weight": torch.eye(8), "q.bias": torch.zeros(8)}
        >>> state |= {"conv_seg.weight": torch.randn(3, 8, 1, 1), "conv_seg.bias": torch.zeros(3)}
        >>> from_reference(state, source="meanshifter", num_layers=2).shift
        MeanShift(
          kernel=dot, bandwidth=1.682, blurring=True, step=1, num_layers=2
          (projection): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    if source not in (*PREFIXES, "senformer"):
        raise ValueError(f"source must be one of {', '.join(PREFIXES)}, senformer; got {source!r}")
    state = plain_state(state)
    state = {key: value for key, value in state.items() if not UNUSED.match(key)}
    if source == "senformer":
        return from_senformer(state, num_heads, neck_heads, window_size, num_layers, output_stride)
    backbone_prefix, head_prefix = PREFIXES[source]
    backbone = without_prefix(state, backbone_prefix)
    head_state = without_prefix(state, head_prefix)
    others = [key for key in state if not key.startswith((backbone_prefix, head_prefix))]
    if not backbone and not head_state:
        head_state, others = state, []
    if backbone and not others and source.startswith("mmseg") and is_decoder(head_state):
        return from_mmseg(state, source, output_stride)
    if others or not head_state:
        raise ValueError(f"a {source} state has keys {backbone_prefix}* and {head_prefix}*; got {sorted(state)[:4]}")
    heads = decoder_num_heads or num_heads
    name, head_kwargs, head_state = _read_head(head_state, source, heads, num_layers)
    if not backbone:
        return load(_build_head(name, head_state, head_kwargs), head_state, source)
    backbone_kwargs = _read_vit(backbone, source, num_heads, img_size)
    model = create_model(
        "deit_tiny_distilled_patch16_224" if "dist_token" in backbone else "vit_tiny_patch16_224",
        name,
        _num_classes(head_state),
        pretrained=False,
        backbone_kwargs=backbone_kwargs,
        head_kwargs=head_kwargs,
        loss_reduction="valid" if source == "segmenter" else "all",
        stretch_logits=source != "segmenter",
    )
    names = [] if source == "segmenter" else VIT_OF_MMSEG
    load(model.backbone.model, rename(backbone, names), source)
    load(model.head, head_state, source)
    return model


def _read_head(
    state: State, source: str, num_heads: int | None, num_layers: int
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and state of the head."""
    if "cls_emb" in state:
        converted = rename(state, MASK_HEAD)
        if source == "segmenter":  # patches @ P there, a Linear's x @ Wᵀ here
            for key in ("project_patches.weight", "project_classes.weight"):
                converted[key] = converted[key].T.contiguous()
        D = converted["project.weight"].shape[0]
        kwargs = {
            "embed_dim": D,
            "num_layers": _depth(converted),
            "num_heads": num_heads or _num_heads(D, "mask decoder"),
            "mlp_ratio": converted["blocks.0.mlp.fc1.weight"].shape[0] / D,
        }
        return "mask_transformer", kwargs, converted
    weight, bias = ("head.weight", "head.bias") if source == "segmenter" else ("conv_seg.weight", "conv_seg.bias")
    if weight not in state or bias not in state:
        raise ValueError(f"a {source} head has {weight} or cls_emb; got {sorted(state)[:4]}")
    linear = {"classifier.weight": state[weight].flatten(1), "classifier.bias": state[bias]}  # (K, C, 1, 1) -> (K, C)
    rest = {key: value for key, value in state.items() if key not in (weight, bias)}
    if source != "meanshifter" or not rest:
        return "linear", {}, linear | rest
    shift = rename(rest, [(r"^q\.", "shift.projection.")])
    kwargs = {"shift_channels": rest["q.weight"].shape[0], "num_layers": num_layers} if "q.weight" in rest else {}
    return "mean_shift", kwargs, {f"decoder.{key}": value for key, value in linear.items()} | shift


def _build_head(name: str, state: State, kwargs: dict[str, Any]) -> Head:
    if name == "mask_transformer":
        return MaskTransformerHead(state["project.weight"].shape[1], _num_classes(state), **kwargs)
    if name == "mean_shift":
        return MeanShiftHead(state["decoder.classifier.weight"].shape[1], _num_classes(state), **kwargs)
    return LinearHead(state["classifier.weight"].shape[1], _num_classes(state))


def _read_vit(state: State, source: str, num_heads: int | None, img_size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of TimmBackbone that give the state's vision transformer."""
    official = source == "segmenter"
    patches = state["patch_embed.proj.weight" if official else "patch_embed.projection.weight"]
    D, patch_size = patches.shape[0], patches.shape[-1]
    tokens = state["pos_embed"].shape[1] - sum(token in state for token in ("cls_token", "dist_token"))
    if img_size is None:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"position embeddings for {tokens} patches have no square grid; give img_size=(H, W)")
        img_size = (side * patch_size, side * patch_size)
    if (img_size[0] // patch_size) * (img_size[1] // patch_size) != tokens:
        raise ValueError(f"img_size {img_size} with patch size {patch_size} does not make the state's {tokens} patches")
    hidden = state["blocks.0.mlp.fc1.weight" if official else "layers.0.ffn.layers.0.0.weight"].shape[0]
    return {
        "in_chans": patches.shape[1],
        "img_size": tuple(img_size),
        "norm_eps": 1e-5 if official else 1e-6,
        "pos_embed_resize": "bilinear" if official else "bicubic",
        "model_kwargs": {
            "patch_size": patch_size,
            "embed_dim": D,
            "depth": _depth(state),
            "num_heads": num_heads or _num_heads(D, "backbone"),
            "mlp_ratio": hidden / D,
        },
    }


def _depth(state: State) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(r"(?:blocks|layers)\.(\d+)\.", key)))


def _num_classes(state: State) -> int:
    for key in ("mask_norm.weight", "classifier.weight", "decoder.classifier.weight"):
        if key in state:
            return state[key].shape[0]
    raise ValueError(f"the head's state tells no number of classes; got {sorted(state)[:4]}")


def _num_heads(width: int, what: str) -> int:
    if width < 64:
        raise ValueError(f"a {what} of width {width} does not tell its attention heads; give num_heads")
    return default_num_heads(width)
