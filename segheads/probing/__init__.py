"""Many heads at once on one frozen backbone."""

from segheads.probing.backbone import SharedBackbone
from segheads.probing.config import PROBES_MAY_DIFFER, ProbeConfig
from segheads.probing.evaluate import evaluate_probes
from segheads.probing.features import (
    CachedSamples,
    FeatureCache,
    RoundSampler,
    as_it_is,
    fingerprint_data,
    fingerprint_module,
)
from segheads.probing.learner import ProbeLearner, feature_batches, probe_step
from segheads.probing.probes import Probe, build_probes
from segheads.probing.report import plot_probes, probe_markdown, probe_rows, write_probe_report
from segheads.probing.run import run_probing
from segheads.probing.saving import join_head, save_probes

__all__ = [
    "PROBES_MAY_DIFFER",
    "CachedSamples",
    "FeatureCache",
    "Probe",
    "ProbeConfig",
    "ProbeLearner",
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
    "run_probing",
    "save_probes",
    "write_probe_report",
]
