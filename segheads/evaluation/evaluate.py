"""Evaluation of models on a data set, as the papers do."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import rearrange
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from segheads.data.samples import EvaluationSamples
from segheads.errors import ScoresError
from segheads.functional.uncertainty import Uncertainty
from segheads.inference.finite import NOT_FINITE, checks_later
from segheads.inference.predict import predict_labels, predict_with_confidence
from segheads.inference.predict import predict_uncertainty as uncertainty_of
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.metrics import METRICS, SegmentationMetric, find_metric
from segheads.metrics.images import class_counts, image_scores
from segheads.model import SegmentationModel
from segheads.modules import evaluating
from segheads.progress import Progress
from segheads.stopping import leave_signals_to_parent

T = TypeVar("T")
log = logging.getLogger(__name__)
LOOK_EVERY = 64  # images; on a GPU the host waits for none in between
KEPT_PIXELS = 2**23  # of the images that a metric which waits gets at once: 24 of 683x512, four of 2048x1024
IOU = "iou"  # its confusion matrix also gives the scores of single images


def evaluate(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    metrics: Sequence[str] = (IOU,),
    per_image: bool = False,
    batch_size: int = 8,
    limit: int | None = None,
    workers: int = 0,
) -> dict[str, Tensor]:
    """aAcc, mAcc, mIoU and per-class values, each label map at its own size; on demand more.

    Every process takes its share of the images, none twice, with the first process' batch-norm statistics, and counts
    are summed, so that the result does not depend on the number of processes. No metric changes a label. Calibration
    takes the memory of one more `(K, H, W)` for an image.

    Args:
        accelerator: Tells the process, the device and the precision.
        model: The model, not prepared or unwrapped; its mode is restored afterwards.
        samples: What to evaluate on.
        protocol: How the model is shown each image.
        metrics: What to measure, by the names of `METRICS`.
        per_image: Also give the scores of each image; "iou" is then measured, too.
        batch_size: Windows in one call of the model.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.

    Returns:
        What the `compute` of every metric gives, in the order of `METRICS`, and on demand what `image_scores` gives.

    Raises:
        ValueError: If there is no such metric, or none is asked for.
        ScoresError: If a model's scores are NaN or infinite; the message names the image.
    """
    (results,) = evaluate_each(
        accelerator,
        [model],
        samples,
        protocol,
        metrics=metrics,
        per_image=per_image,
        batch_size=batch_size,
        limit=limit,
        workers=workers,
    )
    return results


def evaluate_each(
    accelerator: Accelerator,
    models: Sequence[SegmentationModel],
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    metrics: Sequence[str] = (IOU,),
    per_image: bool = False,
    batch_size: int = 8,
    limit: int | None = None,
    workers: int = 0,
    in_turn: Callable[[Sequence[SegmentationModel]], Iterable[SegmentationModel]] = iter,
) -> list[dict[str, Tensor]]:
    """What `evaluate` gives of each of several models, while every image is read once.

    Args:
        accelerator: Tells the process, the device and the precision.
        models: The models, not prepared or unwrapped; their modes are restored afterwards.
        samples: What to evaluate on.
        protocol: How the models are shown each image.
        metrics: What to measure, by the names of `METRICS`.
        per_image: Also give the scores of each image; "iou" is then measured, too.
        batch_size: Windows in one call of a model.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.
        in_turn: Called for every image with all models; yields each as its turn comes, in their order. What models
            share may so be kept from one to the next.

    Raises:
        ValueError: If there is no such metric, or none is asked for.
        ScoresError: If a model's scores are NaN or infinite; the message names the image.
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    names = _in_order([*metrics, *([IOU] if per_image else [])])
    measured = [_Measured(accelerator, names, model.num_labels, samples, per_image) for model in models]
    function = predict_with_confidence if measured and measured[0].needs_confidence else _labels_alone
    predicted = partial(_predict, function, accelerator, protocol=protocol, batch_size=batch_size)
    share_statistics(accelerator, models)
    with evaluating(*models):
        bad = _count_own_images(accelerator, samples, count, workers, measured, lambda: in_turn(models), predicted)
    _refuse_together(samples, bad)
    return [of_model.compute(count) for of_model in measured]


