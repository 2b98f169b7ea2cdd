"""Random resize, crop and flip of the published training pipelines, in one step from the decoded image."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segheads.data.images import Picture, size_of
from segheads.data.resize import SCALE, rescaled_size

_STRIDE = 4  # class shares of a crop are counted on every fourth row and column


class _Drawn(NamedTuple):
    """A crop before the image is looked at."""

    corner: tuple[int, int]  # upper left, pixels of the original
    valid: tuple[int, int]
    factors: tuple[float, float]
    flip: bool
    labels: NDArray[np.integer]


class RandomScaleCrop:
    """Resize by a random ratio, crop at a random place, flip at random, pad to one size.

    What MMSegmentation's `Resize(ratio_range)`, `RandomCrop(cat_max_ratio)`, `RandomFlip` and `Pad` do
    (https://github.com/open-mmlab/mmsegmentation, the ADE20K pipeline of Segmenter and others), but only the pixels
    of the crop are ever resized. The result is that of resizing the whole image and then cropping, at a corner that is
    a whole pixel of the image rather than of the resized image: so PyTorch's vectorised 8-bit kernel can do it.

    Differences from the published code: shrinking averages over source pixels (antialias) where OpenCV skips them;
    labels are taken at pixel centres where OpenCV takes the upper left corner; and the shares of the classes in a crop
    are counted on every fourth row and column.

    Args:
        size: Side of the crop, or `(height, width)`, in pixels.
        scale: Limits of the longer and the shorter side at ratio 1.
        ratio_range: Smallest and largest ratio.
        max_class_ratio: A crop is drawn again, up to 10 times, while one class fills this share of its labelled pixels
            or more; 1 accepts every crop.
        flip_probability: Probability of a horizontal flip.
        ignore_index: The data set's label of "no class", which padding gets, too.
        flip_pairs: Pairs of classes that a flip makes of each other, such as a left and a right arm.

    Shape:
        Called with an image of a data set (RGB, or an array `(H, W, C)`), its labels `(H, W)` of uint8 or int16 and a
        generator; returns the crop `(C, h, w)`, uint8 or, of more than 8 bit, float32 in the stored values' scale, 0
        where padded (right and bottom), its labels `(h, w)`, of the same type, `ignore_index` where padded or
        ignored, and the height and width of the part that is not padding. Told a class and a number, too, it draws
        until a crop has more pixels of the class, 10 times, and then takes any.

    Examples:
        >>> crop = RandomScaleCrop(64, scale=(128, 96))
        >>> image, labels = np.zeros((120, 160, 3), np.uint8), torch.zeros(120, 160, dtype=torch.uint8)
        >>> pixels, classes, valid = crop(image, labels, np.random.default_rng(0))
        >>> pixels.shape, classes.shape
        (torch.Size([3, 64, 64]), torch.Size([64, 64]))
    """

    max_tries = 10

    def __init__(
        self,
        size: int | tuple[int, int] = 512,
        *,
        scale: tuple[int, int] = SCALE,
        ratio_range: tuple[float, float] = (0.5, 2.0),
        max_class_ratio: float = 0.75,
        flip_probability: float = 0.5,
        ignore_index: int = 255,
        flip_pairs: Sequence[tuple[int, int]] = (),
    ):
        self.size = (size, size) if isinstance(size, int) else size
        self.scale = scale
        self.ratio_range = ratio_range
        self.max_class_ratio = max_class_ratio
        self.flip_probability = flip_probability
        self.ignore_index = ignore_index
        self.flip_pairs = tuple(flip_pairs)

    def __call__(
        self, image: Picture, labels: Tensor, rng: np.random.Generator, wanted: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Draw one crop."""
        classes: NDArray[np.integer] = labels.numpy()
        drawn = self._draw(classes, rng)
        for _ in range(self.max_tries if wanted else 0):
            if wanted is None or np.count_nonzero(drawn.labels == wanted[0]) > wanted[1]:
                break
            drawn = self._draw(classes, rng)
        part = _resize_part(image, drawn.corner, drawn.valid, drawn.factors)
        return self._pad(part.flip(-1) if drawn.flip else part), torch.from_numpy(drawn.labels), drawn.valid

    def _draw(self, classes: NDArray[np.integer], rng: np.random.Generator) -> "_Drawn":
        """Where a crop is, and its labels."""
        resized = rescaled_size(classes.shape[0], classes.shape[1], self.scale, rng.uniform(*self.ratio_range))
        valid = (min(self.size[0], resized[0]), min(self.size[1], resized[1]))
        factors = (resized[0] / classes.shape[0], resized[1] / classes.shape[1])
        spans = [_source(valid[axis], factors[axis]) for axis in (0, 1)]
        room = [int(classes.shape[axis] - valid[axis] / factors[axis] + 1e-6) + 1 for axis in (0, 1)]
        corner = self._choose_corner(classes, spans, room, rng)
        rows, columns = (_shift(spans[axis], corner[axis], classes.shape[axis]) for axis in (0, 1))
        flip = rng.random() < self.flip_probability
        out_labels = np.full(self.size, self.ignore_index, classes.dtype)
        out_labels[: valid[0], : valid[1]] = _gather(classes, rows, columns[::-1] if flip else columns)
        if flip:
            _swap(out_labels, self.flip_pairs)
        return _Drawn(corner, valid, factors, bool(flip), out_labels)

    def _choose_corner(
        self, classes: NDArray[np.integer], spans: list[NDArray[np.intp]], room: list[int], rng: np.random.Generator
    ) -> tuple[int, int]:
        """Return the upper left pixel, of the original, of a crop that one class does not fill."""
        for _ in range(self.max_tries if self.max_class_ratio < 1 else 0):
            corner = (int(rng.integers(room[0])), int(rng.integers(room[1])))
            rows, columns = (_shift(spans[axis][::_STRIDE], corner[axis], classes.shape[axis]) for axis in (0, 1))
            if self._is_mixed(_gather(classes, rows, columns)):
                return corner
        return int(rng.integers(room[0])), int(rng.integers(room[1]))  # unchecked, as published

    def _is_mixed(self, classes: NDArray[np.integer]) -> bool:
        counts = np.bincount(classes[classes != self.ignore_index])
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.max_class_ratio * counts.sum())

    def _pad(self, part: Tensor) -> Tensor:
        if part.shape[1:] == self.size:
            return part
        padded = part.new_zeros((*self.size, len(part)))
        padded[: part.shape[1], : part.shape[2]] = part.permute(1, 2, 0)
        return padded.permute(2, 0, 1)  # (h, w, C) -> (C, h, w)


