"""Predict one image: whole or in sliding windows, at one or several scales, with or without its mirror image."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.classes import Classes, Pairs
from segheads.functional.bilinear import wide
from segheads.functional.binary import above, probabilities, probabilities_
from segheads.functional.uncertainty import Uncertainty, ensemble_uncertainty
from segheads.functional.upsample import best_class
from segheads.inference.finite import check_finite
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.inference.windows import (
    Grid,
    Model,
    evaluation_of,
    gives_low_resolution,
    over_tiles,
    pair,
    resize,
    sliding_window_logits,
    view_grid,
    view_grids,
)

__all__ = [
    "average_views",
    "predict_labels",
    "predict_maps",
    "predict_probabilities",
    "predict_uncertainty",
    "predict_with_confidence",
    "sliding_window_logits",
]


@torch.no_grad()
def average_views(
    model: Model,
    views: Iterable[tuple[Tensor, bool]],
    size: tuple[int, int],
    protocol: InferenceProtocol = WHOLE,
    *,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
) -> Tensor:
    """Mean of the class probabilities of several views of one image: the part of `predict_probabilities` after scaling.

    For views that were scaled elsewhere, say from the original file instead of the resized image. Each view's logits
    are resized to `size` before the softmax, or an ensemble's probabilities; all views weigh the same.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w); a module is in evaluation mode meanwhile.
        views: pairs of an image (1, 3, h, w) and whether it is flipped left to right; they may come from a generator.
        size: height and width of the result.
        protocol: its windows and what is done to small images; the views are what its other options would make.
        batch_size: windows for each call of the model.
        flip_pairs: as of `predict_probabilities`.

    Shape:
        -> probabilities (K, H0, W0), H0 and W0 from `size`.

    Raises:
        ValueError: for no views at all, and see `sliding_window_logits`.
        ScoresError: for logits that are NaN or infinite; so do the functions below.

    Examples:
        >>> image = torch.rand(1, 3, 20, 30)
        >>> average_views(lambda x: x, [(image, False), (image.flip(-1), True)], (40, 60)).shape
        torch.Size([3, 40, 60])
    """
    size = pair("size", size)
    finite: list[Tensor] = []
    total, count, pairs = None, 0, _pairs(model, flip_pairs)
    with evaluation_of(model):
        for image, flipped in views:
            grid = _grid(model, image, flipped and pairs, size, protocol, batch_size)
            total = _add_probabilities(total, grid, size)
            finite += grid.finite
            count += 1
            del grid  # before the next view's is made
    if total is None:
        raise ValueError("at least one view is required, got 0; give at least one scale")
    check_finite(finite)
    return total.div_(count)


@torch.no_grad()
def predict_probabilities(
    model: Model,
    image: Tensor,
    protocol: InferenceProtocol = WHOLE,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
) -> Tensor:
    """Class probabilities of one image, averaged over scales and mirror images.

    The softmax of the logits; of a single class, K = 1, their sigmoid.

    The published multi-scale protocol has `scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True`.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w); a module is in evaluation mode meanwhile.
        image: as the model wants it, normalised.
        protocol: how the model is shown the image. Sides are multiplied by each of its scales and rounded half up.
        size: height and width of the result in pixels, say of the labels; None means that of `image`.
        batch_size: windows for each call of the model.
        flip_pairs: pairs of classes, by index, that change places in a mirrored image, such as a left and a right arm;
            None takes those of the model's `classes`, if it has any.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> probabilities (K, H0, W0), H0 and W0 from `size`.

    Raises:
        ValueError: for more than one image, and see `sliding_window_logits`.
        ScoresError: for logits that are NaN or infinite.

    Examples:
        >>> protocol = InferenceProtocol(scales=(0.5, 1.0), flip=True)
        >>> predict_probabilities(lambda x: x, torch.rand(3, 20, 30), protocol).shape
        torch.Size([3, 20, 30])
    """
    image = _one_image(image)
    views, size = _views(image, protocol), _output_size(image, size)
    return average_views(model, views, size, protocol, batch_size=batch_size, flip_pairs=flip_pairs)


@torch.no_grad()
def predict_labels(
    model: Model,
    image: Tensor,
    protocol: InferenceProtocol = WHOLE,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
) -> Tensor:
    """The most probable class of every pixel; arguments as of `predict_probabilities`.

    Of a single class it is 1 where its probability is above `protocol.threshold`, and 0 elsewhere.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> labels (H0, W0) of int64.

    Examples:
        >>> predict_labels(lambda x: x, torch.rand(3, 20, 30), InferenceProtocol(window=16, stride=8)).shape
        torch.Size([20, 30])
    """
    (maps,) = predict_maps(model, [image], protocol, sizes=[size], batch_size=batch_size, flip_pairs=flip_pairs)
    return maps.labels


@torch.no_grad()
def predict_with_confidence(
    model: Model,
    image: Tensor,
    protocol: InferenceProtocol = WHOLE,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
) -> tuple[Tensor, Tensor]:
    """The labels of `predict_labels` and the probability of each, for calibration; arguments as there.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> labels (H0, W0) of int64 and probabilities (H0, W0).

    Examples:
        >>> labels, confidence = predict_with_confidence(lambda x: x, torch.rand(3, 20, 30))
        >>> bool(((confidence >= 1 / 3) & (confidence <= 1)).all())
        True
    """
    options: Any = {"batch_size": batch_size, "flip_pairs": flip_pairs, "confidence": True}
    (maps,) = predict_maps(model, [image], protocol, sizes=[size], **options)
    return maps.labels, maps.confidence  # type: ignore[return-value]  # which was asked for


class Maps(NamedTuple):
    """What is known of each pixel of an image.

    Attributes:
        labels: The most probable class, `(H, W)`, int64.
        confidence: Its probability, `(H, W)`; None unless it was asked for.
        probability: That of every class, `(K, H, W)`; None unless it was asked for.
        entropy: Of the classes' probabilities, nats, `(H, W)`; None unless it was asked for.
    """

    labels: Tensor
    confidence: Tensor | None = None
    probability: Tensor | None = None
    entropy: Tensor | None = None


@torch.no_grad()
def predict_maps(
    model: Model,
    images: Sequence[Tensor],
    protocol: InferenceProtocol = WHOLE,
    *,
    sizes: Sequence[tuple[int, int] | None] | None = None,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
    confidence: bool = False,
    probability: bool = False,
    entropy: bool = False,
) -> Iterator[Maps]:
    """Labels of several images, and what else is asked for, from one pass of the model.

    A `SegmentationModel` sees windows of one size together, whatever images they are of: whole images where those are
    of one size. The other arguments are as of `predict_probabilities`.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w); a module is in evaluation mode meanwhile.
        images: as the model wants them, normalised, on its device.
        protocol: how the model is shown each image.
        sizes: height and width of each result, pixels; None means that of the image.
        batch_size: windows for each call of the model.
        flip_pairs: pairs of classes that change places in a mirrored image.
        confidence: give the probability of each label, too.
        probability: give that of all classes, too.
        entropy: give that of the classes' probabilities, too.

    Shape:
        images (3, H, W) or (1, 3, H, W), each of its own size -> labels (H0, W0) of int64, confidence and entropy
        (H0, W0), probability (K, H0, W0), one image after the other.

    Raises:
        ValueError: for no image in an entry, or several, and see `sliding_window_logits`.
        ScoresError: when an image's turn comes whose logits are NaN or infinite.

    Examples:
        >>> images = [torch.rand(3, 20, 30), torch.rand(3, 8, 9)]
        >>> [maps.labels.shape for maps in predict_maps(lambda x: x, images)]
        [torch.Size([20, 30]), torch.Size([8, 9])]
    """
    images = [_one_image(image) for image in images]
    given = [None] * len(images) if sizes is None else sizes
    places = [_output_size(image, size) for image, size in zip(images, given, strict=True)]
    views = views_of_images(model, images, places, protocol, batch_size=batch_size, flip_pairs=flip_pairs)
    return (
        maps_of(own, size, protocol, confidence=confidence, probability=probability, entropy=entropy)
        for own, size in zip(views, places, strict=True)
    )


@torch.no_grad()
def views_of_images(
    model: Model,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    protocol: InferenceProtocol,
    *,
    batch_size: int = 8,
    flip_pairs: Pairs | None = None,
) -> list[list[Grid]]:
    """The grids of all views of each image `(1, 3, H, W)`, for `maps_of`; arguments as of `predict_maps`."""
    pairs = _pairs(model, flip_pairs)
    with evaluation_of(model):
        if gives_low_resolution(model):
            found: list[list[Grid]] = [[] for _ in images]
            for of_one_kind in zip(*(_views(image, protocol) for image in images), strict=True):
                grids = view_grids(model, [view for view, _ in of_one_kind], sizes, protocol, batch_size)
                for own, grid, (_, flipped) in zip(found, grids, of_one_kind, strict=True):
                    own.append(grid.flipped(pairs) if flipped else grid)
            return found
        if len(protocol.scales) == 1 and not protocol.flip:
            options = protocol, batch_size
            return [
                [view_grid(model, view, size, *options) for view, _ in _views(image, protocol)]
                for image, size in zip(images, sizes, strict=True)
            ]
        means = (
            average_views(model, _views(image, protocol), size, protocol, batch_size=batch_size, flip_pairs=flip_pairs)
            for image, size in zip(images, sizes, strict=True)
        )
        return [[Grid(mean, *size, are_probabilities=True)] for mean, size in zip(means, sizes, strict=True)]


@torch.no_grad()
def maps_of(
    views: Sequence[Grid],
    size: tuple[int, int],
    protocol: InferenceProtocol,
    *,
    confidence: bool = False,
    probability: bool = False,
    entropy: bool = False,
) -> Maps:
    """What the views of one image say of its pixels.

    Args:
        views: The image's, as `views_of_images` gave them.
        size: Height and width, pixels.
        protocol: Its threshold counts.
        confidence: Give the probability of each label, too.
        probability: Give that of all classes, too.
        entropy: Give that of the classes' probabilities, too.

    Raises:
        ScoresError: For logits that are NaN or infinite.
    """
    if flags := [flag for grid in views for flag in grid.finite]:  # none where a mean was checked as it was taken
        check_finite(flags)
    logits = views[0].logits
    kind = wide(logits.dtype)
    labels = logits.new_empty(size, dtype=torch.int64)
    sure, doubt = (logits.new_empty(size, dtype=kind) if asked else None for asked in (confidence, entropy))
    every = logits.new_empty((len(logits), *size), dtype=kind) if probability else None
    only_labels = sure is None and every is None and doubt is None

    def use(at: tuple[slice, slice], each: Iterator[Tensor]) -> None:
        scores, are_logits = _ordering(views, each)
        labels[at] = _best(scores, are_logits, protocol, may_change=only_labels)
        if only_labels:
            return
        shares = probabilities(scores.to(kind)) if are_logits else scores
        if every is not None:
            every[:, at[0], at[1]] = shares.transpose(0, 1).to(kind)  # (R, K, C) -> (K, R, C)
        if shares.shape[1] == 1:
            shares = torch.cat([1 - shares, shares], dim=1)
        if sure is not None:
            sure[at] = shares.gather(1, labels[at][:, None])[:, 0] if len(logits) == 1 else shares.amax(1)
        if doubt is not None:
            doubt[at] = torch.special.entr(shares).sum(1)

    over_tiles(views, size, use)
    return Maps(labels, sure, every, doubt)


@torch.no_grad()
def predict_uncertainty(
    model: nn.Module,
    image: Tensor,
    protocol: InferenceProtocol = WHOLE,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
) -> Uncertainty:
    """How sure an ensemble is of each pixel; the maps of windows and views are averaged as logits are.

    With the protocol `WHOLE` they are those of `model.predict(..., return_uncertainty=True)`.

    Args:
        model: a `SegmentationModel` whose head is an ensemble.
        image: as the model wants it, normalised.
        protocol: how the model is shown the image.
        size: height and width of the result in pixels; None means that of `image`.
        batch_size: windows for each call of the model.

    Shape:
        image (3, H, W) or (1, 3, H, W) -> three maps (H0, W0), float32, H0 and W0 from `size`.

    Raises:
        ValueError: for a model that is no ensemble, and for more than one image.
    """
    image = _one_image(image)
    size, count = _output_size(image, size), 0
    total = image.new_zeros((len(Uncertainty._fields), *size), dtype=torch.float32)
    doubts = _Doubts(model)
    finite: list[Tensor] = []

    def add(at: tuple[slice, slice], each: Iterator[Tensor]) -> None:
        (maps,) = each
        total[:, at[0], at[1]] += maps.transpose(0, 1)  # (R, 3, C) -> (3, R, C)

    with evaluation_of(model):
        for view, flipped in _views(image, protocol):
            grid = _grid(doubts, view, flipped and (), size, protocol, batch_size)
            finite += grid.finite
            over_tiles([grid], size, add)
            count += 1
    check_finite(finite)
    return Uncertainty(*total.div_(count))


class _Doubts:
    """A model that gives three maps of uncertainty on the head's grid in place of logits."""

    def __init__(self, model: Any) -> None:
        head = getattr(model, "head", None)
        if not getattr(head, "is_ensemble", False):
            name = type(model if head is None else head).__name__
            raise ValueError(f"uncertainty needs a model whose head has learners, such as senformer; got {name}")
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        return self.low_resolution(images)[0]

    def low_resolution(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        (merged, *learners), covered = self.model.predictions(images)
        return torch.stack(ensemble_uncertainty(merged, learners), dim=1), covered


def _ordering(views: Sequence[Grid], scores: Iterator[Tensor]) -> tuple[Tensor, bool]:
    """Of a tile's scores in each view what orders its classes, and whether it is logits, of one view; else shares."""
    if len(views) == 1:  # the softmax of one view changes no order
        return next(scores), not views[0].are_probabilities
    of_views = (x if grid.are_probabilities else probabilities_(x) for x, grid in zip(scores, views, strict=True))
    return _mean(of_views), False


def _best(scores: Tensor, are_logits: bool, protocol: InferenceProtocol, *, may_change: bool) -> Tensor:
    """The label of each pixel from logits or probabilities `(R, K, C)`, which it may change or not."""
    protocol.check_threshold(scores.shape[1])
    if scores.shape[1] > 1:
        # of logits, too: the softmax's rounding makes ties
        return best_class(scores, out=scores if may_change else None)
    return (above(scores[:, 0], protocol.threshold) > 0 if are_logits else scores[:, 0] > protocol.threshold).long()


def _pairs(model: Model, flip_pairs: Pairs | None) -> Pairs:
    """Which classes change places in a mirrored image: as given, or the model's own."""
    classes = getattr(model, "classes", None)
    own = classes.flip_pairs if isinstance(classes, Classes) else ()
    return own if flip_pairs is None else flip_pairs


def _grid(model: Model, view: Tensor, flipped: Pairs | Literal[False], *options: Any) -> Grid:
    """The grid of a view; of a mirrored one, for which there are pairs or none, it is turned back."""
    grid = view_grid(model, view, *options)
    return grid if flipped is False else grid.flipped(flipped)


def _add_probabilities(total: Tensor | None, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Adds one view's to the buffer `(K, H0, W0)`, which the first view creates."""
    if total is None:
        total = grid.logits.new_zeros((len(grid.logits), *size), dtype=wide(grid.logits.dtype))
    sums = total

    def add(at: tuple[slice, slice], each: Iterator[Tensor]) -> None:
        (scores,) = each
        shares = scores if grid.are_probabilities else probabilities_(scores)
        sums[:, at[0], at[1]] += shares.transpose(0, 1)  # (R, K, C) -> (K, R, C)

    over_tiles([grid], size, add)
    return total


def _mean(tensors: Iterator[Tensor]) -> Tensor:
    total, count = next(tensors), 1
    for x in tensors:
        total, count = total.add_(x), count + 1
    return total.div_(count)


def _views(image: Tensor, protocol: InferenceProtocol) -> Iterator[tuple[Tensor, bool]]:
    H, W = protocol.scaled_size(image.shape[-2], image.shape[-1])
    if image.shape[-2:] != (H, W):
        wider = image.to(wide(image.dtype))  # the CPU has no antialiasing in half precision
        image = F.interpolate(wider, (H, W), mode="bilinear", antialias=True).to(image.dtype)
    for scale in protocol.scales:
        view = resize(image, (max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))))
        yield view, False
        if protocol.flip:
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
