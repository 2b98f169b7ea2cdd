"""Whether a written file gives what the model gives, at sizes other than the one that it was exported with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.errors import ExportError
from segheads.exporting.deployed import Deployed
from segheads.exporting.program import coarsest_cell
from segheads.exporting.registry import Runner

# The least share of pixels with the model's label, and the largest difference of logits over their range. In 16 and
# 8 bit logits differ by what the precision does, and labels are what counts.
LIMITS: dict[str, tuple[float, float | None]] = {"fp32": (0.999, 1e-4), "fp16": (0.99, None), "int8": (0.9, None)}


@dataclass(frozen=True)
class Agreement:
    """How a graph compares with its model.

    Attributes:
        sizes: Heights and widths of the images that were compared.
        labels: The least share of an image's pixels that have the model's label.
        logits: The largest difference of logits, over their range; None where there are none.
    """

    sizes: tuple[tuple[int, int], ...]
    labels: float
    logits: float | None


def compare(runner: Runner, deployed: Deployed, images: Sequence[Tensor]) -> Agreement:
    """Compare the outputs that both have.

    Args:
        runner: A graph of the outputs of `deployed`.
        deployed: The model, in full precision.
        images: Each `(B, C, H, W)`.
    """
    same, apart = [1.0], [0.0]
    for x in images:
        with torch.no_grad():
            expected = dict(zip(deployed.outputs, deployed(x), strict=True))
            found = dict(zip(deployed.outputs, runner(x), strict=True))
        if "labels" in found:
            same += (found["labels"] == expected["labels"]).flatten(1).float().mean(1).tolist()
        for name in {"probability", "logits"} & set(found):
            spread = 1.0 if name == "probability" else float(expected[name].max() - expected[name].min())
            apart.append(float((found[name].float() - expected[name]).abs().max()) / max(spread, 1e-6))
    sizes = tuple(dict.fromkeys((x.shape[2], x.shape[3]) for x in images))
    worst = float(torch.tensor(apart).max())  # NaN, if one is
    return Agreement(sizes, min(same), worst if len(apart) > 1 else None)


def check(agreement: Agreement, precision: str, least: float | None = None) -> None:
    """Refuse a graph that gives something else.

    Args:
        agreement: What was found.
        precision: Of the network.
        least: The share of pixels that must have the model's label; None means that of the precision.

    Raises:
        ExportError: If it is below, or logits differ by more than 1e-4 of their range in full precision.
    """
    of_labels, of_logits = LIMITS[precision]
    of_labels = of_labels if least is None else least
    sizes = ", ".join(f"{height}x{width}" for height, width in agreement.sizes)
    if not agreement.labels >= of_labels:
        raise ExportError(
            f"the exported graph gives the model's label at {100 * agreement.labels:.2f} % of the pixels of an image, "
            f"and {100 * of_labels:g} % are wanted (images of {sizes}); nothing was written"
        )
    if agreement.logits is not None and not math.isfinite(agreement.logits):
        raise ExportError(f"the exported graph's logits are NaN or infinite (images of {sizes}); nothing was written")
    if of_logits is not None and agreement.logits is not None and not agreement.logits <= of_logits:
        raise ExportError(
            f"the exported graph's logits differ from the model's by {agreement.logits:.1e} of their range, and "
            f"{of_logits:g} is the most (images of {sizes}); nothing was written"
        )


def check_images(deployed: Deployed, size: tuple[int, int] | None, batch_size: int | None) -> list[Tensor]:
    """Three batches of random images: of several sizes, odd ones too, where any is taken, else of the one.

    Args:
        deployed: What is exported.
        size: Height and width; None means any.
        batch_size: How many at a time; None means any number, of which 1 to 3 are tried.
    """
    cell = coarsest_cell(deployed)
    sizes = [(cell + 1, 2 * cell + 3), (3 * cell, cell + 2), (4 * cell + 1, 3 * cell - 5)]
    sizes = sizes if size is None else [size] * 3
    counts = [2, 3, 1] if batch_size is None else [batch_size] * 3
    generator = torch.Generator().manual_seed(0)
    return [_images(deployed, n, *hw, generator) for n, hw in zip(counts, sizes, strict=True)]


def _images(deployed: Deployed, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Soft blobs and some noise, from 0 to the largest value of the model's bit depth."""
    channels = deployed.model.backbone.in_chans
    blobs = torch.rand(count, channels, 5, 7, generator=generator)
    x = F.interpolate(blobs, (height, width), mode="bicubic")
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return (x.clamp(0, 1) * deployed.full_scale).round().to(deployed.input_dtype)
