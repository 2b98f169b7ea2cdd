"""What recipes share: configuration, optimizer and schedule, loop, checkpoints, evaluation, report."""

from segheads.training.complexity import count_multiply_adds, count_parameters
from segheads.training.config import DEMO_RUN, MAY_DIFFER, TrainingConfig
from segheads.training.evaluation import EvaluationSamples, evaluate, image_scores, predict
from segheads.training.evaluation_report import evaluation_markdown, worst_images, write_evaluation, write_images
from segheads.training.feature_cache import (
    CachedSamples,
    FeatureCache,
    RoundSampler,
    as_it_is,
    fingerprint_data,
    fingerprint_module,
)
from segheads.training.grid import Column, GridConfig, Row, Table, axis, run_grid
from segheads.training.head_choice import HeadChoice, parse_head
from segheads.training.loop import train, train_step, training_batches
from segheads.training.probe import Probe, SharedBackbone, build_probes, join_head, save_probes
from segheads.training.probe_loop import evaluate_probes, feature_batches, probe_step, train_probes
from segheads.training.probe_report import plot_probes, probe_markdown, probe_rows, write_probe_report
from segheads.training.recipe import load_data, run_training
from segheads.training.report import (
    plot_curves,
    plot_predictions,
    plot_reliability,
    plot_uncertainty,
    plot_worst,
    scores,
    write_report,
    write_results,
)
from segheads.training.run_folder import RunFolder
from segheads.training.schedule import create_optimizer, poly_learning_rate, set_learning_rate

__all__ = [
    "DEMO_RUN",
    "MAY_DIFFER",
    "CachedSamples",
    "Column",
    "EvaluationSamples",
    "FeatureCache",
    "GridConfig",
    "HeadChoice",
    "Probe",
    "RoundSampler",
    "Row",
    "RunFolder",
    "SharedBackbone",
    "Table",
    "TrainingConfig",
    "as_it_is",
    "axis",
    "build_probes",
    "count_multiply_adds",
    "count_parameters",
    "create_optimizer",
    "evaluate",
    "evaluate_probes",
    "evaluation_markdown",
    "feature_batches",
    "fingerprint_data",
    "fingerprint_module",
    "image_scores",
    "join_head",
    "load_data",
    "parse_head",
    "plot_curves",
    "plot_predictions",
    "plot_probes",
    "plot_reliability",
    "plot_uncertainty",
    "plot_worst",
    "poly_learning_rate",
    "predict",
    "probe_markdown",
    "probe_rows",
    "probe_step",
    "run_grid",
    "run_training",
    "save_probes",
    "scores",
    "set_learning_rate",
    "train",
    "train_probes",
    "train_step",
    "training_batches",
    "worst_images",
    "write_evaluation",
    "write_images",
    "write_probe_report",
    "write_report",
    "write_results",
]
