"""`export`: a model to a file for another runtime, checked against the model before it is there."""

import copy
import dataclasses
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.data.images import from_pillow, read_image
from segheads.data.resize import resize_keep_ratio
from segheads.errors import ExportError
from segheads.exporting.check import LIMITS, Agreement, check, check_images, compare
from segheads.exporting.deployed import Deployed, Output, check_outputs
from segheads.exporting.example import write_example
from segheads.exporting.metadata import describe
from segheads.exporting.registry import Format, Job, Precision, find_format
from segheads.files import whole_file
from segheads.model import SegmentationModel

SHOWN = 8  # images of the calibration that are compared


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        size: Height and width of the images that it takes; None means any.
        reason: Why the size is fixed; None where it is free, or was asked for.
        agreement: How it compares with the model.
        metadata: What the file says of itself.
        example: A program that runs it without segheads; None for formats other than ONNX.
    """

    path: Path
    size: tuple[int, int] | None
    reason: str | None
    agreement: Agreement
    metadata: dict[str, str]
    example: Path | None


def export(
    model: SegmentationModel,
    path: str | Path,
    *,
    format: str = "onnx",
    outputs: Sequence[Output] = ("labels",),
    size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    calibration: Iterable[Any] = (),
    opset: int = 18,
    min_agreement: float | None = None,
) -> Exported:
    """Write a model for another runtime: images as they are stored go in, label maps of their size come out.

    Normalisation, padding, upsampling and the choice of the class are inside. Windows, scales and flips of the model's
    protocol are not: the graph sees the image as it is given. The input `images` `(B, C, H, W)` is uint8, or float32 of
    the stored values for a model of more than 8 bit. Batch, height and width are free unless the backbone or the format
    is bound to one size.

    What was written is run on images of three sizes (int8: on some of those of `calibration`), and compared with the
    model: labels must be equal on 99.9 % of the pixels of each image (fp16: 99 %; int8: 90 %) and in fp32 logits within
    1e-4 of their range. Otherwise, and after any error, no file is left.

    Args:
        model: A trained model. It is copied, and stays as it is.
        path: The file, with the format's ending. For ONNX a short program beside it, NAME_example.py, shows its use,
            for RGB images of 8 bit, one at a time, and labels of up to 256 classes.
        format: A name in `segheads.exporting.FORMATS`.
        outputs: What the graph gives, in this order: `"labels"`, `"probability"` of each pixel's label, `"logits"`.
        size: Fix height and width of the images, pixels.
        batch_size: Fix how many images it takes at a time.
        precision: `"fp32"`; `"fp16"` for the network, but not for scores at the image's size; `"int8"` (ONNX alone) for
            its layers, as measured on `calibration`.
        calibration: Images for int8, also used for the comparison: paths, PIL images or tensors of stored values
            `(C, H, W)`, as the model will see them. Some ten to a hundred.
        opset: Of ONNX, 18 or newer.
        min_agreement: The share of pixels that must have the model's label, in place of those above.

    Raises:
        ValueError: If an option is unknown, out of range, or not of this format.
        PackageMissingError: If the format needs a package that is not installed.
        ExportError: If the graph cannot be made, or does not give what the model gives.
    """
    kind, path = find_format(format), Path(path)
    check_outputs(outputs)
    _check_options(kind, format, path, precision, opset, min_agreement, size, batch_size)
    kind.check_packages()
    own = copy.deepcopy(model).cpu().float().eval()
    reference = Deployed(own, _compared(outputs)).eval()
    images = [_as_stored(image, own) for image in calibration]
    if precision == "int8" and not images:
        raise ValueError("int8 needs calibration: some images such as the model will see; got none")
    size, reason = _fixed(own, kind, size)
    if size is not None:
        images = [F.interpolate(x.float(), size, mode="bilinear").round().to(x.dtype) for x in images]
    if batch_size is not None:
        images = [x.expand(batch_size, -1, -1, -1).contiguous() for x in images]
    half = copy.deepcopy(own).half() if precision == "fp16" else own
    deployed = Deployed(half, reference.outputs, precision=precision).eval()
    about = describe(reference, outputs, size=size, reason=reason, precision=precision, format=format)
    job = Job(deployed, size, batch_size, precision, opset, about, images)
    shown = images[:SHOWN] + ([] if precision == "int8" else check_images(reference, size, batch_size))
    agreement = _write(kind, job, path, outputs, reference, shown, min_agreement)
    has_example = kind.suffix == ".onnx" and "labels" in outputs and batch_size in (None, 1)
    example = write_example(path, reference) if has_example else None
    return Exported(path, size, reason, agreement, about, example)


def _write(
    kind: Format,
    job: Job,
    path: Path,
    outputs: Sequence[str],
    reference: Deployed,
    images: Sequence[Tensor],
    least: float | None,
) -> Agreement:
    """Write, compare and, if all is well, put the files where they belong."""
    with ExitStack() as files:
        temporary = files.enter_context(whole_file(path))  # put in its place last
        beside = {suffix: files.enter_context(whole_file(path.with_suffix(suffix))) for suffix in kind.beside}
        for suffix in beside:  # written by the name of the first file
            files.callback(temporary.with_suffix(suffix).unlink, missing_ok=True)
        try:
            kind.write(job, temporary)
            agreement = compare(kind.load(temporary), reference, images)
            check(agreement, job.precision, least)
            if tuple(outputs) != reference.outputs:
                fewer = dataclasses.replace(job, deployed=job.deployed.with_outputs(outputs))
                kind.narrow(fewer, temporary)
                again = compare(kind.load(temporary), reference.with_outputs(outputs), images[:1])
                check(again, job.precision, least)
        except (ExportError, OSError, MemoryError):
            raise
        except Exception as error:  # of torch.export, a converter or a runtime, which have errors of all kinds
            hint = "; a fixed size may work where a free one does not" if job.size is None else ""
            raise ExportError(
                f"this model cannot be exported as asked ({type(error).__name__}: {_first_line(error)}){hint}"
            ) from error
        for suffix, place in beside.items():
            os.replace(temporary.with_suffix(suffix), place)
    return agreement


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _compared(outputs: Sequence[str]) -> tuple[str, ...]:
    """With labels and logits, which are compared whether they are asked for or not."""
    return (*outputs, *(name for name in ("labels", "logits") if name not in outputs))


def _fixed(
    model: SegmentationModel, kind: Format, size: tuple[int, int] | None
) -> tuple[tuple[int, int] | None, str | None]:
    """The size of the images, if it is one, and why where nobody asked for it."""
    if size is not None:
        return size, None
    backbone = model.backbone
    if backbone.fixed_size is not None:
        height, width = backbone.fixed_size
        return backbone.fixed_size, f"{backbone.name} is bound to images of {height} x {width}"
    if kind.why_fixed is not None:
        height, width = model.data_config["input_size"][-2:]
        return (height, width), kind.why_fixed
    return None, None


def _as_stored(image: Any, model: SegmentationModel) -> Tensor:
    """A picture as a batch of one, `(1, C, H, W)`, of the graph's input."""
    form, deployed_dtype = model.image_form, Deployed(model).input_dtype
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != form.channels:
            raise ValueError(
                f"a tensor for calibration must be ({form.channels}, H, W) of stored values; got {tuple(image.shape)}"
            )
        if image.is_floating_point() and deployed_dtype == torch.uint8:
            raise ValueError(f"a tensor for calibration must be of stored values, uint8; got {image.dtype}")
        return image.unsqueeze(0).to(deployed_dtype)
    picture = read_image(image, form) if isinstance(image, (str, Path)) else from_pillow(image, form)
    if model.protocol.scale is not None:
        picture = resize_keep_ratio(picture, model.protocol.scale)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).contiguous().to(deployed_dtype)


def _check_options(
    kind: Format,
    name: str,
    path: Path,
    precision: str,
    opset: int,
    least: float | None,
    size: tuple[int, int] | None,
    batch_size: int | None,
) -> None:
    if path.suffix != kind.suffix:
        raise ValueError(f"a file of format {name} ends in {kind.suffix}; got {str(path)!r}")
    if precision not in LIMITS:
        raise ValueError(f"precision must be one of {', '.join(LIMITS)}; got {precision!r}")
    if precision not in kind.precisions:
        raise ValueError(f"format {name} is written in {' or '.join(kind.precisions)}; got precision {precision}")
    if opset < 18:
        raise ValueError(f"opset must be 18 or newer; got {opset}")
    if least is not None and not 0 <= least <= 1:
        raise ValueError(f"min_agreement must be a share of pixels, from 0 to 1; got {least}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be height and width in pixels, 1 or more; got {size}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
