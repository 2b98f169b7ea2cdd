"""Parts whose arithmetic of sizes torch.export cannot follow, exchanged while exporting for such as it can."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, pos_embed_sincos
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from segheads.functional.shapes import crop

RESAMPLE = "resample_abs_pos_embed"  # in every file of timm that has position embeddings
GRID = "_build_grid"  # of rotary ones; no public spelling


@contextmanager
def exchanged(model: nn.Module) -> Iterator[None]:
    """Exchange them in a model, and put all back afterwards.

    Args:
        model: Any module.
    """
    files = [m for name, m in sys.modules.items() if name.startswith("timm.models.") and hasattr(m, RESAMPLE)]
    functions: list[tuple[Any, str, Callable[..., Tensor]]] = [(file, RESAMPLE, resample_positions) for file in files]
    if hasattr(pos_embed_sincos, GRID):
        functions.append((pos_embed_sincos, GRID, partial(rotary_grid, getattr(pos_embed_sincos, GRID))))
    originals = [(file, name, getattr(file, name)) for file, name, _ in functions]
    changed: list[tuple[nn.Module, str, Any]] = []
    try:
        for file, name, function in functions:
            setattr(file, name, function)
        for module in model.modules():
            for kind, attribute, function in PARTS:
                if isinstance(module, kind):
                    changed.append((module, attribute, module.__dict__.get(attribute, changed)))
                    setattr(module, attribute, partial(function, module))
            if isinstance(module, PatchEmbed) and not module.strict_img_size:
                changed.append((module, "img_size", module.img_size))
                module.img_size = None  # its check writes sizes into a message, which binds a graph to them
        yield
    finally:
        for module, attribute, value in reversed(changed):
            if value is changed:  # it was the class's
                delattr(module, attribute)
            else:
                setattr(module, attribute, value)
        for file, name, function in originals:
            setattr(file, name, function)


def swin_attention(block: Any, x: Tensor) -> Tensor:
    """`SwinTransformerBlock._attn`, with windows counted from the map's size instead of from what padding made.

    Args:
        block: The block.
        x: `(B, H, W, C)`, as the result.
    """
    B, H, W, C = x.shape
    (h, w), (down, right) = block.window_size, block.shift_size
    rows, columns = (H + h - 1) // h, (W + w - 1) // w
    shifts, pads_first = bool(down or right), getattr(block, "pads_first", False)  # see segheads.swin
    if shifts and not pads_first:
        x = torch.roll(x, (-down, -right), (1, 2))
    x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * h - H))
    if shifts and pads_first:
        x = torch.roll(x, (-down, -right), (1, 2))
    x = x.reshape(B, rows, h, columns, w, C).transpose(2, 3).reshape(B * rows * columns, h * w, C)
    x = block.attn(x, mask=_swin_mask(block, rows, columns, x) if shifts else None)
    x = x.reshape(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)
    if shifts and pads_first:
        x = torch.roll(x, (down, right), (1, 2))
    x = crop(x.movedim(-1, 1), H, W).movedim(1, -1)
    return torch.roll(x, (down, right), (1, 2)) if shifts and not pads_first else x


def _swin_mask(block: Any, rows: int, columns: int, like: Tensor) -> Tensor:
    """-100 between cells that only the shift brought into one window, `(windows, cells, cells)`."""
    (h, w), (down, right), device = block.window_size, block.shift_size, like.device
    r, c = torch.arange(rows * h, device=device), torch.arange(columns * w, device=device)
    r = (r >= rows * h - h).long() + (r >= rows * h - down).long()
    c = (c >= columns * w - w).long() + (c >= columns * w - right).long()
    regions = (3 * r[:, None] + c).reshape(rows, h, columns, w).transpose(1, 2).reshape(rows * columns, h * w)
    return -100.0 * (regions[:, None, :] != regions[:, :, None]).to(like.dtype)


def adaptive_average(pool: Any, x: Tensor) -> Tensor:
    """`nn.AdaptiveAvgPool2d` as two products: ONNX has no such operation, and PyTorch's way round binds to one size.

    Args:
        pool: The module.
        x: `(B, C, h, w)`.
    """
    size = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2
    if size == (1, 1):
        return x.mean((2, 3), keepdim=True)
    rows, columns = (_averages(n, length, x) for n, length in zip(size, x.shape[2:], strict=True))
    return rows @ x @ columns.mT


def _averages(n: int, length: int, like: Tensor) -> Tensor:
    """The weights `(n, length)`: cell i is the mean from `i * length // n` to `(i + 1) * length / n`, rounded up."""
    cell = torch.arange(n, device=like.device)[:, None]
    first, end = (cell * length) // n, ((cell + 1) * length + n - 1) // n
    at = torch.arange(length, device=like.device)
    return ((at >= first) & (at < end)).to(like.dtype) / (end - first).to(like.dtype)


def resample_positions(
    posemb: Tensor,
    new_size: Sequence[int],
    old_size: Sequence[int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
    verbose: bool = False,  # noqa: ARG001 (timm's)
    align_corners: bool | None = None,  # noqa: ARG001 (None everywhere in timm)
) -> Tensor:
    """The same as timm's `resample_abs_pos_embed`, as two products, which every runtime has.

    Raises:
        NotImplementedError: If another than the antialiased bicubic interpolation is wanted.
    """
    if interpolation != "bicubic" or not antialias:
        raise NotImplementedError(f"position embeddings resampled by {interpolation!r}")
    prefix, table = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    side = math.isqrt(table.shape[1])
    old = tuple(old_size or (side, side))
    rows, columns = (_bicubic(n, m, table) for n, m in zip(old, new_size, strict=True))
    table = table.unflatten(1, old).permute(0, 3, 1, 2).float()  # (1, N, D) -> (1, D, h, w)
    table = (rows @ table @ columns.mT).flatten(2).transpose(1, 2).to(posemb.dtype)
    return torch.cat([prefix, table], 1) if num_prefix_tokens else table


def rotary_grid(original: Callable[..., Tensor], feat_shape: Sequence[int], *args: Any, **options: Any) -> Tensor:
    """The grid of timm's rotary positions from -1 to 1 (DINOv3) without sizes as floats; other grids are timm's own.

    Args:
        original: timm's function.
        feat_shape: Rows and columns.
        *args: Of timm's function.
        **options: Likewise.
    """
    plain = not args and options.get("ref_feat_shape") is None and options.get("grid_indexing", "ij") == "ij"
    if not plain or options.get("grid_type") != "centered":
        return original(feat_shape, *args, **options)
    steps = [torch.arange(n, dtype=torch.float32) for n in feat_shape]
    lengths = [x[-1:] + 1 for x in steps]  # as tensors
    which = {"max": torch.maximum, "min": torch.minimum}.get(options.get("normalize_coords", "separate"))
    if which is not None:
        lengths = [which(*lengths)] * len(lengths)
    places = [(x + (0.5 + options.get("grid_offset", 0.0))) / n for x, n in zip(steps, lengths, strict=True)]
    return 2.0 * torch.stack(torch.meshgrid(places, indexing="ij"), dim=-1) - 1.0


def _bicubic(n_in: int, n_out: int, like: Tensor) -> Tensor:
    """Weights `(n_out, n_in)` of PyTorch's antialiased bicubic interpolation (its a is -0.5)."""
    at = torch.arange(n_out, device=like.device, dtype=torch.float32)[:, None]
    scale = n_in / (at[-1:] + 1)  # a tensor: sizes of graphs for any size are no numbers
    x = (torch.arange(n_in, device=like.device) + 0.5 - (at + 0.5) * scale).abs() / scale.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


PARTS: list[tuple[type[nn.Module], str, Callable[..., Tensor]]] = [
    (SwinTransformerBlock, "_attn", swin_attention),
    (nn.AdaptiveAvgPool2d, "forward", adaptive_average),
]
"""Kinds of modules, which of their attributes, and the function that stands for it, with the module as its first."""
