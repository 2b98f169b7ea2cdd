"""Looking inside trained models: functions that return data, and for each one that draws it."""

from segheads.analysis.attention import AttendedDistance, AttentionMap, attended_distance, encoder_attention
from segheads.analysis.attention_plots import plot_attended_distance, plot_attention
from segheads.analysis.calls import AttentionCall, attention_calls
from segheads.analysis.disagreement import OUTCOMES, Disagreement, compare_labels
from segheads.analysis.disagreement_plots import plot_disagreement
from segheads.analysis.embeddings import Projection, class_embeddings, cosine_similarity, project
from segheads.analysis.embeddings_plots import plot_projection, plot_similarity
from segheads.analysis.heads import class_attention, head_attention
from segheads.analysis.mean_shift import (
    Affinity,
    LabelsByShift,
    Trajectory,
    labels_by_shift,
    shift_affinity,
    shift_trajectories,
)
from segheads.analysis.mean_shift_plots import plot_affinity, plot_labels_by_shift, plot_trajectory

__all__ = [
    "OUTCOMES",
    "Affinity",
    "AttendedDistance",
    "AttentionCall",
    "AttentionMap",
    "Disagreement",
    "LabelsByShift",
    "Projection",
    "Trajectory",
    "attended_distance",
    "attention_calls",
    "class_attention",
    "class_embeddings",
    "compare_labels",
    "cosine_similarity",
    "encoder_attention",
    "head_attention",
    "labels_by_shift",
    "plot_affinity",
    "plot_attended_distance",
    "plot_attention",
    "plot_disagreement",
    "plot_labels_by_shift",
    "plot_projection",
    "plot_similarity",
    "plot_trajectory",
    "project",
    "shift_affinity",
    "shift_trajectories",
]
