"""Scores of one view of an image, whole or in sliding windows: a grid of logits and the weights of its upsampling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from segheads.functional.bands import run_parts
from segheads.functional.bilinear import TileMemory, bilinear_weights, tiles, wide
from segheads.functional.upsample import log_of, probabilities_of
from segheads.inference.finite import all_finite, check_finite
from segheads.inference.protocol import InferenceProtocol, Size
from segheads.modules import evaluating

Model = Callable[[Tensor], Tensor]


class Grid(NamedTuple):
    """Logits `(K, h, w)` whose scores at the pixels are `rows @ logits @ columnsᵀ`; or h and w, if they are upsampled.

    Averaging overlapping windows, cropping padding and resizing are all linear and separable, so the windows' logits,
    side by side, are one grid, and what happens to them on the way to the pixels is in the weights. Of a model that
    averages probabilities, these stand in the place of logits.
    """

    logits: Tensor
    rows: Tensor | int  # (H, h), float64 on the CPU
    columns: Tensor | int  # (W, w)
    finite: Sequence[Tensor] = ()  # whether the model's scores are, as `all_finite` says
    are_probabilities: bool = False

    def flipped(self, pairs: Sequence[tuple[int, int]] = ()) -> "Grid":
        """The grid whose scores are left to right what this one's are right to left; paired classes change places."""
        logits = _swapped(self.logits, pairs, self.are_probabilities)
        if isinstance(self.columns, int):
            return self._replace(logits=logits.flip(-1))
        return self._replace(logits=logits, columns=_turned(self.columns))


def _swapped(logits: Tensor, pairs: Sequence[tuple[int, int]], are_probabilities: bool) -> Tensor:
    """Logits or probabilities `(K, h, w)` in which the classes of each pair have changed places."""
    if not pairs:
        return logits
    if len(logits) == 1:  # one class and what is not: the pair are these two
        return 1 - logits if are_probabilities else -logits
    order = list(range(len(logits)))
    for a, b in pairs:
        order[a], order[b] = b, a
    return logits[order]


def over_tiles(
    grids: Sequence[Grid], size: tuple[int, int], use: Callable[[tuple[slice, slice], Iterator[Tensor]], None]
) -> None:
    """Call `use` for each tile of an image with its rows and columns, and its pixels' scores in each of several grids.

    Scores are `(R, K, C)`, and `use` may change them; those of the first grid last, of another until the next. On the
    CPU it is called in several threads.
    """
    K, memory = len(grids[0].logits), TileMemory()
    parts = list(zip(*(tiles(grid.rows, grid.columns, size, K, grid.logits) for grid in grids), strict=True))

    def compute(index: int) -> None:
        group = parts[index]

        def scores() -> Iterator[Tensor]:
            for number, (tile, grid) in enumerate(zip(group, grids, strict=True)):
                room = memory(tile, K, grid.logits, slot=min(number, 1))
                with torch.autocast(grid.logits.device.type, enabled=False):  # 16 bits change one label in a hundred
                    x = tile.upsample(grid.logits, out=room)
                yield x

        use((group[0].rows.pixels, group[0].columns.pixels), scores())

    run_parts(len(parts), compute, lambda *_: None, [grid.logits for grid in grids])


@lru_cache(maxsize=16)
def _turned(weights: Tensor) -> Tensor:
    """The weights of the mirrored pixels, the same object each time, as which `tiles` knows them again."""
    return weights.flip(0)


def gives_low_resolution(model: Model) -> bool:
    """Whether a model gives its logits before their upsampling, as `SegmentationModel.low_resolution` does.

    It is its class that is asked: a compiled or parallel model passes attributes on, but then is not what is called.
    """
    return hasattr(type(model), "low_resolution")


def view_grid(model: Model, image: Tensor, size: tuple[int, int], protocol: InferenceProtocol, batch_size: int) -> Grid:
    """Grid of one view `(1, 3, H, W)` of an image, for an output of `size`; of the protocol its windows alone."""
    if gives_low_resolution(model):
        return view_grids(model, [image], [size], protocol, batch_size)[0]
    window, stride = protocol.window, protocol.stride
    if window is not None and protocol.small_images == "enlarge":
        image = _enlarge(image, pair("window", window))
    of_probabilities = averages_probabilities(model)
    if window is None:
        logits = model(image)
        finite = [all_finite(logits)]
        logits = probabilities_of(logits) if of_probabilities else logits
    else:
        logits, finite = _sliding_window(model, image, window, stride, batch_size)
    return Grid(logits[0], logits.shape[2], logits.shape[3], finite, of_probabilities)


