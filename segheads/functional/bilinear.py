"""Bilinear upsampling as two small matrices, applied to one tile of pixels at a time.

Bilinear interpolation is separable: the scores of a rectangle of pixels are `rows @ logits @ columnsᵀ`, and the
gradient goes back through the transposes. A tile of all classes is at hand in a processor's caches when a loss or a
label is made of it, and no full-resolution tensor is ever held.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# On the CPU smaller ones fit into a core's own cache, but threads then wait longer for Python than they gain by it.
TILE_ELEMENTS = 1_600_000
TILE_PIXELS, TILE_COLUMNS = 1 << 16, 256  # on the CPU at most
TILE_ELEMENTS_ELSEWHERE = 16_000_000  # where launching kernels is what costs
KEPT_ELEMENTS = 1 << 20  # of the largest weights that are kept for the next image


class Block(NamedTuple):
    """Consecutive pixels along one axis, the part of the grid that they are made of, and with which weights."""

    pixels: slice
    source: slice
    weights: Tensor | None  # (pixels, source); None where the grid's points are the pixels


class Tile(NamedTuple):
    """A rectangle of pixels."""

    rows: Block
    columns: Block

    @property
    def num_pixels(self) -> int:
        """Pixels of the tile."""
        (down, *_), (across, *_) = self
        return (down.stop - down.start) * (across.stop - across.start)

    def source(self, logits: Tensor) -> Tensor:
        """The part of logits `(K, h, w)` that the tile's pixels are made of, `(K, h', w')`."""
        return logits[:, self.rows.source, self.columns.source]

    def upsample(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores of the tile's pixels, `(K, h, w)` to `(R, K, C)`, fp32 at least."""
        return self.interpolate(self.source(logits), out)

    def interpolate(self, source: Tensor, out: Tensor | None = None) -> Tensor:
        """The same of `source(logits)`, `(K, h', w')`, in `out`'s memory if given.

        Else, where there is nothing to upsample, the scores may be the source's own.
        """
        R, C = self.rows.weights, self.columns.weights
        x = source.transpose(0, 1)  # (K, h', w') -> (h', K, w')
        x = x.to(wide(x.dtype))
        if C is not None:
            x = x @ C.mT
        if R is None:
            return x if out is None else out[: x.numel()].view(x.shape).copy_(x)
        flat, shape = x.flatten(1), (len(R), *x.shape[1:])
        if out is None:
            return (R @ flat).view(shape)
        return torch.mm(R, flat, out=out[: len(R) * flat.shape[1]].view(len(R), -1)).view(shape)

    def gradient(self, of_scores: Tensor) -> Tensor:
        """What the gradient of the tile's scores, `(R, K, C)`, means for its source, `(K, h', w')`."""
        R, C = self.rows.weights, self.columns.weights
        x = of_scores
        if R is not None:
            x = (R.mT @ x.flatten(1)).view(-1, *x.shape[1:])  # (R, K, C) -> (h', K, C)
        return (x if C is None else x @ C).transpose(0, 1)


def bilinear_weights(n_in: int, n_out: int, part: slice = slice(None)) -> Tensor:
    """The matrix `(n_out, n_in)`, float64, of bilinear interpolation (align_corners False) along one axis.

    Args:
        n_in: Length before.
        n_out: Length after, longer or shorter.
        part: Which rows of the matrix to make; all of them by default.

    Examples:
        >>> bilinear_weights(2, 4)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    pixel = torch.arange(n_out)[part]
    position = ((pixel + 0.5).double() * (n_in / n_out) - 0.5).clamp(min=0, max=n_in - 1)
    lower = position.long()
    upper = (lower + 1).clamp(max=n_in - 1)
    share = position - lower
    weights = torch.zeros(len(pixel), n_in, dtype=torch.float64)
    row = torch.arange(len(pixel))
    weights[row, lower] = 1 - share
    weights[row, upper] += share  # at the border both are one
    return weights


def tiles(
    rows: Tensor | int, columns: Tensor | int, size: tuple[int, int], num_classes: int, like: Tensor
) -> Iterator[Tile]:
    """Cut an image into tiles.

    Args:
        rows: How many rows the grid has; or, where they are not the bilinear ones, their weights in each row of pixels.
        columns: The same of the columns.
        size: Height and width of the image, pixels.
        num_classes: Number of classes K.
        like: Where and in what precision (fp32 at least) to work.

    Shape:
        rows `(H, h)`, columns `(W, w)`, both float64 on the CPU.
    """
    (H, W), on_cpu = size, like.device.type == "cpu"
    width = TILE_COLUMNS if on_cpu else max(W, 1)
    height = (TILE_ELEMENTS if on_cpu else TILE_ELEMENTS_ELSEWHERE) // (num_classes * min(width, max(W, 1)))
    if on_cpu:
        height = min(height, TILE_PIXELS // min(width, max(W, 1)))
    across = _blocks(columns, W, width, like)
    for down in _blocks(rows, H, max(height, 4), like):
        for block in across:
            yield Tile(down, block)


class TileMemory(threading.local):
    """Memory for the scores of one tile after another; asking for it each time costs as much as using it.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def __call__(self, tile: Tile, num_classes: int, like: Tensor, slot: int = 0) -> Tensor:
        """Room for a tile's scores; that of another slot lasts meanwhile."""
        size = num_classes * tile.num_pixels
        if slot not in self.kept or self.kept[slot].numel() < size:
            self.kept[slot] = like.new_empty(size, dtype=wide(like.dtype))
        return self.kept[slot][:size]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which scores are computed: fp32, or fp64 where logits are."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(grid: Tensor | int, length: int, step: int, like: Tensor) -> Sequence[Block]:
    dtype = wide(like.dtype)
    is_real = type(like) is Tensor and not torch.compiler.is_compiling()  # else the weights are of one trace alone
    if is_real and (isinstance(grid, int) or grid.numel() <= KEPT_ELEMENTS):
        return _kept_blocks(grid, length, step, like.device, dtype)
    return tuple(_make_blocks(grid, length, step, like.device, dtype))


@lru_cache(maxsize=64)
def _kept_blocks(
    grid: Tensor | int, length: int, step: int, device: torch.device, dtype: torch.dtype
) -> tuple[Block, ...]:
    """Blocks for the next image of the same size: making them takes as long as using them, and a GPU waits for them.

    A tensor of weights is known again if it is the same object, as `segheads.inference` keeps those of its windows.
    """
    with torch.inference_mode(False), torch.no_grad():  # else they could not serve a training
        return tuple(_make_blocks(grid, length, step, device, dtype))


def _make_blocks(
    grid: Tensor | int, length: int, step: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Block]:
    for start in range(0, length, step):
        pixels = slice(start, min(start + step, length))
        if isinstance(grid, int) and grid == length:
            yield Block(pixels, pixels, None)
            continue
        part = bilinear_weights(grid, length, pixels) if isinstance(grid, int) else grid[pixels]
        used = part.any(0).nonzero().flatten()
        source = slice(int(used[0]), int(used[-1]) + 1)
        yield Block(pixels, source, part[:, source].to(device, dtype))
