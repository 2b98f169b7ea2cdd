"""Write a trained model for another runtime: ONNX, OpenVINO, or PyTorch without its code.

    segheads export runs/demo --output demo.onnx
    segheads export OWNER/NAME --output model.onnx --outputs labels probability
    segheads export runs/demo --output demo8.onnx --precision int8 --calibration photos
    segheads export runs/demo --format openvino --output demo.xml

Photographs go in as they are stored, (B, C, H, W) of uint8, and label maps of their size come out. Before the file is
there, it is run on images of three sizes and compared with the model; where it gives something else, no file is left.
docs/export.md says which heads and backbones take any size.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from segheads.cli.evaluate import find_model
from segheads.data.folders import IMAGE_SUFFIXES
from segheads.errors import DataMissingError, options_become_parts
from segheads.exporting import Exported, export
from segheads.exporting.deployed import Output
from segheads.exporting.registry import Precision
from segheads.predictor import Predictor
from segheads.pretrained import origin
from segheads.ranges import Range

MOST_IMAGES = 64  # of a folder that are measured for int8
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, and what is to be written."""

    model: tyro.conf.Positional[str]
    """The folder of a run, a folder that save_pretrained wrote, or a model's name on the Hugging Face hub."""
    output: Path
    """The file, with the ending of its format: .onnx, .pt2 (torch-export, aoti), .xml (openvino), .pt (torchscript)."""
    format: str = "onnx"
    """What reads it."""
    outputs: tuple[Output, ...] = ("labels",)
    """What it gives, in this order: labels, the probability of each pixel's label, logits of all classes."""
    size: Annotated[tuple[int, int] | None, Range(1)] = None
    """Fix height and width of the images, pixels; None leaves them free where the backbone does."""
    batch_size: Annotated[int | None, Range(1)] = None
    """Fix how many images it takes at a time; None leaves it free."""
    precision: Precision = "fp32"
    """Of the network; int8 is for ONNX and needs --calibration."""
    calibration: tuple[Path, ...] = ()
    """Images, or folders of them, on which the ranges of int8 are measured: some ten to a hundred."""
    opset: Annotated[int, Range(18)] = 18
    """Of ONNX, 18 or newer."""
    min_agreement: Annotated[float | None, Range(0, 1)] = None
    """Share of pixels that must have the model's label; None means 0.999, in fp16 0.99, in int8 0.9."""
    json: bool = False
    """Print JSON, for programs, in place of words."""


def main(config: Config) -> None:
    """Run the command."""
    if config.json:
        logging.getLogger("segheads").setLevel(logging.CRITICAL)  # standard output is for the JSON alone
    predictor = Predictor.from_pretrained(config.model)
    model = predictor.model
    model.protocol, model.classes = predictor.protocol, predictor.classes
    if model.plan is not None and (known := origin(model.plan.backbone, find_model(config.model)[1])):
        model.backbone.licence = known["licence"]
    with options_become_parts():
        done = export(
            model,
            config.output,
            format=config.format,
            outputs=config.outputs,
            size=config.size,
            batch_size=config.batch_size,
            precision=config.precision,
            calibration=images_of(config.calibration),
            opset=config.opset,
            min_agreement=config.min_agreement,
        )
    print(json.dumps(as_json(done)) if config.json else described(done))


def images_of(places: tuple[Path, ...]) -> list[Path]:
    """The image files, and those in the folders, at most `MOST_IMAGES`, evenly spaced.

    Raises:
        DataMissingError: If a place is not there, or a folder holds no image.
    """
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise DataMissingError(f"--calibration {place} is not there; give images or folders of images")
        inside = (
            sorted(x for x in place.rglob("*") if x.suffix.lower() in IMAGE_SUFFIXES) if place.is_dir() else [place]
        )
        if not inside:
            raise DataMissingError(f"--calibration {place} holds no image; give images or folders of images")
        found += inside
    step = max(1, len(found) / MOST_IMAGES)
    return [found[int(index * step)] for index in range(min(len(found), MOST_IMAGES))]


def as_json(done: Exported) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "path": str(done.path),
        "size": done.size,
        "reason": done.reason,
        "labels_equal": done.agreement.labels,
        "logits_apart": done.agreement.logits,
        "compared_at": done.agreement.sizes,
        "example": None if done.example is None else str(done.example),
        "metadata": done.metadata,
    }


def described(done: Exported) -> str:
    """What was written, in words."""
    size = "any size" if done.size is None else f"{done.size[0]} x {done.size[1]} pixels"
    because = f" ({done.reason})" if done.reason else ""
    compared = ", ".join(f"{height}x{width}" for height, width in done.agreement.sizes)
    apart = "" if done.agreement.logits is None else f", logits to {done.agreement.logits:.0e} of their range"
    lines = [
        f"{done.path} ({done.path.stat().st_size / 2**20:.1f} MB): images of {size}{because}",
        f"labels equal at {100 * done.agreement.labels:.2f} % of the pixels or more{apart} (images of {compared})",
    ]
    return "\n".join(lines + ([f"how to use it: {done.example}"] if done.example else []))