def averages_probabilities(model: Model) -> bool:
    """Whether a model's logits are logarithms of what is to be averaged; also asked of one in DDP or compiled."""
    return bool(getattr(getattr(model, "module", model), "averages_probabilities", False))


@torch.no_grad()
def sliding_window_logits(
    model: Model, images: Tensor, *, window: Size, stride: Size | None = None, batch_size: int = 8
) -> Tensor:
    """Logits of large images, averaged over the overlapping windows that the model is shown.

    Of an ensemble the probabilities are averaged, and the result is their logarithm.

    Windows start at 0, s, 2s, ...; the last is moved back to end at the border. Where an image is smaller than the
    window, the window shrinks to it, as in MMSegmentation. Memory: the result and one batch of windows.

    Args:
        model: from images (n, 3, h, w) to logits (n, K, h, w); a module is in evaluation mode meanwhile.
        images: as the model wants them, normalised.
        window: height and width in pixels, or both as one number.
        stride: pixels between windows, at most `window`; None means `window`, without overlap.
        batch_size: windows for each call of the model, of all images together.

    Shape:
        images (B, 3, H, W) -> logits (B, K, H, W), of at least float32.

    Raises:
        ValueError: for sizes that are not positive, a stride that leaves gaps, logits of another size than the input.
        ScoresError: for logits that are NaN or infinite.

    Examples:
        >>> images = torch.rand(2, 3, 40, 60)
        >>> sliding_window_logits(lambda x: 2 * x, images, window=24, stride=16).allclose(2 * images)
        True
    """
    if images.ndim != 4:
        raise ValueError(f"images (B, 3, H, W) are required, got shape {tuple(images.shape)}; add a batch dimension")
    with evaluation_of(model):
        logits, finite = _sliding_window(model, images, window, stride, batch_size)
    check_finite(finite)
    return log_of(logits) if averages_probabilities(model) else logits


def evaluation_of(model: Model) -> AbstractContextManager[None]:
    """Evaluation mode of a module, which gets its mode back; nothing of another callable."""
    return evaluating(model) if isinstance(model, nn.Module) else nullcontext()


def _sliding_window(
    model: Model, images: Tensor, window: Size, stride: Size | None, batch_size: int
) -> tuple[Tensor, list[Tensor]]:
    """The averaged logits, or probabilities, and whether the logits of each batch of windows are finite."""
    (height, width), (down, right) = _window_and_stride(window, stride)
    check_positive("batch_size", batch_size)
    B, _, H, W = images.shape
    h, w = min(height, H), min(width, W)
    tops, lefts = _starts(H, h, down), _starts(W, w, right)
    places = [(b, ..., slice(y, y + h), slice(x, x + w)) for b in range(B) for y in tops for x in lefts]
    total, finite = images.new_empty(0), []
    for start in range(0, len(places), batch_size):
        total, flag = _add_windows(total, model, images, places[start : start + batch_size])
        finite.append(flag)
    times_seen = _cover(H, h, tops)[:, None] * _cover(W, w, lefts)
    return total.div_(times_seen.to(total)), finite


def view_grids(
    model: Any, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], protocol: InferenceProtocol, batch_size: int
) -> list[Grid]:
    """Grids of one view `(1, 3, H, W)` of each of several images, whose windows of one size the model sees together.

    Of one image it is what `view_grid` gives; the model must give its logits before their upsampling.
    """
    window, stride = protocol.window, protocol.stride
    if window is not None and protocol.small_images == "enlarge":
        images = [_enlarge(image, pair("window", window)) for image in images]
    return _grids_of_windows(model, images, sizes, window, stride, batch_size)


class _Windows(NamedTuple):
    """The windows of an image, all of one size."""

    parts: list[Tensor]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]


def _windows(image: Tensor, window: Size | None, stride: Size | None) -> _Windows:
    H, W = image.shape[-2:]
    (height, width), (down, right) = _window_and_stride((H, W) if window is None else window, stride)
    h, w = min(height, H), min(width, W)
    tops, lefts = _starts(H, h, down), _starts(W, w, right)
    return _Windows([image[0, :, y : y + h, x : x + w] for y in tops for x in lefts], tuple(tops), tuple(lefts))


