"""Evaluation of models on a data set, and what it leaves behind: scores, tables, pictures, costs."""

from segheads.evaluation.complexity import count_multiply_adds, count_parameters
from segheads.evaluation.evaluate import evaluate, evaluate_each, predict
from segheads.evaluation.plots import plot_predictions, plot_reliability, plot_uncertainty, plot_worst
from segheads.evaluation.report import (
    absent_classes,
    evaluation_markdown,
    per_class_markdown,
    scores,
    worst_images,
    write_evaluation,
    write_images,
    write_results,
)

__all__ = [
    "absent_classes",
    "count_multiply_adds",
    "count_parameters",
    "evaluate",
    "evaluate_each",
    "evaluation_markdown",
    "per_class_markdown",
    "plot_predictions",
    "plot_reliability",
    "plot_uncertainty",
    "plot_worst",
    "predict",
    "scores",
    "worst_images",
    "write_evaluation",
    "write_images",
    "write_results",
]
