"""Predict one image: whole or in sliding windows, at one or several scales, with or without its mirror image."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segheads.functional.bilinear import wide
from segheads.functional.upsample import best_class
from segheads.inference.windows import (
    Grid,
    Model,
    Size,
    SmallImages,
    check_positive,
    gives_low_resolution,
    pair,
    resize,
    scores_in_tiles,
    sliding_window_logits,
    view_grid,
)

__all__ = [
    "average_views",
    "predict_labels",
    "predict_probabilities",
    "predict_with_confidence",
    "sliding_window_logits",
]


@torch.inference_mode()
def average_views(
    model: Model,
    views: Iterable[tuple[Tensor, bool]],
    size: tuple[int, int],
    *,
    window: Size | None = None,
    stride: Size | None = None,
    batch_size: int = 8,
    small_images: SmallImages = "shrink_window",
) -> Tensor:
    """Mean of the class probabilities of several views of one image: the part of `predict_probabilities` after scaling.

    For views that were scaled elsewhere, say from the original file instead of the resized image. Each view's logits
    are resized to `size` before the softmax; all views weigh the same.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w), in evaluation mode.
        views: pairs of an image (1, 3, h, w) and whether it is flipped left to right; they may come from a generator.
        size: height and width of the result.
        window: see `sliding_window_logits`; None shows the model the whole image.
        stride: see `sliding_window_logits`.
        batch_size: windows for each call of the model.
        small_images: `"shrink_window"` to the image (MMSegmentation), `"enlarge"` the image to the window (Segmenter).

    Shape:
        -> probabilities (K, H0, W0), H0 and W0 from `size`.

    Raises:
        ValueError: for no views at all, and see `sliding_window_logits`.

    Examples:
        >>> image = torch.rand(1, 3, 20, 30)
        >>> average_views(lambda x: x, [(image, False), (image.flip(-1), True)], (40, 60)).shape
        torch.Size([3, 40, 60])
    """
    size = pair("size", size)
    total, count = None, 0
    for image, flipped in views:
        total = _add_probabilities(
            total, _grid(model, image, flipped, size, window, stride, batch_size, small_images), size
        )
        count += 1
    if total is None:
        raise ValueError("at least one view is required, got 0; give at least one scale")
    return total.div_(count)


@torch.inference_mode()
def predict_probabilities(
    model: Model,
    image: Tensor,
    *,
    size: tuple[int, int] | None = None,
    window: Size | None = None,
    stride: Size | None = None,
    batch_size: int = 8,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    small_images: SmallImages = "shrink_window",
) -> Tensor:
    """Class probabilities of one image, averaged over scales and mirror images.

    The published multi-scale protocol is `scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True`.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w), in evaluation mode.
        image: as the model wants it, normalised.
        size: height and width of the result in pixels, say of the labels; None means the image's own.
        window: see `sliding_window_logits`; None shows the model the whole image.
        stride: see `sliding_window_logits`.
        batch_size: windows for each call of the model.
        scales: the image's sides are multiplied by each, rounded half up, and resized bilinearly.
        flip: every scale also left to right.
        small_images: `"shrink_window"` to the image (MMSegmentation), `"enlarge"` the image to the window (Segmenter).

    Shape:
        image (3, H, W) or (1, 3, H, W) -> probabilities (K, H0, W0), H0 and W0 from `size`.

    Raises:
        ValueError: for more than one image, no scales, and see `sliding_window_logits`.

    Examples:
        >>> predict_probabilities(lambda x: x, torch.rand(3, 20, 30), scales=(0.5, 1.0), flip=True).shape
        torch.Size([3, 20, 30])
    """
    image = _one_image(image)
    return average_views(
        model,
        _views(image, scales, flip),
        _output_size(image, size),
        window=window,
        stride=stride,
        batch_size=batch_size,
        small_images=small_images,
    )


@torch.inference_mode()
def predict_labels(
    model: Model,
    image: Tensor,
    *,
    size: tuple[int, int] | None = None,
    window: Size | None = None,
    stride: Size | None = None,
    batch_size: int = 8,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    small_images: SmallImages = "shrink_window",
) -> Tensor:
    """The most probable class of every pixel; arguments as of `predict_probabilities`.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> labels (H0, W0) of int64.

    Examples:
        >>> predict_labels(lambda x: x, torch.rand(3, 20, 30), window=16, stride=8).shape
        torch.Size([20, 30])
    """
    image, protocol = _one_image(image), (window, stride, batch_size, scales, flip, small_images)
    size = _output_size(image, size)
    labels = image.new_empty(size, dtype=torch.int64)
    for at, scores, _ in _scores_in_tiles(model, image, size, *protocol):
        labels[at] = best_class(scores)
    return labels


@torch.inference_mode()
def predict_with_confidence(
    model: Model,
    image: Tensor,
    *,
    size: tuple[int, int] | None = None,
    window: Size | None = None,
    stride: Size | None = None,
    batch_size: int = 8,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    small_images: SmallImages = "shrink_window",
) -> tuple[Tensor, Tensor]:
    """The labels of `predict_labels` and the probability of each, for calibration; arguments as there.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> labels (H0, W0) of int64 and probabilities (H0, W0).

    Examples:
        >>> labels, confidence = predict_with_confidence(lambda x: x, torch.rand(3, 20, 30))
        >>> bool(((confidence >= 1 / 3) & (confidence <= 1)).all())
        True
    """
    image, protocol = _one_image(image), (window, stride, batch_size, scales, flip, small_images)
    size = _output_size(image, size)
    labels, confidence = image.new_empty(size, dtype=torch.int64), image.new_empty(size, dtype=wide(image.dtype))
    for at, scores, are_logits in _scores_in_tiles(model, image, size, *protocol):
        labels[at] = best_class(scores)  # of the logits, as in predict_labels: the softmax's rounding can make ties
        confidence[at] = (scores.to(confidence.dtype).softmax(1) if are_logits else scores).amax(1)
    return labels, confidence


def _scores_in_tiles(
    model: Model,
    image: Tensor,
    size: tuple[int, int],
    window: Size | None,
    stride: Size | None,
    batch_size: int,
    scales: Sequence[float],
    flip: bool,
    small_images: SmallImages,
) -> Iterator[tuple[tuple[slice, slice], Tensor, bool]]:
    """Tile by tile what orders the classes, `(R, K, C)`: logits (True) of one view, else probabilities."""
    views, options = _views(image, scales, flip), (window, stride, batch_size, small_images)
    if len(scales) == 1 and not flip:  # the softmax of one view changes no order
        ((view, _),) = views
        grid = view_grid(model, view, size, *options)
        for at, (scores,) in scores_in_tiles([grid], size):
            yield at, scores, True
    elif gives_low_resolution(model):
        grids = [_grid(model, view, flipped, size, *options) for view, flipped in views]
        for at, each in scores_in_tiles(grids, size):
            yield at, _mean(scores.softmax(1) for scores in each), False
    else:
        mean = average_views(
            model, views, size, window=window, stride=stride, batch_size=batch_size, small_images=small_images
        )
        for at, (probabilities,) in scores_in_tiles([Grid(mean, *size)], size):
            yield at, probabilities, False


def _grid(model: Model, view: Tensor, flipped: bool, *options: Any) -> Grid:
    grid = view_grid(model, view, *options)
    return grid.flipped() if flipped else grid


def _add_probabilities(total: Tensor | None, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Adds one view's to the buffer `(K, H0, W0)`, which the first view creates."""
    if total is None:
        total = grid.logits.new_zeros((len(grid.logits), *size), dtype=wide(grid.logits.dtype))
    for (rows, columns), (scores,) in scores_in_tiles([grid], size):
        total[:, rows, columns] += scores.to(total.dtype).softmax(1).transpose(0, 1)  # (R, K, C) -> (K, R, C)
    return total


def _mean(tensors: Iterator[Tensor]) -> Tensor:
    total, count = next(tensors), 1
    for x in tensors:
        total, count = total.add_(x), count + 1
    return total.div_(count)


def _views(image: Tensor, scales: Sequence[float], flip: bool) -> Iterator[tuple[Tensor, bool]]:
    H, W = image.shape[-2:]
    for scale in scales:
        check_positive("scale", scale)
        view = resize(image, (max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))))
        yield view, False
        if flip:
            yield view.flip(-1), True


def _one_image(image: Tensor) -> Tensor:
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f"one image (3, H, W) or (1, 3, H, W) is required, got shape {tuple(image.shape)}; loop over them"
        )
    return image


def _output_size(image: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    return (image.shape[-2], image.shape[-1]) if size is None else pair("size", size)
