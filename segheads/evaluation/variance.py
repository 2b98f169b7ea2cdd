"""How far a model's predictions are from undecided: SenFormer's Table 11."""

import torch
from accelerate import Accelerator
from torch import Tensor

from segheads.data.samples import EvaluationSamples
from segheads.evaluation.evaluate import share_statistics
from segheads.inference.predict import predict_probabilities
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.model import SegmentationModel


def class_variance(
    accelerator: Accelerator,
    model: SegmentationModel,
    samples: EvaluationSamples,
    protocol: InferenceProtocol = WHOLE,
    *,
    batch_size: int = 8,
) -> Tensor:
    """Variance of each pixel's K probabilities over the classes, averaged over all pixels of the set.

    It is 0 where all classes are as likely, and (K - 1) / K² where one is certain: 6.6e-3 of 150 classes. SenFormer's
    Table 11 (https://arxiv.org/abs/2111.13280) has 56.6e-3 on ADE20K, which no variance of probabilities over 150
    classes reaches; what it was taken of is not known to us.

    Args:
        accelerator: Tells the process, the device and the precision; each process takes its share of the images.
        model: The model, not prepared or unwrapped; its mode is restored afterwards.
        samples: What to measure on, each pixel of the label maps with the same weight, ignored or not.
        protocol: How the model is shown each image.
        batch_size: Windows in one call of the model.

    Returns:
        A scalar, float64, on the CPU.
    """
    share_statistics(accelerator, [model])
    total = torch.zeros(2, dtype=torch.float64)  # of variances, and pixels
    for index in range(accelerator.process_index, len(samples), accelerator.num_processes):
        image, labels = samples[index]
        size = (labels.shape[-2], labels.shape[-1])
        with accelerator.autocast():
            shares = predict_probabilities(
                model, image.to(accelerator.device), protocol, size=size, batch_size=batch_size
            )
        total += torch.stack([shares.float().var(0, correction=0).double().sum().cpu(), torch.tensor(labels.numel())])
    summed: Tensor = accelerator.reduce(total.to(accelerator.device), reduction="sum")
    return (summed[0] / summed[1]).cpu()
