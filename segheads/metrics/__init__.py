"""Metrics over a whole data set, counted before any division."""

from segheads.metrics.base import SegmentationMetric
from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.calibration import CalibrationError
from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.f1 import F1Score
from segheads.metrics.images import image_scores
from segheads.metrics.object_size import ObjectSizeIoU
from segheads.metrics.registry import METRICS, find_metric

METRICS |= {
    "iou": SegmentationMetrics,
    "f1": F1Score,
    "object_sizes": ObjectSizeIoU,
    "boundary": BoundaryIoU,
    "calibration": CalibrationError,
}

__all__ = [
    "METRICS",
    "BoundaryIoU",
    "CalibrationError",
    "F1Score",
    "ObjectSizeIoU",
    "SegmentationMetric",
    "SegmentationMetrics",
    "find_metric",
    "image_scores",
]
