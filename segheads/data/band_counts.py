"""Mean, spread and range of the channels of images, counted one image after another."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from segheads.data.images import Picture

LEVELS = 256


@dataclass(frozen=True)
class BandCounts:
    """Sums over the pixels of one image, in JSON values.

    Attributes:
        pixels: How many there are.
        largest: The largest value of all channels.
        bits: Bits of a value as it is stored.
        sums: Sum of the values of each channel.
        squares: Sum of their squares.
    """

    pixels: int
    largest: float
    bits: int
    sums: Sequence[float]
    squares: Sequence[float]


def count_bands(picture: Picture) -> BandCounts:
    """Count one image.

    Args:
        picture: A PIL image of 8 bit, or an array `(H, W, C)`. Values that are not finite are passed over.
    """
    if isinstance(picture, Image.Image):
        counts = np.array(picture.histogram()).reshape(-1, LEVELS)
    elif picture.dtype == np.uint8:
        counts = np.stack([np.bincount(band.ravel(), minlength=LEVELS) for band in np.moveaxis(picture, 2, 0)])
    else:
        values = np.where(np.isfinite(picture), picture, 0).astype(np.float64)
        sums, squares = values.sum((0, 1)), np.square(values).sum((0, 1))
        pixels, bits = picture.shape[0] * picture.shape[1], 8 * picture.dtype.itemsize
        return BandCounts(pixels, float(values.max()), bits, sums.tolist(), squares.tolist())
    levels = np.arange(LEVELS)
    largest = int(np.flatnonzero(counts.any(0))[-1])
    return BandCounts(int(counts[0].sum()), largest, 8, (counts @ levels).tolist(), (counts @ levels**2).tolist())


def band_statistics(counts: Sequence[BandCounts]) -> dict[str, Any]:
    """What `SplitScan` has of channels, from the counts of its images.

    Args:
        counts: One for each image.
    """
    channels = Counter(len(count.sums) for count in counts)
    found: dict[str, Any] = {
        "channels": dict(channels.most_common()),
        "largest": max((count.largest for count in counts), default=None),
        "bits": max((count.bits for count in counts), default=8),
    }
    if len(channels) == 1:
        pixels = sum(count.pixels for count in counts)
        mean = np.sum([count.sums for count in counts], 0) / pixels
        variance = np.sum([count.squares for count in counts], 0) / pixels - mean**2
        found["band_mean"] = tuple(mean.tolist())
        found["band_std"] = tuple(math.sqrt(max(0.0, value)) for value in variance.tolist())
    return found
