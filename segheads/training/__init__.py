"""What recipes share: optimizer and schedule, loop, checkpoints, evaluation, report."""

from segheads.training.evaluation import EvaluationSamples, evaluate, predict
from segheads.training.loop import train, train_step, training_batches
from segheads.training.report import plot_curves, plot_predictions, scores, write_report
from segheads.training.run_folder import RunFolder
from segheads.training.schedule import create_optimizer, poly_learning_rate, set_learning_rate

__all__ = [
    "EvaluationSamples",
    "RunFolder",
    "create_optimizer",
    "evaluate",
    "plot_curves",
    "plot_predictions",
    "poly_learning_rate",
    "predict",
    "scores",
    "set_learning_rate",
    "train",
    "train_step",
    "training_batches",
    "write_report",
]
