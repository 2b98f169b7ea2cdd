"""Pyramids: what stands between a backbone's maps and a head that wants all of one width, or several strides."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, trunc_normal_, use_fused_attn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from segheads.functional.shapes import crop, extend, is_dynamic, whole


class Pyramid(nn.Module, ABC):
    """A function from a backbone's maps to other maps, both fine to coarse.

    Args:
        in_channels: Channels of the maps that come in, fine to coarse.
        channels: Channels of the maps that go out.

    Shape:
        List of `(B, in_channels[i], h_i, w_i)` to list of `(B, channels[j], h_j, w_j)`.

    Attributes:
        in_channels: Channels of the maps that come in.
        channels: Channels of the maps that go out.

    Raises:
        ValueError: If there are no channels or some below 1, or the maps do not have them.
    """

    def __init__(self, in_channels: Sequence[int], channels: Sequence[int]) -> None:
        super().__init__()
        if isinstance(in_channels, int) or len(in_channels) == 0:
            raise ValueError(
                f"{type(self).__name__} takes a list of maps: in_channels must list their channels; got {in_channels!r}"
            )
        self.in_channels, self.channels = list(in_channels), list(channels)
        if min(self.in_channels + self.channels) < 1:
            raise ValueError(
                f"in_channels and out_channels must be 1 or more; got {self.in_channels} and {self.channels[0]}"
            )

    @abstractmethod
    def output_strides(self, strides: Sequence[float]) -> list[float]:
        """Strides of the maps that go out, given those of the maps that come in."""

    @abstractmethod
    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The pyramid's maps, fine to coarse."""

    def _check(self, maps: list[Tensor]) -> None:
        name = type(self).__name__
        if not isinstance(maps, (list, tuple)):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"{name} takes a list of maps of channels {self.in_channels}; got {got}")
        shapes = [tuple(level.shape) for level in maps]
        if [shape[1] if len(shape) == 4 else None for shape in shapes] != self.in_channels:
            raise ValueError(
                f"{name} takes a list of {len(self.in_channels)} maps (B, C_i, h_i, w_i), fine to coarse, of channels "
                f"{self.in_channels}; got {shapes}"
            )

    def _check_strides(self, strides: Sequence[float]) -> None:
        if len(strides) != len(self.in_channels):
            raise ValueError(f"strides must be {len(self.in_channels)}, one per map that comes in; got {list(strides)}")


class FPN(Pyramid):
    """Feature pyramid network: coarse maps are added to finer ones, from the top down, then smoothed.

    Lin et al., CVPR 2017, https://arxiv.org/abs/1612.03144, as in MMSegmentation and SenFormer's code (neither norm
    nor activation): a 1x1 convolution per map, nearest-neighbour resizing to the size of the next finer map, a 3x3
    convolution per level. Convolutions start Xavier uniform, as published.

    Args:
        in_channels: Channels of the maps that come in, fine to coarse.
        out_channels: Channels of every map that goes out.
        num_outputs: How many of the finest levels go out, all of them made from all maps; None means all.

    Shape:
        List of `(B, in_channels[i], h_i, w_i)` to list of the first `num_outputs` `(B, out_channels, h_i, w_i)`.

    Raises:
        ValueError: If `in_channels` is empty, a size is out of range, or the maps are of other number or channels.

    Examples:
        >>> fpn = FPN([64, 128], 32)
        >>> [tuple(level.shape) for level in fpn([torch.randn(1, 64, 19, 26), torch.randn(1, 128, 10, 13)])]
        [(1, 32, 19, 26), (1, 32, 10, 13)]
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256, *, num_outputs: int | None = None) -> None:
        super().__init__(in_channels, [out_channels] * _count_outputs(num_outputs, in_channels))
        self.laterals = nn.ModuleList(_conv(C, out_channels, 1) for C in self.in_channels)
        self.outputs = nn.ModuleList(_conv(out_channels, out_channels, 3) for _ in self.channels)

    def output_strides(self, strides: Sequence[float]) -> list[float]:
        """The finest of the given strides, unchanged."""
        self._check_strides(strides)
        return list(strides[: len(self.channels)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The pyramid's maps, fine to coarse."""
        self._check(maps)
        levels = _top_down(self.laterals, maps)[: len(self.outputs)]  # the finest
        return [output(level) for output, level in zip(self.outputs, levels, strict=True)]


