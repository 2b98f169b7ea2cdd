"""Read one image file: every Pillow mode to the form the library works with, bad files to clear errors."""

import os
import struct
from typing import Any

import numpy as np
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
    image, _ = open_image(path, "an image")
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DataError(
            f"image {path} holds floating-point pixels (mode F), whose range is not known; save it with 8 or 16 bit"
        )
    if image.mode.startswith("I"):
        image = _to_8_bit(image, path)
    return image.convert("RGB")


def open_image(path: str | os.PathLike[str], kind: str) -> tuple[Image.Image, tuple[Any, ...]]:
    """Open and decode an image file.

    Args:
        path: The file.
        kind: What it should be, for messages.

    Returns:
        The image as Pillow has it, and what its decoder was told of how values are stored.

    Raises:
        DataMissingError: There is no such file.
        DataError: The file is no image or is damaged.
    """
    check_file(path, kind)
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            tile = image.tile[0] if getattr(image, "tile", None) else ("", (), 0, ())  # gone once it is decoded
            image.load()
        except _BROKEN as error:
            size = os.fstat(file.fileno()).st_size
            raise DataError(
                f"{path} ({size} bytes) cannot be read as {kind}: {error}; "
                "replace the damaged file or take it out of the folder"
            ) from error
    coding = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    return image, (tile[0], *coding)


def _to_8_bit(image: Image.Image, path: object) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise DataError(
            f"image {path} has values {low} to {high}, but 16-bit grey holds 0 to 65535; save it with 16 bit"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
