"""Interchangeable semantic-segmentation heads that attach to any timm backbone."""

from segheads.backbones import TimmBackbone
from segheads.build import create_model
from segheads.convert import from_reference
from segheads.errors import PretrainedWeightsError
from segheads.heads import (
    HEADS,
    ClassAttentionHead,
    FCNHead,
    FeatureFusionHead,
    Head,
    LinearHead,
    MaskTransformerHead,
    MeanShiftHead,
    SenFormerHead,
    SenUPer,
    SmpHead,
    UPerHead,
    list_heads,
)
from segheads.mean_shift import MeanShift
from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.object_size import ObjectSizeIoU
from segheads.model import SegmentationModel
from segheads.predictor import Prediction, Predictor
from segheads.pyramids import FPN, FPNT, SimplePyramid
from segheads.version import VERSION

__version__ = VERSION

__all__ = [
    "FPN",
    "FPNT",
    "HEADS",
    "BoundaryIoU",
    "ClassAttentionHead",
    "FCNHead",
    "FeatureFusionHead",
    "Head",
    "LinearHead",
    "MaskTransformerHead",
    "MeanShift",
    "MeanShiftHead",
    "ObjectSizeIoU",
    "Prediction",
    "Predictor",
    "PretrainedWeightsError",
    "SegmentationMetrics",
    "SegmentationModel",
    "SenFormerHead",
    "SenUPer",
    "SimplePyramid",
    "SmpHead",
    "TimmBackbone",
    "UPerHead",
    "create_model",
    "from_reference",
    "list_heads",
]
