"""Predict one image: whole or in sliding windows, at one or several scales, with or without its mirror image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]
SmallImages = Literal["shrink_window", "enlarge"]


@torch.inference_mode()
def sliding_window_logits(
    model: Model, images: Tensor, *, window: Size, stride: Size | None = None, batch_size: int = 8
) -> Tensor:
    """Logits of large images, averaged over the overlapping windows that the model is shown.

    Windows start at 0, s, 2s, ...; the last is moved back to end at the border. Where an image is smaller than the
    window, the window shrinks to it, as in MMSegmentation. Memory: the result and one batch of windows.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w), in evaluation mode.
        images: as the model wants them, normalised.
        window: height and width in pixels, or both as one number.
        stride: pixels between windows, at most `window`; None means `window`, without overlap.
        batch_size: windows for each call of the model, of all images together.

    Shape:
        images (B, 3, H, W) -> logits (B, K, H, W), of at least float32.

    Raises:
        ValueError: for sizes that are not positive, a stride that leaves gaps, logits of another size than the input.

    Examples:
        >>> images = torch.rand(2, 3, 40, 60)
        >>> sliding_window_logits(lambda x: 2 * x, images, window=24, stride=16).allclose(2 * images)
        True
    """
    if images.ndim != 4:
        raise ValueError(f"images (B, 3, H, W) are required, got shape {tuple(images.shape)}; add a batch dimension")
    (height, width), (down, right) = _window_and_stride(window, stride)
    _check_positive("batch_size", batch_size)
    B, _, H, W = images.shape
    h, w = min(height, H), min(width, W)
    tops, lefts = _starts(H, h, down), _starts(W, w, right)
    places = [(b, ..., slice(y, y + h), slice(x, x + w)) for b in range(B) for y in tops for x in lefts]
    total = images.new_empty(0)
    for start in range(0, len(places), batch_size):
        total = _add_windows(total, model, images, places[start : start + batch_size])
    times_seen = _cover(H, h, tops)[:, None] * _cover(W, w, lefts)
    return total.div_(times_seen.to(total))


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
    size = _pair("size", size)
    total, count = None, 0
    for image, flipped in views:
        probabilities = _view_logits(model, image, size, window, stride, batch_size, small_images).softmax(1)
        if flipped:
            probabilities = probabilities.flip(-1)
        total = probabilities if total is None else total.add_(probabilities)
        del probabilities  # 200 MB for ADE20K, not to be held while the next view is made
        count += 1
    if total is None:
        raise ValueError("at least one view is required, got 0; give at least one scale")
    return total.div_(count)[0]


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
    scores, _ = _scores(model, image, size, window, stride, batch_size, scales, flip, small_images)
    return scores.argmax(0)


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
    scores, are_logits = _scores(model, image, size, window, stride, batch_size, scales, flip, small_images)
    labels = scores.argmax(0)  # of the logits, as in predict_labels: the softmax's rounding can make ties
    return labels, (scores.softmax(0) if are_logits else scores).amax(0)


def _scores(
    model: Model,
    image: Tensor,
    size: tuple[int, int] | None,
    window: Size | None,
    stride: Size | None,
    batch_size: int,
    scales: Sequence[float],
    flip: bool,
    small_images: SmallImages,
) -> tuple[Tensor, bool]:
    """What orders the classes of each pixel, (K, H0, W0): logits (True) of one view, else probabilities."""
    image = _one_image(image)
    size = _output_size(image, size)
    if len(scales) == 1 and not flip:  # the softmax of one view changes no order
        ((view, _),) = _views(image, scales, flip)
        return _view_logits(model, view, size, window, stride, batch_size, small_images)[0], True
    views = _views(image, scales, flip)
    options: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size}
    return average_views(model, views, size, small_images=small_images, **options), False


def _add_windows(total: Tensor, model: Model, images: Tensor, places: list[tuple]) -> Tensor:
    """Adds one batch of windows to the buffer, which the first batch creates; what it held is freed on return."""
    windows = torch.stack([images[place] for place in places])
    logits = model(windows)
    if logits.shape[-2:] != windows.shape[-2:]:
        raise ValueError(
            f"model must return logits of its input's size {tuple(windows.shape[-2:])}, "
            f"got {tuple(logits.shape[-2:])}; upsample them"
        )
    if total.numel() == 0:
        shape = (len(images), logits.shape[1], *images.shape[-2:])
        total = logits.new_zeros(shape, dtype=_sum_dtype(logits))
    for place, window_logits in zip(places, logits, strict=True):
        total[place].add_(window_logits)
    return total


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)  # sums of bfloat16 lose digits


def _view_logits(
    model: Model,
    image: Tensor,
    size: tuple[int, int],
    window: Size | None,
    stride: Size | None,
    batch_size: int,
    small_images: SmallImages,
) -> Tensor:
    """Logits (1, K, H0, W0) of one view at the size of the result."""
    if small_images not in get_args(SmallImages):
        known = ", ".join(get_args(SmallImages))
        raise ValueError(f"small_images must be one of {known}, got {small_images!r}; choose one")
    if window is None:
        if stride is not None:
            raise ValueError(f"a stride needs a window, got stride {stride} and window None; give both or neither")
        logits = model(image)
        return _resize(logits.to(_sum_dtype(logits)), size)
    if small_images == "enlarge":
        image = _enlarge(image, _pair("window", window))
    return _resize(sliding_window_logits(model, image, window=window, stride=stride, batch_size=batch_size), size)


def _views(image: Tensor, scales: Sequence[float], flip: bool) -> Iterator[tuple[Tensor, bool]]:
    H, W = image.shape[-2:]
    for scale in scales:
        _check_positive("scale", scale)
        view = _resize(image, (max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))))
        yield view, False
        if flip:
            yield view.flip(-1), True


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _enlarge(image: Tensor, window: tuple[int, int]) -> Tensor:
    """The side that lacks most becomes the window's, the other grows with it and loses its fraction (Segmenter)."""
    (H, W), (h, w) = image.shape[-2:], window
    if h <= H and w <= W:
        return image
    return _resize(image, (h, int(W / H * h)) if h / H >= w / W else (int(H / W * w), w))


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _cover(length: int, window: int, starts: list[int]) -> Tensor:
    """How many windows see each row, or each column."""
    count = torch.zeros(length)
    for start in starts:
        count[start : start + window] += 1
    return count


def _one_image(image: Tensor) -> Tensor:
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(
            f"one image (3, H, W) or (1, 3, H, W) is required, got shape {tuple(image.shape)}; loop over them"
        )
    return image


def _output_size(image: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    return (image.shape[-2], image.shape[-1]) if size is None else _pair("size", size)


def _window_and_stride(window: Size, stride: Size | None) -> tuple[tuple[int, int], tuple[int, int]]:
    window = _pair("window", window)
    stride = window if stride is None else _pair("stride", stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride must be at most the window {window}, got {stride}; a larger one leaves gaps")
    return window, stride


def _pair(name: str, value: Size) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    _check_positive(name, height)
    _check_positive(name, width)
    return height, width


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}; give a number above 0")
