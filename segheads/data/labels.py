"""Read one label file: the integers that it stores, or its colours, and the classes that they stand for."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segheads.classes import ignored_label
from segheads.data.images import open_image
from segheads.errors import LabelError, UnknownLabelError

# Formats that may change values a little; the mode of a file does not tell whether it did.
LOSSY = {"AVIF": "AVIF", "JPEG": "JPEG", "JPEG2000": "JPEG 2000", "MPO": "JPEG", "WEBP": "WebP"}
_INVERTED = re.compile(r"(1|L);\d*IR?$")  # Pillow's names for grey of which 0 is white
_FEW_BITS = re.compile(r"L;([24])R?$")


def read_labels(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """Read a label file as its stored integers, `(H, W)`: palette indices rather than colours, nothing scaled.

    Grey of 1, 2, 4, 8, 16 or 32 bit, palettes with or without transparency, and floats that are whole numbers.

    Args:
        path: A single-channel image file, as a rule a PNG.

    Raises:
        DataMissingError: There is no such file.
        LabelError: The file has more than one channel, is of a format that changes values, or holds fractions.
        DataError: The file is no image or is damaged.
    """
    image, coding = _open_label(path)
    if image.mode == "F":
        return _whole_numbers(np.asarray(image), path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise LabelError(
            f"label {path} has {len(image.getbands())} channels (mode {image.mode}), but a label holds one class index "
            f"per pixel; {_remedy(image)}"
        )
    if any(isinstance(name, str) and _INVERTED.match(name) for name in coding):
        raise LabelError(f"label {path} stores its values upside down (0 is white); save it as a PNG")
    return _unscaled(np.asarray(image), coding)


def read_label_colours(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """Read a label file as its colours, `(H, W)`: each is one number, `0xRRGGBB`.

    Grey is repeated, and palettes are looked up. Nothing may be transparent: what is half transparent is a blend, and
    of what is wholly so nobody sees the colour.

    Args:
        path: An image file of 8 bit per channel, as a rule a PNG.

    Raises:
        DataMissingError: There is no such file.
        LabelError: The file is of a format that changes values, or has transparent pixels or other channels.
        DataError: The file is no image or is damaged.
    """
    image, _ = _open_label(path)
    if image.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
        raise LabelError(
            f"label {path} is of mode {image.mode}, which holds no colours of 8 bit; save it as an RGB PNG"
        )
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        blended = (alpha != 0) & (alpha != 255)
        if blended.any():
            raise LabelError(
                f"label {path} has {np.count_nonzero(blended)} pixels that are half transparent, whose colours are "
                "blends; save it without smooth edges"
            )
        if not alpha.all():
            raise LabelError(
                f"label {path} has {np.count_nonzero(alpha == 0)} pixels that are transparent, so nobody sees which "
                "colour they have; fill them with the colour of a class or of what is ignored"
            )
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int32), 2, 0)
    return (red << 16) | (green << 8) | blue


def to_class_indices(
    values: NDArray[np.integer], num_classes: int, *, first: int, ignored: Sequence[int], path: object
) -> NDArray[np.integer]:
    """Turn the values of a label file into classes 0 to `num_classes - 1`, and `ignored_label` where ignored.

    Args:
        values: What `read_labels` returned.
        num_classes: How many classes there are.
        first: The value in the file that means class 0.
        ignored: The values in the file that mean "no class"; they win over classes.
        path: The file, for the message.

    Returns:
        uint8, or int16 for more than 255 classes.

    Raises:
        UnknownLabelError: A value is neither a class nor ignored.
    """
    last = first + num_classes - 1
    inside = [value for value in ignored if first <= value <= last]
    if values.dtype == np.uint8 and first == 1 and 0 in ignored and not inside and values.max() <= last <= 255:
        return values - np.uint8(1)  # ADE20K's way, four times as fast: 0 wraps to 255
    skip = np.zeros(values.shape, bool)
    for value in ignored:
        skip |= values == value
    known = (values >= first) & (values <= last)
    if not (known | skip).all():
        found = values[~(known | skip)]
        raise UnknownLabelError(
            f"label {path} holds the value {found[0]} ({found.size} pixels out of range), but {num_classes} classes "
            f"allow {first} to {last}, and {' or '.join(map(str, ignored)) or 'nothing'} for ignored; "
            "correct the file or num_classes"
        )
    if num_classes > 255:
        return np.where(skip, ignored_label(num_classes), values.astype(np.int64) - first).astype(np.int16)
    labels = (values - first).astype(np.uint8, copy=False)
    labels |= np.negative(skip.view(np.uint8))  # 255 where true
    return labels


def class_table(classes: Mapping[int, int]) -> NDArray[np.int16]:
    """Return what `look_up_classes` takes, for label files whose classes are not numbers in a row.

    Args:
        classes: Value in the file to class, 0 to 254, or to 255 for ignored; values are 0 to 255.
    """
    table = np.full(257, -1, np.int16)  # the last entry is for values beyond 8 bit
    table[list(classes)] = list(classes.values())
    return table


def look_up_classes(
    values: NDArray[np.integer], table: NDArray[np.int16], *, expected: str, path: object
) -> NDArray[np.uint8]:
    """Turn the values of a label file into classes, and 255 where ignored, by a table of `class_table`.

    Args:
        values: What `read_labels` returned.
        table: Class of each value.
        expected: Which values there are, for the message.
        path: The file, for the message.

    Raises:
        UnknownLabelError: The table has no class for a value.
    """
    inside = values if values.dtype == np.uint8 else np.where((values >= 0) & (values < 256), values, 256)
    classes = table[inside]
    if classes.min() < 0:
        found = values[classes < 0]
        raise UnknownLabelError(
            f"label {path} holds the value {found[0]} ({found.size} pixels out of range), but {expected}; "
            "correct the file"
        )
    return classes.astype(np.uint8)


def _open_label(path: str | os.PathLike[str]) -> tuple[Image.Image, tuple[Any, ...]]:
    image, coding = open_image(path, "a label image")
    packed = str(image.info.get("compression", "")) if image.format == "TIFF" else ""
    lossy = LOSSY.get(str(image.format)) or LOSSY.get(packed.upper())
    if lossy:
        raise LabelError(
            f"label {path} is a {lossy}, which may change class indices where it compresses; draw or export the label "
            "anew as a PNG (converting this file keeps its faults)"
        )
    if (count := image.info["pages"]) > 1:
        raise LabelError(f"label {path} has {count} pages, but a label has one; save the one that is meant")
    return image, coding


def _remedy(image: Image.Image) -> str:
    """What to do about a label of several channels."""
    first, *others = (np.asarray(image.getchannel(band)) for band in image.getbands() if band not in ("A", "a"))
    advice = "save it as a single-channel or palette PNG"
    if all(np.array_equal(first, other) for other in others):
        return f"its channels are equal, so {advice} of the first: Image.open(path).getchannel(0)"
    return f"say which colour is which class by label_colours, or {advice}"


def _whole_numbers(values: NDArray[Any], path: object) -> NDArray[np.integer]:
    whole = np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2**31)
    if not whole.all():
        raise LabelError(
            f"label {path} holds floating-point pixels such as {values[~whole][0]:g} ({np.count_nonzero(~whole)} of "
            "them), but classes are whole numbers; save it as integers"
        )
    return values.astype(np.int32)


def _unscaled(values: NDArray[Any], coding: tuple[Any, ...]) -> NDArray[np.integer]:
    """Undo what Pillow does so that grey of few bits fills 8 or 16."""
    if values.dtype == bool:
        return values.astype(np.uint8)
    codec, raw, *more = (*coding, "", "")
    if codec in ("ppm", "ppm_plain") and isinstance(more[0], int):  # stretched from 0..maxval
        full = 255 if values.dtype == np.uint8 else 65535
        return np.rint(values.astype(np.float64) * (more[0] / full)).astype(values.dtype)
    few = _FEW_BITS.match(raw) if isinstance(raw, str) else None
    if few:
        return values // np.uint8(255 // (2 ** int(few[1]) - 1))
    return values.astype(values.dtype.newbyteorder("="), copy=False)
