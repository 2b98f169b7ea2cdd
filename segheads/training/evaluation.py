"""Evaluation of a model on a data set, as the papers do."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from segheads.calibration import CalibrationError
from segheads.data import SegmentationDataset, resize_keep_ratio, to_input
from segheads.functional import upsample
from segheads.inference import predict_labels, predict_with_confidence
from segheads.metrics import SegmentationMetrics
from segheads.model import SegmentationModel
from segheads.uncertainty import Uncertainty

T = TypeVar("T")


class EvaluationSamples(Dataset[tuple[Tensor, Tensor]]):
    """Images of a data set at the size at which a model sees them; labels at their own.

    Args:
        dataset: Any data set of the package.
        mean: The backbone's, per channel.
        std: The backbone's, per channel.
        scale: Limits of the longer and the shorter side, pixels, to which images are resized with their aspect ratio
            kept; None leaves them.

    Shape:
        Image `(3, h, w)`, float32, and labels `(H, W)`, uint8.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        mean: Sequence[float],
        std: Sequence[float],
        scale: tuple[int, int] | None = None,
    ) -> None:
        self.dataset, self.mean, self.std, self.scale = dataset, mean, std, scale

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.dataset.read(index)
        if self.scale is not None:
            image = resize_keep_ratio(image, self.scale)
        return to_input(image, self.mean, self.std), labels


def evaluate(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    *,
    window: int | None = None,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 4,
    limit: int | None = None,
    workers: int = 0,
    calibration: bool = False,
) -> dict[str, Tensor]:
    """aAcc, mAcc, mIoU and per-class values, each label map at its own size; on demand calibration, too.

    Every process takes its share of the images, none twice, and counts are summed, so that the result does not depend
    on the number of processes. Calibration changes no label, and takes the memory of one more `(K, H, W)` for an image.

    Args:
        accelerator: Tells the process, the device and the precision.
        model: The model, not prepared or unwrapped; its mode is restored afterwards.
        samples: What to evaluate on.
        window: Side of the sliding window, pixels; None shows the model the whole image.
        stride: Pixels between windows.
        scales: Image scales whose probabilities are averaged.
        flip: Average with the mirrored image, too.
        batch_size: Windows in one call of the model.
        limit: Evaluate on the first so many images; None means all.
        workers: Processes that load images.
        calibration: Also measure the expected calibration error.

    Returns:
        What `SegmentationMetrics.compute` gives, and with `calibration` what `CalibrationError.compute` gives.
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
    protocol = {"window": window, "stride": stride, "scales": scales, "flip": flip, "batch_size": batch_size}
    was_training = model.training
    model.eval()
    try:
        for image, labels in tqdm(loader, desc="evaluate", leave=False, disable=not accelerator.is_main_process):
            labels = labels.to(accelerator.device, non_blocking=True)
            if error is None:
                prediction = _predict(predict_labels, accelerator, model, image, labels.shape, protocol)
            else:
                prediction, confidence = _predict(
                    predict_with_confidence, accelerator, model, image, labels.shape, protocol
                )
                error.update(confidence, prediction, labels)
            metrics.update(prediction, labels)
    finally:
        model.train(was_training)
    return metrics.compute() if error is None else {**metrics.compute(), **error.compute()}


def predict(
    accelerator: Accelerator,
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    window: int | None,
    stride: int | None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 4,
) -> Tensor:
    """Label map `(H, W)` of one normalised image `(3, h, w)` at `size`, in the run's precision."""
    protocol = {"window": window, "stride": stride, "scales": scales, "flip": flip, "batch_size": batch_size}
    return _predict(predict_labels, accelerator, model, image, size, protocol)


def _predict(
    function: Callable[..., T],
    accelerator: Accelerator,
    model: SegmentationModel,
    image: Tensor,
    size: Sequence[int],
    protocol: dict[str, Any],
) -> T:
    """What a function of `segheads.inference` makes of one image, in the run's precision."""
    with accelerator.autocast():
        return function(
            model,  # its low-resolution logits, not the compiled call: windows and images come in many shapes
            image.to(accelerator.device, non_blocking=True),
            size=(size[0], size[1]),
            **protocol,
        )


def predict_uncertainty(
    accelerator: Accelerator, model: SegmentationModel, image: Tensor, size: Sequence[int]
) -> Uncertainty:
    """Uncertainty maps `(H, W)` of one normalised image `(3, h, w)`, shown to an ensemble as a whole, at `size`."""
    with accelerator.autocast():
        _, maps = model.predict(image.to(accelerator.device, non_blocking=True)[None], return_uncertainty=True)
    resized = upsample(torch.stack(maps, dim=1), (size[0], size[1]))[0]  # (1, 3, h, w) -> (3, H, W)
    return Uncertainty(*resized.cpu())
