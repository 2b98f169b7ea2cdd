"""Evaluation of a model on a data set, and what it leaves behind: scores, tables, pictures, costs."""

from segheads.evaluation.complexity import count_multiply_adds, count_parameters
from segheads.evaluation.evaluate import evaluate, image_scores, predict
from segheads.evaluation.report import evaluation_markdown, worst_images, write_evaluation, write_images

__all__ = [
    "count_multiply_adds",
    "count_parameters",
    "evaluate",
    "evaluation_markdown",
    "image_scores",
    "predict",
    "worst_images",
    "write_evaluation",
    "write_images",
]
