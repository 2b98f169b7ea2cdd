"""Metrics over a whole data set, counted before any division."""

from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.calibration import CalibrationError
from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.object_size import ObjectSizeIoU

__all__ = ["BoundaryIoU", "CalibrationError", "ObjectSizeIoU", "SegmentationMetrics"]
