"""Heads: feature maps in, class logits out."""

from segheads.heads.base import Criterion, Head
from segheads.heads.class_attention import ClassAttentionHead
from segheads.heads.fcn import FCNHead
from segheads.heads.feature_fusion import FeatureFusionHead
from segheads.heads.linear import LinearHead
from segheads.heads.mask_transformer import MaskTransformerHead
from segheads.heads.mean_shift import MeanShiftHead
from segheads.heads.registry import DECODERS, HEADS, find_head, list_heads
from segheads.heads.senformer import SenFormerHead
from segheads.heads.smp import SmpHead, smp_entries
from segheads.heads.uper import SenUPer, UPerHead

HEADS |= {
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
DECODERS |= smp_entries()

__all__ = [
    "HEADS",
    "ClassAttentionHead",
    "Criterion",
    "FCNHead",
    "FeatureFusionHead",
    "Head",
    "LinearHead",
    "MaskTransformerHead",
    "MeanShiftHead",
    "SenFormerHead",
    "SenUPer",
    "SmpHead",
    "UPerHead",
    "find_head",
    "list_heads",
]
