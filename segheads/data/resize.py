"""Sizes that keep the aspect ratio, and the way of one image into a model."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segheads.data.images import Picture, full_scale, size_of

SCALE = (2048, 512)  # (longest, shortest) side, the published setting for ADE20K


def rescaled_size(height: int, width: int, scale: tuple[int, int] = SCALE, ratio: float = 1.0) -> tuple[int, int]:
    """Return the largest size of the same aspect ratio whose sides fit into `ratio` times `scale`.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        scale: Limits of the longer and the shorter side, in either order.
        ratio: A factor on both limits.

    Returns:
        `(height, width)` in pixels.

    Examples:
        >>> rescaled_size(512, 683), rescaled_size(300, 3000)
        ((512, 683), (205, 2048))
    """
    factor = min(ratio * max(scale) / max(height, width), ratio * min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_keep_ratio(image: Picture, scale: tuple[int, int] = SCALE) -> Picture:
    """Resize an image to fit into `scale`, bilinear, with its aspect ratio kept.

    When shrinking, Pillow averages over the source pixels (antialias); the published pipeline's OpenCV does not.

    Args:
        image: A PIL image, or an array `(H, W, C)`, whose bands are resized in floats unless they are of 8 bit.
        scale: Limits of the longer and the shorter side.

    Examples:
        >>> resize_keep_ratio(Image.new("RGB", (200, 100))).size
        (1024, 512)
    """
    height, width = rescaled_size(*size_of(image), scale)
    if isinstance(image, Image.Image):
        return image.resize((width, height), Image.Resampling.BILINEAR)
    values = image if image.dtype == np.uint8 else image.astype(np.float32)
    bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(values, 2, 0)]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)) for band in bands], axis=2)


def to_input(image: Picture, mean: Sequence[float], std: Sequence[float], *, bit_depth: int | None = None) -> Tensor:
    """Turn an image into the normalised floats that a backbone expects.

    Args:
        image: An image, as a rule from `read_image`; PIL images of other modes are converted to RGB.
        mean: Per channel, for values in [0, 1], which are stored values divided by the largest of the bit depth; the
            model's `data_config` knows it.
        std: Per channel, likewise.
        bit_depth: Of an array's values, see `ImageForm`; None means 8.

    Shape:
        Returns `(C, H, W)`, float32.

    Raises:
        ValueError: The image has other channels than there are means.

    Examples:
        >>> to_input(Image.new("RGB", (4, 2), (255, 0, 0)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[:, 0, 0]
        tensor([ 1., -1., -1.])
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.array(image))
    if pixels.shape[2] != len(mean):
        raise ValueError(f"the image has {pixels.shape[2]} channels, and the model takes {len(mean)}")
    centre = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1) * full_scale(bit_depth)
    spread = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1) * full_scale(bit_depth)
    return pixels.permute(2, 0, 1).contiguous().float().sub_(centre).div_(spread)  # (H, W, C) -> (C, H, W)
