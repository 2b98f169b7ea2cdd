"""Predict one image: whole or in sliding windows, at one or several scales, with or without its mirror image."""

from segheads.inference.predict import (
    Maps,
    average_views,
    predict_labels,
    predict_maps,
    predict_probabilities,
    predict_uncertainty,
    predict_with_confidence,
)
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.inference.windows import sliding_window_logits

__all__ = [
    "WHOLE",
    "InferenceProtocol",
    "Maps",
    "average_views",
    "predict_labels",
    "predict_maps",
    "predict_probabilities",
    "predict_uncertainty",
    "predict_with_confidence",
    "sliding_window_logits",
]
