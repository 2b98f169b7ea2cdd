"""Evaluation of many heads on one frozen backbone."""

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from segheads.data.samples import EvaluationSamples
from segheads.evaluation.evaluate import evaluate_each
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.model import SegmentationModel
from segheads.probing.backbone import SharedBackbone
from segheads.probing.probes import Probe


def evaluate_probes(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    metrics: Sequence[str] = ("iou",),
    batch_size: int = 8,
    limit: int | None = None,
    workers: int = 0,
) -> list[dict[str, Tensor]]:
    """What `evaluate` gives of each head, in one pass: the backbone sees each image, or each of its windows, once.

    Args:
        accelerator: Tells the process, the device and the precision.
        shared: The backbone whose views the heads have.
        probes: The heads; their mode is restored afterwards.
        samples: What to evaluate on.
        protocol: How the heads are shown each image.
        metrics: What to measure, by the names of `segheads.metrics.METRICS`.
        batch_size: Windows in one call of the backbone.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.

    Returns:
        The results of each head in turn; nothing of one that has diverged.
    """

    def in_turn(models: Sequence[SegmentationModel]) -> Iterator[SegmentationModel]:
        shared.forget()
        for model in models:
            shared.rewind()
            yield model
        shared.forget()

    models = [probe.model for probe in probes if probe.diverged_at is None]
    options: dict[str, Any] = {"metrics": metrics, "batch_size": batch_size, "limit": limit, "workers": workers}
    found = iter(evaluate_each(accelerator, models, samples, protocol, in_turn=in_turn, **options))
    return [next(found) if probe.diverged_at is None else {} for probe in probes]
