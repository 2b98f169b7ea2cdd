"""Sizes that keep the aspect ratio, and the way of one image into a model."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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


def resize_keep_ratio(image: Image.Image, scale: tuple[int, int] = SCALE) -> Image.Image:
    """Resize an image to fit into `scale`, bilinear, with its aspect ratio kept.

    When shrinking, Pillow averages over the source pixels (antialias); the published pipeline's OpenCV does not.

    Args:
        image: Any image.
        scale: Limits of the longer and the shorter side.

    Examples:
        >>> resize_keep_ratio(Image.new("RGB", (200, 100))).size
        (1024, 512)
    """
    height, width = rescaled_size(image.height, image.width, scale)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_input(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn an image into the normalised floats that a backbone expects.

    Args:
        image: An image, as a rule from `read_image`; other modes are converted to RGB.
        mean: Per channel, for values in [0, 1]; the backbone's `data_config` knows it.
        std: Per channel, likewise.

    Shape:
        Returns `(3, H, W)`, float32.

    Examples:
        >>> to_input(Image.new("RGB", (4, 2), (255, 0, 0)), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))[:, 0, 0]
        tensor([ 1., -1., -1.])
    """
    pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    centre = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) * 255
    spread = torch.tensor(std, dtype=torch.float32).view(3, 1, 1) * 255
    return pixels.permute(2, 0, 1).contiguous().float().sub_(centre).div_(spread)  # (H, W, 3) -> (3, H, W)