class FPNT(Pyramid):
    """FPN with window transformer blocks in place of the 3x3 convolutions.

    SenFormer's neck (Bousselham et al., BMVC 2022, https://arxiv.org/abs/2111.13280;
    https://github.com/WalBouss/SenFormer): laterals and top-down path of `FPN`, then per level `num_layers` pre-norm
    blocks of Swin (Liu et al., ICCV 2021, https://arxiv.org/abs/2103.14030), every second one on shifted windows. The
    published network has one block per level, so nothing is shifted.

    As published, maps are padded with zeros at the bottom and the right to whole windows, after the first norm and
    before the shift, and padded positions are not masked: they take part as keys and values equal to the biases.
    Neither timm's block (which shifts first) nor Swin's own code (no shift on maps within one window) does the same.

    Args:
        in_channels: Channels of the maps that come in, fine to coarse.
        out_channels: Channels of every map that goes out, the width of the blocks.
        num_outputs: How many of the finest levels go out, all of them made from all maps; None means all.
        num_layers: Blocks per level.
        num_heads: Attention heads; None means `out_channels // 64`, or the next smaller number that divides it.
        window_size: Side of the windows in cells.
        mlp_ratio: Hidden width of the MLPs over `out_channels`.
        drop_path_rate: Stochastic depth of both parts of every block.

    Shape:
        List of `(B, in_channels[i], h_i, w_i)` to list of the first `num_outputs` `(B, out_channels, h_i, w_i)`.

    Raises:
        ValueError: If `in_channels` is empty, a size is out of range, `num_heads` does not divide `out_channels`, or
            the maps are of other number or channels.

    Examples:
        >>> fpnt = FPNT([64, 128], 32)
        >>> [tuple(level.shape) for level in fpnt([torch.randn(1, 64, 19, 26), torch.randn(1, 128, 10, 13)])]
        [(1, 32, 19, 26), (1, 32, 10, 13)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 512,
        *,
        num_outputs: int | None = None,
        num_layers: int = 1,
        num_heads: int | None = None,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(in_channels, [out_channels] * _count_outputs(num_outputs, in_channels))
        heads = next(n for n in range(max(1, out_channels // 64), 0, -1) if out_channels % n == 0)
        heads = heads if num_heads is None else num_heads
        if heads < 1 or out_channels % heads:
            raise ValueError(f"num_heads must divide out_channels {out_channels}; got {heads}")
        if num_layers < 1 or window_size < 1:
            raise ValueError(f"num_layers and window_size must be 1 or more; got {num_layers} and {window_size}")
        self.laterals = nn.ModuleList(_conv(C, out_channels, 1) for C in self.in_channels)
        shifts = [window_size // 2 if layer % 2 else 0 for layer in range(num_layers)]
        self.outputs = nn.ModuleList(
            nn.Sequential(
                *(_WindowBlock(out_channels, heads, window_size, shift, mlp_ratio, drop_path_rate) for shift in shifts)
            )
            for _ in self.channels
        )

    def output_strides(self, strides: Sequence[float]) -> list[float]:
        """The finest of the given strides, unchanged."""
        self._check_strides(strides)
        return list(strides[: len(self.channels)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The pyramid's maps, fine to coarse."""
        self._check(maps)
        results = []
        levels = _top_down(self.laterals, maps)[: len(self.outputs)]  # the finest
        for blocks, level in zip(self.outputs, levels, strict=True):
            tokens = blocks(level.permute(0, 2, 3, 1))  # (B, D, h, w) -> (B, h, w, D)
            results.append(tokens.permute(0, 3, 1, 2))  # (B, h, w, D) -> (B, D, h, w)
        return results


class SimplePyramid(Pyramid):
    """Maps of strides near 4, 8, 16 and 32 from the one map of a plain ViT.

    The simple feature pyramid of ViTDet (Li et al., ECCV 2022, https://arxiv.org/abs/2203.16527). Finer maps come from
    transposed 2x2 convolutions, each of which halves the channels, with LayerNorm and GELU between them; coarser ones
    from max-pooling. Then each level has a 1x1 and a 3x3 convolution without bias, each with LayerNorm.

    Factors are powers of two: patches of 16 give strides 4, 8, 16, 32 and patches of 14 give 3.5, 7, 14, 28. Unlike
    ViTDet's, pooling keeps the rest of an odd map, so that sizes are rounded up as everywhere in this library. Layers
    keep PyTorch's default initialisation, as in the published code.

    Args:
        in_channels: Channels of the maps that come in; only the last map is used.
        out_channels: Channels of every map that goes out.
        num_outputs: How many of the finest levels go out; None means all 4.
        stride: Pixels per cell of the last map.

    Shape:
        List of `(B, in_channels[i], h_i, w_i)` to list of `(B, out_channels, ceil(h * f), ceil(w * f))`, h and w of
        the last map, f = 4, 2, 1, 1/2 where `stride` is 16.

    Raises:
        ValueError: If `in_channels` is empty, a size is out of range, or the maps are of other number or channels.

    Examples:
        >>> pyramid = SimplePyramid([192], 64)
        >>> [tuple(level.shape) for level in pyramid([torch.randn(1, 192, 5, 7)])]
        [(1, 64, 20, 28), (1, 64, 10, 14), (1, 64, 5, 7), (1, 64, 3, 4)]
        >>> pyramid.output_strides([16])
        [4.0, 8.0, 16.0, 32.0]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        num_outputs: int | None = None,
        stride: float = 16,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride must be 1 or more pixels; got {stride}")
        super().__init__(in_channels, [out_channels] * _count_outputs(num_outputs, range(4)))
        finest = round(math.log2(stride / 4))
        self.doublings = [finest - level for level in range(len(self.channels))]  # negative: halvings
        self.outputs = nn.ModuleList(_resize(self.in_channels[-1], out_channels, n) for n in self.doublings)

    def output_strides(self, strides: Sequence[float]) -> list[float]:
        """The last of the given strides over each factor."""
        self._check_strides(strides)
        return [strides[-1] / 2**n for n in self.doublings]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The pyramid's maps, fine to coarse."""
        self._check(maps)
        return [output(maps[-1]) for output in self.outputs]