def _grids_of_windows(
    model: Any,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    window: Size | None,
    stride: Size | None,
    batch_size: int,
) -> list[Grid]:
    """The low-resolution logits of all windows of each image, side by side."""
    check_positive("batch_size", batch_size)
    windows = [_windows(image, window, stride) for image in images]
    alike: dict[tuple[int, ...], list[int]] = {}  # images by the size of their windows
    for index, own in enumerate(windows):
        alike.setdefault(tuple(own.parts[0].shape), []).append(index)
    grids: dict[int, Grid] = {}
    for indices in alike.values():
        parts, logits = [part for index in indices for part in windows[index].parts], []
        for start in range(0, len(parts), batch_size):
            found, covered = model.low_resolution(torch.stack(parts[start : start + batch_size]))
            logits.append(found)
        counts = [len(windows[index].parts) for index in indices]
        for index, own in zip(indices, torch.cat(logits).split(counts), strict=True):
            grids[index] = _side_by_side(model, own, covered, windows[index], images[index], sizes[index])
    return [grids[index] for index in range(len(images))]


def _side_by_side(
    model: Any, logits: Tensor, covered: tuple[int, int], windows: _Windows, image: Tensor, size: tuple[int, int]
) -> Grid:
    """The grid of one image from its windows' logits `(n, K, h, w)`."""
    (h, w), (H, W) = windows.parts[0].shape[-2:], image.shape[-2:]
    grid = rearrange(logits, "(t l) k h w -> k (t h) (l w)", t=len(windows.tops))
    rows = _weights(logits.shape[2], covered[0], windows.tops, h, H, size[0])
    columns = _weights(logits.shape[3], covered[1], windows.lefts, w, W, size[1])
    finite, of_probabilities = [all_finite(grid)], averages_probabilities(model)
    return Grid(probabilities_of(grid) if of_probabilities else grid, rows, columns, finite, of_probabilities)


@lru_cache(maxsize=32)
def _weights(n: int, covered: int, starts: tuple[int, ...], window: int, length: int, out: int) -> Tensor:
    """From `n` grid points of each window, along one axis, to `out` pixels.

    Each window is upsampled to the pixels that it covers, cropped, put in its place and averaged with the others; the
    image is then resized.
    """
    own = bilinear_weights(n, covered)[:window]
    weights = torch.zeros(length, len(starts) * n, dtype=torch.float64)
    for number, start in enumerate(starts):
        weights[start : start + window, number * n : (number + 1) * n] = own
    weights /= _cover(length, window, starts)[:, None]
    return weights if length == out else bilinear_weights(length, out) @ weights


def _add_windows(total: Tensor, model: Model, images: Tensor, places: list[tuple]) -> tuple[Tensor, Tensor]:
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
        total = logits.new_zeros(shape, dtype=wide(logits.dtype))  # sums of bfloat16 lose digits
    finite = all_finite(logits)
    for place, window in zip(
        places, probabilities_of(logits) if averages_probabilities(model) else logits, strict=True
    ):
        total[place].add_(window)
    return total, finite


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, and nothing where the size is the same."""
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _enlarge(image: Tensor, window: tuple[int, int]) -> Tensor:
    """The side that lacks most becomes the window's, the other grows with it and loses its fraction (Segmenter)."""
    (H, W), (h, w) = image.shape[-2:], window
    if h <= H and w <= W:
        return image
    return resize(image, (h, int(W / H * h)) if h / H >= w / W else (int(H / W * w), w))


def _starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


def _cover(length: int, window: int, starts: Sequence[int]) -> Tensor:
    """How many windows see each row, or each column."""
    count = torch.zeros(length)
    for start in starts:
        count[start : start + window] += 1
    return count


def _window_and_stride(window: Size, stride: Size | None) -> tuple[tuple[int, int], tuple[int, int]]:
    window = pair("window", window)
    stride = window if stride is None else pair("stride", stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride must be at most the window {window}, got {stride}; a larger one leaves gaps")
    return window, stride


def pair(name: str, value: Size) -> tuple[int, int]:
    """Height and width of a size, which must be positive."""
    height, width = (value, value) if isinstance(value, int) else value
    check_positive(name, height)
    check_positive(name, width)
    return height, width


def check_positive(name: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}; give a number above 0")
