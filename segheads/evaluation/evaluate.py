"""Evaluation of a model on a data set, as the papers do."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics import Metric
from tqdm.auto import tqdm

from segheads.data.samples import EvaluationSamples
from segheads.functional.uncertainty import Uncertainty
from segheads.inference.predict import predict_labels, predict_with_confidence
from segheads.inference.predict import predict_uncertainty as uncertainty_of
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.calibration import CalibrationError
from segheads.metrics.confusion import SegmentationMetrics
from segheads.metrics.object_size import ObjectSizeIoU
from segheads.model import SegmentationModel
from segheads.modules import evaluating

T = TypeVar("T")


def evaluate(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    workers: int = 0,
    calibration: bool = False,
    object_sizes: bool = False,
    boundary: bool = False,
    per_image: bool = False,
) -> dict[str, Tensor]:
    """aAcc, mAcc, mIoU and per-class values, each label map at its own size; on demand more.

    Every process takes its share of the images, none twice, and counts are summed, so that the result does not depend
    on the number of processes. What is asked for beside the first changes no label. Calibration takes the memory of
    one more `(K, H, W)` for an image.

    Args:
        accelerator: Tells the process, the device and the precision.
        model: The model, not prepared or unwrapped; its mode is restored afterwards.
        samples: What to evaluate on.
        protocol: How the model is shown each image.
        batch_size: Windows in one call of the model.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.
        calibration: Also measure the expected calibration error.
        object_sizes: Also measure mIoU for small, medium and large segments.
        boundary: Also measure boundary IoU.
        per_image: Also give the scores of each image.

    Returns:
        What `SegmentationMetrics.compute` gives, and on demand what the `compute` of `CalibrationError`,
        `ObjectSizeIoU` and `BoundaryIoU` and what `image_scores` give.
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    own = range(accelerator.process_index, count, accelerator.num_processes)
    loader = DataLoader(
        Subset(samples, own),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else it draws from the random state that a checkpoint keeps
        pin_memory=accelerator.device.type == "cuda",
    )
    ignore_index = samples.dataset.ignore_index
    metrics = SegmentationMetrics(model.num_classes, ignore_index=ignore_index).to(accelerator.device)
    error = CalibrationError(ignore_index=ignore_index).to(accelerator.device) if calibration else None
    asked: list[Metric] = []
    if object_sizes:
        asked.append(ObjectSizeIoU(model.num_classes, ignore_index=ignore_index).to(accelerator.device))
    if boundary:
        asked.append(BoundaryIoU(model.num_classes, ignore_index=ignore_index).to(accelerator.device))
    counts = []
    with evaluating(model):
        for image, labels in tqdm(loader, desc="evaluate", leave=False, disable=not accelerator.is_main_process):
            labels = labels.to(accelerator.device, non_blocking=True)
            if error is None:
                prediction = _predict(predict_labels, accelerator, model, image, labels.shape, protocol, batch_size)
            else:
                prediction, confidence = _predict(
                    predict_with_confidence, accelerator, model, image, labels.shape, protocol, batch_size
                )
                error.update(confidence, prediction, labels)
            before = metrics.confusion
            metrics.update(prediction, labels)
            for metric in asked:
                metric.update(prediction, labels)
            if per_image:
                counts.append(_class_counts(metrics.confusion - before))
    results: dict[str, Tensor] = {}
    for measured in (metrics, *([error] if error else []), *asked):
        results |= measured.compute()
    if per_image:
        results |= image_scores(_of_all_images(accelerator, counts, count, model.num_classes))
    return results


def image_scores(counts: Tensor) -> dict[str, Tensor]:
    """Scores of each image alone, to find the worst ones.

    An image's mIoU is the mean over the classes that occur in its truth. Those that only its prediction has are wrong
    pixels of these, and a speck of a class that is not there does not weigh as much as a class that is.

    Args:
        counts: Right, true and predicted pixels of each class in each image.

    Shape:
        (N, 3, K) -> (N, K) float64 `"image_IoU"`, NaN where the truth lacks the class; (N,) float64 `"image_mIoU"` and
        `"image_aAcc"`, NaN without a labelled pixel; (N,) int64 `"image_pixels"`, the labelled ones.

    Examples:
        >>> image_scores(torch.tensor([[[6, 0, 0], [8, 2, 0], [7, 0, 3]]]))["image_mIoU"]  # 6 / 9 and 0 / 2
        tensor([0.3333], dtype=torch.float64)
    """
    correct, true, predicted = counts.unbind(1)
    iou = torch.where(true > 0, correct.double() / (true + predicted - correct), torch.nan)
    return {
        "image_IoU": iou,
        "image_mIoU": iou.nanmean(1),
        "image_aAcc": correct.sum(1).double() / true.sum(1),
        "image_pixels": true.sum(1),
    }


def _class_counts(confusion: Tensor) -> Tensor:
    """Right, true and predicted pixels of each class `(3, K)` from a confusion matrix `(K, K + 1)`."""
    return torch.stack([confusion.diagonal(), confusion.sum(1), confusion[:, :-1].sum(0)])


def _of_all_images(accelerator: Accelerator, own: Sequence[Tensor], count: int, num_classes: int) -> Tensor:
    """The counts of every process' images, `(N, 3, K)` on the CPU, in the order of the data set."""
    most = -(-count // accelerator.num_processes)  # some have one less, or none
    counts = torch.zeros(most, 3, num_classes, dtype=torch.int64, device=accelerator.device)
    if own:
        counts[: len(own)] = torch.stack([*own])
    # process p had images p, p + processes, ...
    ordered = rearrange(accelerator.gather(counts), "(p n) c k -> (n p) c k", p=accelerator.num_processes)
    return ordered[:count].cpu()


def predict(
    accelerator: Accelerator,
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    protocol: InferenceProtocol = WHOLE,
    *,
    batch_size: int = 8,
) -> Tensor:
    """Label map `(H, W)` of one normalised image `(3, h, w)` at `size`, in the run's precision."""
    return _predict(predict_labels, accelerator, model, image, size, protocol, batch_size)


def predict_uncertainty(
    accelerator: Accelerator,
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    protocol: InferenceProtocol = WHOLE,
    *,
    batch_size: int = 8,
) -> Uncertainty:
    """Uncertainty maps `(H, W)` of one normalised image `(3, h, w)` at `size`, in the run's precision, on the CPU."""
    maps = _predict(uncertainty_of, accelerator, model, image, size, protocol, batch_size)
    return Uncertainty(*(x.cpu() for x in maps))


def _predict(
    function: Callable[..., T],
    accelerator: Accelerator,
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    protocol: InferenceProtocol,
    batch_size: int,
) -> T:
    """What a function of `segheads.inference` makes of one image, in the run's precision."""
    with accelerator.autocast():
        return function(
            model,  # its low-resolution logits, not the compiled call: windows and images come in many shapes
            image.to(accelerator.device, non_blocking=True),
            protocol,
            size=(size[0], size[1]),
            batch_size=batch_size,
        )