PYRAMIDS: dict[str, type[Pyramid]] = {
    "fpn": FPN,
    "fpnt": FPNT,
    "simple": SimplePyramid,
}
"""The pyramids by the names that `create_model` takes; a name of your own may be added."""


def find_pyramid(name: str) -> Callable[..., Pyramid]:
    """The class of a registered pyramid.

    Raises:
        ValueError: If no pyramid has that name; the message lists the known ones.
    """
    if name not in PYRAMIDS:
        raise ValueError(f"no pyramid is called {name!r}; known: {', '.join(PYRAMIDS)}")
    return PYRAMIDS[name]


def _count_outputs(num_outputs: int | None, levels: Sequence[int]) -> int:
    most = 1 if isinstance(levels, int) else max(1, len(levels))  # the base class refuses those
    if num_outputs is None:
        return most
    if not 1 <= num_outputs <= most:
        raise ValueError(f"num_outputs must be from 1 to {most}, the number of levels; got {num_outputs}")
    return num_outputs


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is a bias
    return conv


def _top_down(laterals: nn.ModuleList, maps: list[Tensor]) -> list[Tensor]:
    """Every map through its lateral convolution, and the sums from the coarsest to the finest."""
    levels = [lateral(level) for lateral, level in zip(laterals, maps, strict=True)]
    for i in range(len(levels) - 1, 0, -1):
        levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
    return levels


def _resize(in_channels: int, out_channels: int, doublings: int) -> nn.Sequential:
    """One level of the simple pyramid."""
    layers: list[nn.Module] = []
    if doublings < 0:
        layers.append(_MaxPool(2**-doublings, ceil_mode=True))
    width = in_channels
    for i in range(doublings):
        layers += [LayerNorm2d(width), nn.GELU()] if i else []
        layers.append(nn.ConvTranspose2d(width, max(1, width // 2), 2, stride=2))
        width = max(1, width // 2)
    layers += [nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers)


class _MaxPool(nn.MaxPool2d):
    """Max-pooling that keeps the rest of an odd map, and that can be exported for any size."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if not is_dynamic(h, w):
            return super().forward(x)
        window: Any = self.kernel_size
        return F.max_pool2d(extend(x, whole(h, window), whole(w, window)), window)


class _WindowBlock(nn.Module):
    """Attention within windows and MLP, both pre-norm with a residual, on `(B, h, w, D)`."""

    def __init__(
        self, D: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.window_size, self.shift = window_size, shift
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = WindowAttention(D, num_heads, window_size=window_size)  # fills its table of biases itself
        self.attn.fused_attn = use_fused_attn()  # timm leaves it off in Swin, as experimental
        self.mlp = Mlp(D, int(mlp_ratio * D))  # exact GELU
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        (B, h, w, D), window, shift = x.shape, self.window_size, self.shift
        rows, columns = (h + window - 1) // window, (w + window - 1) // window  # of whole windows
        x = F.pad(x, (0, 0, 0, columns * window - w, 0, rows * window - h))
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        windows = x.reshape(B, rows, window, columns, window, D).transpose(2, 3)  # (B, H, W, D) -> (B, r, c, w, w, D)
        windows = windows.reshape(B * rows * columns, window * window, D)
        windows = self.attn(windows, mask=self._mask(rows, columns, x) if shift else None)
        x = windows.reshape(B, rows, columns, window, window, D).transpose(2, 3)
        x = x.reshape(B, rows * window, columns * window, D)
        x = torch.roll(x, (shift, shift), (1, 2)) if shift else x
        return crop(x.movedim(-1, 1), h, w).movedim(1, -1)

    def _mask(self, rows: int, columns: int, x: Tensor) -> Tensor:
        """-100 between cells that only the cyclic shift brought into one window; `(windows, window², window²)`."""
        window, H, W = self.window_size, rows * self.window_size, columns * self.window_size
        down = torch.arange(H, device=x.device) >= H - self.shift  # came over the edge
        across = torch.arange(W, device=x.device) >= W - self.shift
        regions = 2 * down[:, None] + across.long()  # (H, W)
        regions = regions.reshape(rows, window, columns, window).transpose(1, 2)
        regions = regions.reshape(rows * columns, window**2)
        apart = regions[:, None, :] != regions[:, :, None]
        return -100 * apart.to(self.attn.relative_position_bias_table.dtype)
