"""Many heads at once on one frozen backbone."""

from segheads.probing.features import (
    CachedSamples,
    FeatureCache,
    RoundSampler,
    as_it_is,
    fingerprint_data,
    fingerprint_module,
)
from segheads.probing.learner import evaluate_probes, feature_batches, probe_step, train_probes
from segheads.probing.probes import Probe, SharedBackbone, build_probes, join_head, save_probes
from segheads.probing.report import plot_probes, probe_markdown, probe_rows, write_probe_report

__all__ = [
    "CachedSamples",
    "FeatureCache",
    "Probe",
    "RoundSampler",
    "SharedBackbone",
    "as_it_is",
    "build_probes",
    "evaluate_probes",
    "feature_batches",
    "fingerprint_data",
    "fingerprint_module",
    "join_head",
    "plot_probes",
    "probe_markdown",
    "probe_rows",
    "probe_step",
    "save_probes",
    "train_probes",
    "write_probe_report",
]