def warn_of_squashing(model: SegmentationModel, protocol: InferenceProtocol) -> None:
    """Say that whole images lose their proportions where the backbone's weights are bound to one size.

    Args:
        model: The model.
        protocol: How it is shown each image.
    """
    if protocol.window is None and (fixed := model.backbone.fixed_size) is not None:
        log.warning(
            "%s is bound to images of %d x %d: whole images of other proportions are squashed into that; --window %d "
            "shows them in windows of it",
            model.backbone.name,
            *fixed,
            max(fixed),
        )


def share_statistics(accelerator: Accelerator, models: Iterable[nn.Module]) -> None:
    """Give all processes the first one's batch-norm statistics, which are those that a run saves.

    DDP hands them out as a forward pass begins, so that after a step each process has what its own images added.
    Averages would change what is saved with every evaluation; the first one's stay as they are.

    Args:
        accelerator: Tells how many processes there are.
        models: Any modules, not prepared or unwrapped.
    """
    if accelerator.num_processes > 1 and torch.distributed.is_initialized():
        for model in models:
            distribute_bn(model, accelerator.num_processes, reduce=False)


def _count_own_images(
    accelerator: Accelerator,
    samples: EvaluationSamples,
    count: int,
    workers: int,
    measured: Sequence["_Measured"],
    in_turn: Callable[[], Iterable[SegmentationModel]],
    predicted: Callable[..., tuple[Tensor, Tensor | None]],
) -> int | None:
    """Show this process' images to every model; returns the image, if any, for which one has scores that are NaN."""
    at_once = _looks_at_once(accelerator.device)
    flags: list[Tensor] = []  # of each image since the last look: whether every model's scores are finite
    first, processes = accelerator.process_index, accelerator.num_processes
    for turn, (image, labels) in enumerate(_own_images(accelerator, samples, count, workers)):
        image, labels = (x.to(accelerator.device, non_blocking=True) for x in (image, labels))
        checks: AbstractContextManager[list[Tensor]] = nullcontext([]) if at_once else checks_later()
        with checks as kept:
            for model, of_model in zip(in_turn(), measured, strict=True):
                try:
                    found = predicted(model, image, labels.shape)
                except ScoresError:
                    return first + turn * processes
                of_model.update(*found, labels)
        flags += [torch.stack(kept).all()] if kept else []
        if len(flags) == LOOK_EVERY or turn == len(range(first, count, processes)) - 1:
            if (bad := _first_bad(flags)) is not None:
                return first + (turn + 1 - len(flags) + bad) * processes
            flags = []
            for of_model in measured:
                of_model.catch_up()
    return None


def _looks_at_once(device: torch.device) -> bool:
    """Whether each image's scores are looked at before the next: on the CPU, where nothing has to be waited for."""
    return device.type == "cpu"


def _first_bad(flags: Sequence[Tensor]) -> int | None:
    """The first image whose scores are not finite; nowhere else in the loop does the host wait for the device."""
    if not flags:
        return None
    told = torch.stack(tuple(flags)).tolist()
    return told.index(False) if False in told else None


def _refuse_together(samples: EvaluationSamples, bad: int | None) -> None:
    """Raise in every process what one has found, or the others would wait for it."""
    found = [index for index in gather_object([bad]) if index is not None]
    if found:
        raise ScoresError(f"{samples.dataset.name(min(found))}: {NOT_FINITE}")


