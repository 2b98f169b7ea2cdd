"""What recipes share: configuration, optimizer and schedule, loop, checkpoints, report."""

from segheads.training.config import DEMO_RUN, MAY_DIFFER, TrainingConfig
from segheads.training.loop import train, train_step, training_batches
from segheads.training.optimization import create_optimizer, poly_learning_rate, set_learning_rate
from segheads.training.report import plot_curves, write_report
from segheads.training.run import load_data, run_training
from segheads.training.run_folder import RunFolder

__all__ = [
    "DEMO_RUN",
    "MAY_DIFFER",
    "RunFolder",
    "TrainingConfig",
    "create_optimizer",
    "load_data",
    "plot_curves",
    "poly_learning_rate",
    "run_training",
    "set_learning_rate",
    "train",
    "train_step",
    "training_batches",
    "write_report",
]
