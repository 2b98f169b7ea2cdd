"""Evaluation of many heads on one frozen backbone."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from segheads.data.samples import EvaluationSamples
from segheads.evaluation.evaluate import predict
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.metrics.confusion import SegmentationMetrics
from segheads.modules import evaluating
from segheads.probing.backbone import SharedBackbone
from segheads.probing.probes import Probe


def evaluate_probes(
    accelerator: Accelerator,
    shared: SharedBackbone,
    probes: Sequence[Probe],
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
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
        batch_size: Windows in one call of the backbone.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    loader = DataLoader(
        Subset(samples, range(accelerator.process_index, count, accelerator.num_processes)),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else it draws from the random state of the run
        pin_memory=accelerator.device.type == "cuda",
    )
    ignore_index = samples.dataset.ignore_index
    metrics = [
        SegmentationMetrics(probe.model.num_classes, ignore_index=ignore_index).to(accelerator.device)
        for probe in probes
    ]
    with evaluating(*(probe.model for probe in probes)):
        for image, labels in tqdm(loader, desc="evaluate", leave=False, disable=not accelerator.is_main_process):
            image, labels = (x.to(accelerator.device, non_blocking=True) for x in (image, labels))
            shared.forget()
            for probe, metric in zip(probes, metrics, strict=True):
                shared.rewind()
                prediction = predict(accelerator, probe.model, image, labels.shape, protocol, batch_size=batch_size)
                metric.update(prediction, labels)
    shared.forget()
    return [metric.compute() for metric in metrics]