class _Measured:
    """The metrics of one model, and the counts of each image where these are asked for."""

    def __init__(
        self,
        accelerator: Accelerator,
        names: Sequence[str],
        num_classes: int,
        samples: EvaluationSamples,
        per_image: bool,
    ) -> None:
        self.accelerator, self.num_classes, self.per_image = accelerator, num_classes, per_image
        self.ignore_index = samples.dataset.ignore_index
        self.metrics: dict[str, SegmentationMetric] = {
            name: METRICS[name](num_classes, ignore_index=self.ignore_index).to(accelerator.device) for name in names
        }
        self.needs_confidence = any(metric.needs_confidence for metric in self.metrics.values())
        self.counts: list[Tensor] = []
        waits = not _looks_at_once(accelerator.device)
        self.late = {name: metric for name, metric in self.metrics.items() if metric.waits and waits}
        self.kept: list[dict[str, Tensor]] = []  # maps of images that `late` has not seen

    def update(self, preds: Tensor, confidence: Tensor | None, labels: Tensor) -> None:
        """Count one image, or keep it where counting would wait for the device."""
        before = self._confusion() if self.per_image else 0
        maps = {"preds": preds, "labels": labels} | ({} if confidence is None else {"confidence": confidence})
        for name, metric in self.metrics.items():
            if name not in self.late:
                metric.update(**_taken_by(metric, maps))
        if self.per_image:
            self.counts.append(class_counts(self._confusion() - before))
        if self.late:
            if (len(self.kept) + 1) * math.prod(_largest([*self.kept, maps])) > KEPT_PIXELS:
                self.catch_up()
            self.kept.append(maps)

    def catch_up(self) -> None:
        """Count the images that were kept, all at once."""
        if not self.kept:
            return
        (H, W), outside = _largest(self.kept), {"labels": self.ignore_index}
        maps = {
            name: torch.stack(
                [
                    F.pad(x, (0, W - x.shape[1], 0, H - x.shape[0]), value=outside.get(name, 0))
                    for x in (image[name] for image in self.kept)
                ]
            )
            for name in self.kept[0]
        }
        self.kept = []
        for metric in self.late.values():
            metric.update(**_taken_by(metric, maps))

    def compute(self, count: int) -> dict[str, Tensor]:
        """The results of all processes on so many images."""
        results = {key: value for metric in self.metrics.values() for key, value in metric.compute().items()}
        if self.per_image:
            results |= image_scores(_of_all_images(self.accelerator, self.counts, count, self.num_classes))
        return results

    def _confusion(self) -> Tensor:
        iou: Any = self.metrics[IOU]
        confusion: Tensor = iou.confusion
        return confusion


def _taken_by(metric: SegmentationMetric, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a metric's `update` takes."""
    return {name: x for name, x in maps.items() if name != "confidence" or metric.needs_confidence}


def _largest(images: Sequence[Mapping[str, Tensor]]) -> tuple[int, int]:
    """The size into which each of these images fits."""
    heights, widths = zip(*(image["labels"].shape for image in images), strict=True)
    return max(heights), max(widths)


def _in_order(names: Sequence[str]) -> list[str]:
    """Each metric once, in the order of `METRICS`."""
    if not names:
        raise ValueError(f"metrics must name one metric or more; got none; known: {', '.join(METRICS)}")
    for name in names:
        find_metric(name)
    return [name for name in METRICS if name in names]


def _own_images(
    accelerator: Accelerator, samples: EvaluationSamples, count: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Image and labels of this process' share of the first images, with progress."""
    loader = DataLoader(
        Subset(samples, range(accelerator.process_index, count, accelerator.num_processes)),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # else it draws from the random state that a checkpoint keeps
        pin_memory=accelerator.device.type == "cuda",
    )
    with Progress("image", len(loader), is_shown=accelerator.is_main_process, leave=False) as progress:
        for sample in loader:
            yield sample
            progress.update()


def _labels_alone(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
    """What `predict_with_confidence` gives, without the confidence."""
    return predict_labels(*inputs, **options), None


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