def _swap(labels: NDArray[Any], pairs: Sequence[tuple[int, int]]) -> None:
    """Make each class of a pair the other one."""
    for a, b in pairs:
        was_a, was_b = labels == a, labels == b
        labels[was_a], labels[was_b] = b, a


def _source(length: int, factor: float) -> NDArray[np.intp]:
    """Return the original pixels under the centres of resized pixels 0, 1, ..."""
    return ((np.arange(length) + 0.5) / factor).astype(np.intp)


def _shift(span: NDArray[np.intp], start: int, length: int) -> NDArray[np.intp]:
    return np.minimum(span + start, length - 1)


def _gather(classes: NDArray[np.integer], rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.integer]:
    # Two takes are six times as fast as classes[rows[:, None], columns]; the one over columns is the dear one.
    first, last = rows[0], rows[-1] + 1
    if last - first < len(rows):
        return classes[first:last].take(columns, 1).take(rows - first, 0)
    return classes.take(rows, 0).take(columns, 1)


def _resize_part(
    image: Picture, corner: tuple[int, int], valid: tuple[int, int], factors: tuple[float, float]
) -> Tensor:
    """Return `valid` pixels of the image resized by `factors`, from `corner` of the original on: `(C, h, w)`."""
    top, left = corner
    height, width = (math.ceil(valid[axis] / factors[axis]) + 1 for axis in (0, 1))  # + 1: the neighbour to blend with
    rows, columns = size_of(image)
    bottom, right = min(top + height, rows), min(left + width, columns)
    source: Any = (
        image[top:bottom, left:right] if isinstance(image, np.ndarray) else image.crop((left, top, right, bottom))
    )
    # The batch axis first: only then does PyTorch see the channels-last format, for which its kernel is twice as fast.
    part = torch.from_numpy(np.array(source))[None].permute(0, 3, 1, 2)  # (1, h, w, C) -> (1, C, h, w)
    if part.dtype != torch.uint8:
        part = part.float()
    # A hair larger, lest rounding loses the last row; factors are passed since they are not those of the sizes.
    scale_factor = tuple(factor * (1 + 1e-6) for factor in factors)
    resized = F.interpolate(part, scale_factor=scale_factor, mode="bilinear", antialias=True)[0]
    return resized[:, : valid[0], : valid[1]]
