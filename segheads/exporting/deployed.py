"""What is exported: preprocessing, model, upsampling and the choice of the class, in one graph."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from segheads.data.images import full_scale
from segheads.functional import upsample
from segheads.functional.binary import probabilities
from segheads.functional.shapes import crop
from segheads.functional.upsample import log_of, probabilities_of
from segheads.model import SegmentationModel

Output = Literal["labels", "probability", "logits"]
INPUT = "images"  # the name of the one input
BYTE, CLASSES_IN_8_BIT = 255, 256
# From so many classes and so large a factor on, runtimes take the argmax along the last axis of a product in half the
# time of that along the second of a resized map.
MANY_CLASSES, FAR = 64, 8


class Deployed(nn.Module):
    """A model that takes images as they are stored and gives maps of their size.

    Args:
        model: The model, in evaluation mode.
        outputs: Some of `"labels"`, `"probability"` (of each pixel's label) and `"logits"`, in any order.
        precision: `"fp16"` for a model in 16 bit; scores at the image's size are in 32 all the same.

    Shape:
        images `(B, C, H, W)`: stored values, as integers or floats. labels and probability are `(B, H, W)`, uint8 (of
        more than 256 classes int32) and float32; logits `(B, K, H, W)`, float32.

    Attributes:
        input_dtype: Type of the images: uint8, or of models of more than 8 bit float32.
        full_scale: The largest value of an image.

    Raises:
        ValueError: If there are no outputs, one is unknown, or stands twice.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: SegmentationModel, outputs: Sequence[str] = ("labels",), *, precision: str = "fp32"
    ) -> None:
        super().__init__()
        check_outputs(outputs)
        self.model, self.outputs, self.precision = model, tuple(outputs), precision
        self.averages_probabilities = model.averages_probabilities
        self.threshold = model.protocol.threshold
        self.full_scale = full_scale(model.image_form.bit_depth)
        self.input_dtype = torch.uint8 if self.full_scale == BYTE else torch.float32
        for name in ("mean", "std"):
            values = torch.tensor(model.data_config[name], dtype=torch.float32).view(1, -1, 1, 1) * self.full_scale
            self.register_buffer(name, values, persistent=False)

    def with_outputs(self, outputs: Sequence[str]) -> Self:
        """The same model with other outputs.

        Args:
            outputs: See the class.
        """
        found = type(self)(self.model, outputs, precision=self.precision)
        found.training = self.training  # and every part of the model keeps its own mode
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order in which they were asked for."""
        height, width = images.shape[-2:]
        x = (images.to(torch.float32) - self.mean) / self.std
        logits, covered = self.model.low_resolution(x.half() if self.precision == "fp16" else x)
        logits = logits.float()
        averaged = probabilities_of(logits) if self.averages_probabilities else logits
        factor = 1 if self.model.stretch_logits else self.model.pixels_per_cell
        is_last = averaged.shape[1] >= MANY_CLASSES and factor >= FAR and factor == int(factor)
        scores = upsample_to_last(averaged, int(factor)) if is_last else upsample(averaged, covered)
        labels = self._labels(scores, -1 if is_last else 1)
        scores = scores.movedim(-1, 1) if is_last else scores
        found = {
            "labels": lambda: labels,
            "probability": lambda: self._probability(scores, labels),
            "logits": lambda: log_of(scores) if self.averages_probabilities else scores,
        }
        return tuple(crop(found[name](), height, width) for name in self.outputs)

    def _labels(self, scores: Tensor, axis: int) -> Tensor:
        """The label of the highest score; of a single class, whether it is above the threshold."""
        count = scores.shape[axis]
        dtype = torch.uint8 if count <= CLASSES_IN_8_BIT else torch.int32
        if count > 1:
            return scores.argmax(axis).to(dtype)
        least = self.threshold if self.averages_probabilities else math.log(self.threshold / (1 - self.threshold))
        return (scores[:, 0] > least).to(dtype)

    def _probability(self, scores: Tensor, labels: Tensor) -> Tensor:
        shares = scores if self.averages_probabilities else probabilities(scores)
        if shares.shape[1] > 1:
            return shares.amax(1)
        return torch.where(labels == 1, shares[:, 0], 1 - shares[:, 0])


def upsample_to_last(x: Tensor, factor: int) -> Tensor:
    """Bilinear upsampling by a whole factor, with the classes as the last axis.

    Every pixel is made of the cell that it lies in and the next on either side, with weights that repeat from cell to
    cell: one small matrix, for maps of any size.

    Shape:
        `(B, K, h, w)` to `(B, factor * h, factor * w, K)`.
    """
    (B, K, h, w), weights = x.shape, _weights_in_cell(factor, x)
    x = x.permute(0, 2, 3, 1)  # (B, K, h, w) -> (B, h, w, K)
    x = (weights @ _with_neighbours(x, 2)).reshape(B, h, factor * w * K)  # (B, h, w, 3, K) -> (B, h, W * K)
    return (weights @ _with_neighbours(x, 1)).reshape(B, factor * h, factor * w, K)


def _with_neighbours(x: Tensor, axis: int) -> Tensor:
    """Each cell with the one before and the one behind along an axis, at the rim itself, as a new axis behind it."""
    first, last = x.narrow(axis, 0, 1), x.index_select(axis, torch.full((1,), x.shape[axis] - 1, device=x.device))
    size = x.shape[axis]
    at = torch.arange(size, device=x.device)
    padded = torch.cat([first, x, last], axis)
    return torch.stack([padded.index_select(axis, at + shift) for shift in range(3)], axis + 1)


def _weights_in_cell(factor: int, like: Tensor) -> Tensor:
    """Of the cell before, the cell itself and the one behind, for each of a cell's pixels, `(factor, 3)`."""
    place = [(pixel + 0.5) / factor - 0.5 for pixel in range(factor)]  # of a pixel, from the middle of its cell
    rows = [[max(0.0, -at), 1 - abs(at), max(0.0, at)] for at in place]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def check_outputs(outputs: Sequence[str]) -> None:
    """Refuse outputs that a graph cannot have.

    Raises:
        ValueError: If there are none, one is unknown, or stands twice.
    """
    known = get_args(Output)
    if not outputs or not set(outputs) <= set(known) or len(set(outputs)) < len(outputs):
        raise ValueError(
            f"outputs must be one or more of {', '.join(known)}, each once; got {', '.join(outputs) or 'none'}"
        )
