"""What recipes share: configuration, optimizer and schedule, loop, checkpoints, evaluation, report."""

from segheads.training.complexity import count_multiply_adds, count_parameters
from segheads.training.config import DEMO_RUN, MAY_DIFFER, TrainingConfig
from segheads.training.evaluation import EvaluationSamples, evaluate, predict
from segheads.training.loop import train, train_step, training_batches
from segheads.training.recipe import load_data, run_training
from segheads.training.report import (
    plot_curves,
    plot_predictions,
    plot_reliability,
    plot_uncertainty,
    scores,
    write_report,
)
from segheads.training.run_folder import RunFolder
from segheads.training.schedule import create_optimizer, poly_learning_rate, set_learning_rate

__all__ = [
    "DEMO_RUN",
    "MAY_DIFFER",
    "EvaluationSamples",
    "RunFolder",
    "TrainingConfig",
    "count_multiply_adds",
    "count_parameters",
    "create_optimizer",
    "evaluate",
    "load_data",
    "plot_curves",
    "plot_predictions",
    "plot_reliability",
    "plot_uncertainty",
    "poly_learning_rate",
    "predict",
    "run_training",
    "scores",
    "set_learning_rate",
    "train",
    "train_step",
    "training_batches",
    "write_report",
]
