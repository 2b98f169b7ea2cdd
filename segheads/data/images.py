"""Read one image or one label file: every Pillow mode to the form the library works with, bad files to clear errors."""

import os
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segheads.data.folders import check_file
from segheads.errors import DataError

# What Pillow's decoders raise on damaged files. Decompression bombs are not among them and pass through.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as 8-bit RGB, whatever its mode.

    Grey is repeated, palettes are looked up, transparency is dropped (not composited), CMYK is converted, and 16-bit
    grey is scaled to 8 bit (Pillow itself would clip it). Pixels stay as stored: an EXIF orientation is not applied,
    because the labels of ADE20K and CamVid are drawn on the stored pixels.

    Args:
        path: An image file in any format that Pillow reads.

    Raises:
        DataMissingError: There is no such file.
        DataError: The file is no image, is damaged or truncated, or holds floating-point pixels.
    """
    image = _open(path, "an image")
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DataError(
            f"image {path} holds floating-point pixels (mode F), whose range is not known; save it with 8 or 16 bit"
        )
    if image.mode.startswith("I"):
        image = _to_8_bit(image, path)
    return image.convert("RGB")


def read_labels(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """Read a label file as its stored integers, `(H, W)`: palette indices rather than colours, 16 bit unscaled.

    Args:
        path: A single-channel image file, as a rule a PNG with 8 bit, 16 bit or a palette.

    Raises:
        DataMissingError: There is no such file.
        DataError: The file is no image, is damaged, or has more than one channel.
    """
    image = _open(path, "a label image")
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise DataError(
            f"label {path} has {len(image.getbands())} channels (mode {image.mode}), but a label holds one class index "
            "per pixel; save it as a single-channel or palette PNG"
        )
    values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == bool else values


def to_class_indices(
    values: NDArray[np.integer], num_classes: int, *, first: int, ignored: tuple[int, ...], path: object
) -> NDArray[np.uint8]:
    """Turn the values of a label file into classes 0 to `num_classes - 1`, and 255 where ignored.

    Args:
        values: What `read_labels` returned.
        num_classes: How many classes there are.
        first: The value in the file that means class 0.
        ignored: The values in the file that mean "no class"; they win over classes.
        path: The file, for the message.

    Raises:
        DataError: A value is neither a class nor ignored.
    """
    last = first + num_classes - 1
    inside = [value for value in ignored if first <= value <= last]
    if values.dtype == np.uint8 and first == 1 and 0 in ignored and not inside and values.max() <= last:
        return values - np.uint8(1)  # ADE20K's way, four times as fast: 0 wraps to 255
    skip = values == ignored[0]
    for value in ignored[1:]:
        skip |= values == value
    known = (values >= first) & (values <= last)
    if not (known | skip).all():
        found = values[~(known | skip)]
        raise DataError(
            f"label {path} holds the value {found[0]} ({found.size} pixels out of range), but {num_classes} classes "
            f"allow {first} to {last}, and {' or '.join(map(str, ignored))} for ignored; "
            "correct the file or num_classes"
        )
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
        DataError: The table has no class for a value.
    """
    inside = values if values.dtype == np.uint8 else np.where((values >= 0) & (values < 256), values, 256)
    classes = table[inside]
    if classes.min() < 0:
        found = values[classes < 0]
        raise DataError(
            f"label {path} holds the value {found[0]} ({found.size} pixels out of range), but {expected}; "
            "correct the file"
        )
    return classes.astype(np.uint8)


def _open(path: str | os.PathLike[str], kind: str) -> Image.Image:
    check_file(path, kind)
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.load()
        except _BROKEN as error:
            size = os.fstat(file.fileno()).st_size
            raise DataError(
                f"{path} ({size} bytes) cannot be read as {kind}: {error}; "
                "replace the damaged file or take it out of the folder"
            ) from error
    return image


def _to_8_bit(image: Image.Image, path: object) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"image {path} has values {low} to {high}, but 16-bit grey holds 0 to 65535; save it with 16 bit"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
