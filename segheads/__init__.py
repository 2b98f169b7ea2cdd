"""Interchangeable semantic-segmentation heads that attach to any timm backbone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from segheads.model import SegmentationModel
from segheads.predictor import Prediction, Predictor
from segheads.pyramids import FPN, FPNT, SimplePyramid
from segheads.version import VERSION

if TYPE_CHECKING:
    from segheads.metrics import BoundaryIoU, ObjectSizeIoU, SegmentationMetrics

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


def __getattr__(name: str) -> Any:
    """Metrics when they are asked for: torchmetrics loads matplotlib, which a model can do without."""
    if name in ("BoundaryIoU", "ObjectSizeIoU", "SegmentationMetrics"):
        return getattr(import_module("segheads.metrics"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
