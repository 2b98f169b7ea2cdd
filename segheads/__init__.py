"""Interchangeable semantic-segmentation heads that attach to any timm backbone."""

from segheads.backbones import TimmBackbone
from segheads.convert import from_reference
from segheads.heads import (
    HEADS,
    Head,
    LinearHead,
    MaskTransformerHead,
    MeanShift,
    MeanShiftHead,
    list_heads,
)
from segheads.metrics import SegmentationMetrics
from segheads.model import SegmentationModel, create_model
from segheads.pretrained import PretrainedWeightsError

__version__ = "0.1.0"

__all__ = [
    "HEADS",
    "Head",
    "LinearHead",
    "MaskTransformerHead",
    "MeanShift",
    "MeanShiftHead",
    "PretrainedWeightsError",
    "SegmentationMetrics",
    "SegmentationModel",
    "TimmBackbone",
    "create_model",
    "from_reference",
    "list_heads",
]
