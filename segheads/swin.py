"""Swin's windows where they do not cover the map: as its authors have them, which is not as timm has them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn


def pad_before_shift(model: nn.Module) -> bool:
    """Let Swin's blocks pad the map to whole windows before they shift it, as published; timm shifts first.

    The two agree where windows cover the map exactly, which for windows of 7 holds at 224 pixels and not at 512.

    Args:
        model: Of timm; its blocks are changed in place.

    Returns:
        Whether there was any block of Swin.
    """
    blocks: list[Any] = [module for module in model.modules() if type(module) is SwinTransformerBlock]
    for block in blocks:
        block._attn, block.pads_first = partial(_attend, block), True  # the latter for exports, which exchange it, too
    return bool(blocks)


def _attend(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """`(B, h, w, C)` to the same: windowed attention."""
    (_, h, w, C), (rows, columns), shift = x.shape, block.window_size, block.shift_size
    x = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))
    H, W = x.shape[1:3]
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    windows = window_partition(x, block.window_size).view(-1, rows * columns, C)
    windows = block.attn(windows, mask=block.get_attn_mask(x)).view(-1, rows, columns, C)
    x = window_reverse(windows, block.window_size, H, W)
    x = torch.roll(x, shift, (1, 2)) if any(shift) else x
    return x[:, :h, :w].contiguous()
