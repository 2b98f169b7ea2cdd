"""Heads: feature maps in, class logits out."""

import difflib
from typing import Any

from segheads.heads.base import Head
from segheads.heads.class_attention import ClassAttentionHead
from segheads.heads.fcn import FCNHead
from segheads.heads.feature_fusion import FeatureFusionHead
from segheads.heads.linear import LinearHead
from segheads.heads.mask_transformer import MaskTransformerHead
from segheads.heads.mean_shift import MeanShiftHead
from segheads.heads.senformer import SenFormerHead
from segheads.heads.smp import SmpHead, find_smp_head, smp_decoders
from segheads.heads.uper import SenUPer, UPerHead
from segheads.mean_shift import MeanShift

__all__ = [
    "HEADS",
    "ClassAttentionHead",
    "FCNHead",
    "FeatureFusionHead",
    "Head",
    "LinearHead",
    "MaskTransformerHead",
    "MeanShift",
    "MeanShiftHead",
    "SenFormerHead",
    "SenUPer",
    "SmpHead",
    "UPerHead",
    "find_head",
    "list_heads",
]

HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "mask_transformer": MaskTransformerHead,
    "mean_shift": MeanShiftHead,
    "class_attention": ClassAttentionHead,
    "senformer": SenFormerHead,
    "feature_fusion": FeatureFusionHead,
    "uper": UPerHead,
    "sen_uper": SenUPer,
    "fcn": FCNHead,
}


def list_heads() -> list[str]:
    """Names that `create_model` and the recipes' `--head` accept.

    Those that start with `smp:` are the decoders of segmentation-models-pytorch.

    Examples:
        >>> list_heads()[:3], list_heads()[-1]
        (['linear', 'mask_transformer', 'mean_shift'], 'smp:dpt')
    """
    return [*HEADS, *(f"smp:{decoder}" for decoder in smp_decoders())]


def find_head(name: str) -> Any:
    """What builds a head: `find_head(name)(in_channels, num_classes, **options)`.

    Returns:
        The registered class, or for `smp:*` a function; either has the class attributes of `Head`, such as
        `multi_level`.

    Raises:
        ValueError: If no head has that name; the message lists the known ones.
    """
    if name.startswith("smp:"):
        return find_smp_head(name.removeprefix("smp:"))
    if name not in HEADS:
        close = difflib.get_close_matches(name, list_heads(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no head is called {name!r}; known: {', '.join(list_heads())}{hint}")
    return HEADS[name]
