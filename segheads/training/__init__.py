"""What recipes share: configuration, optimizer and schedule, loop, checkpoints, report."""

from segheads.training.batches import training_batches
from segheads.training.config import DEMO_RUN, MAY_DIFFER, LoopConfig, ModelConfig, TrainingConfig, changed, flat
from segheads.training.keeping import KeepingConfig
from segheads.training.loop import Learner, ModelLearner, train, train_step, update_shares
from segheads.training.machine import MachineConfig
from segheads.training.optimization import (
    OptimizationConfig,
    create_optimizer,
    poly_learning_rate,
    set_learning_rate,
)
from segheads.training.report import plot_curves, write_report
from segheads.training.run import run_training
from segheads.training.run_folder import RunFolder
from segheads.training.setup import Run, open_run

__all__ = [
    "DEMO_RUN",
    "MAY_DIFFER",
    "KeepingConfig",
    "Learner",
    "LoopConfig",
    "MachineConfig",
    "ModelConfig",
    "ModelLearner",
    "OptimizationConfig",
    "Run",
    "RunFolder",
    "TrainingConfig",
    "changed",
    "create_optimizer",
    "flat",
    "open_run",
    "plot_curves",
    "poly_learning_rate",
    "run_training",
    "set_learning_rate",
    "train",
    "train_step",
    "training_batches",
    "update_shares",
    "write_report",
]
