"""Where the patches of an encoder look, and how far."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from segheads.analysis.calls import AttentionCall, attention_calls
from segheads.backbones import TimmBackbone
from segheads.model import SegmentationModel

ROWS = 256  # queries whose weights over all patches are held at a time
SHUFFLED = {"Hiera"}  # timm's classes whose tokens are not in the order of rows


class AttentionMap(NamedTuple):
    """Where one query looks in one layer.

    Attributes:
        part: `"encoder"`, or the name of a head inside the model, such as `"head"` or `"head.learners.0"`.
        layer: 1 for the first layer of that part that has a map.
        name: The module that attends, such as `"model.blocks.0.attn"`.
        patches: Share of the attention that each patch gets, `(heads, h, w)`, between 0 and 1; h and w cover the padded
            image.
        tokens: Share that goes to what is no patch, `(heads, T)`: class, distillation and register tokens of an
            encoder, or the class embeddings of a mask transformer. With `patches` it sums to 1 in each head.
        cell: Height and width of a patch in pixels of the image.
    """

    part: str
    layer: int
    name: str
    patches: Tensor
    tokens: Tensor
    cell: tuple[float, float]


class AttendedDistance(NamedTuple):
    """How far the heads of one layer look.

    Attributes:
        layer: 1 for the first layer that can be measured.
        name: The module that attends, such as `"model.blocks.0.attn"`.
        pixels: Mean distance between a patch and what it attends to, pixels, `(heads,)`.
        uniform: The distance, pixels, of a head that attends to all patches alike.
    """

    layer: int
    name: str
    pixels: Tensor
    uniform: float


class _Grid(NamedTuple):
    """The patches among the tokens of one layer."""

    layer: int
    size: tuple[int, int]
    prefix: int  # tokens before the patches
    cell: tuple[float, float]


def encoder_attention(
    model: SegmentationModel | TimmBackbone, image: Tensor, pixel: tuple[int, int]
) -> list[AttentionMap]:
    """Where the patch at a pixel looks, in every layer of the backbone (Segmenter, Fig. 1 and 6).

    Every layer of timm's that attends to all patches at once: those of ViT, DeiT, BEiT, EVA, DINOv2, DINOv3 and their
    kin, the global ones of SAM, the later stages of CAFormer. Layers that attend within windows, along channels or to
    pooled tokens have no map; a backbone of such layers alone is refused.

    Args:
        model: A model or a backbone, in any mode.
        image: A normalised image.
        pixel: Row and column (y, x) of the pixel whose patch asks.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`, any H and W.

    Returns:
        One map for each layer, the first layer first.

    Raises:
        ValueError: If the pixel is outside the image, the image has another shape, or no layer attends to all patches.

    Examples:
        >>> backbone = TimmBackbone("test_vit", pretrained=False)  # one class token, two heads, patches of 16
        >>> first, *_ = encoder_attention(backbone, torch.randn(3, 40, 70), (20, 60))
        >>> first.patches.shape, first.tokens.shape, first.cell
        (torch.Size([2, 3, 5]), torch.Size([2, 1]), (16.0, 16.0))
    """
    images, (y, x) = one_image(image, pixel)
    maps: list[AttentionMap] = []

    def visit(call: AttentionCall, grid: _Grid) -> None:
        index = grid.prefix + int(y / grid.cell[0]) * grid.size[1] + int(x / grid.cell[1])
        row = call.weights(slice(index, index + 1))[0, :, 0].cpu()  # (heads, N)
        tokens, patches = row[:, : grid.prefix], row[:, grid.prefix :].unflatten(1, grid.size)
        maps.append(AttentionMap("encoder", grid.layer, call.inside[-1], patches, tokens, grid.cell))

    _visit_encoder(model, images, visit)
    return maps


def attended_distance(model: SegmentationModel | TimmBackbone, images: Tensor) -> list[AttendedDistance]:
    """How far each head of each layer of the backbone looks (Segmenter, Fig. 7; ViT, Fig. 7).

    The Euclidean distance between the centres of a patch and of those that it attends to, weighted by attention, mean
    over patches and images. Attention to class and register tokens, which lie nowhere, is left out and the rest brought
    to a sum of 1. Memory grows with the number of patches, not with its square.

    Args:
        model: A model or a backbone, in any mode; for which ones, see `encoder_attention`.
        images: Normalised images.

    Shape:
        images `(B, 3, H, W)`.

    Returns:
        One entry for each layer, the first layer first.

    Raises:
        ValueError: If images have another shape, or no layer attends to all patches.

    Examples:
        >>> first, *_ = attended_distance(TimmBackbone("test_vit", pretrained=False), torch.randn(2, 3, 64, 64))
        >>> first.pixels.shape, round(first.uniform, 1)
        (torch.Size([2]), 32.1)
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (B, 3, H, W); got {tuple(images.shape)}")
    distances: list[AttendedDistance] = []

    def visit(call: AttentionCall, grid: _Grid) -> None:
        centres = torch.cartesian_prod(*(torch.arange(n) * side for n, side in zip(grid.size, grid.cell, strict=True)))
        centres = centres.to(call.query.device)  # (N, 2), pixels
        total, uniform = torch.zeros(call.query.shape[1], dtype=torch.float64), 0.0
        for start in range(0, len(centres), ROWS):
            at = slice(start, min(start + ROWS, len(centres)))
            weights = call.weights(slice(grid.prefix + at.start, grid.prefix + at.stop))[..., grid.prefix :]
            apart = torch.cdist(centres[at], centres, compute_mode="donot_use_mm_for_euclid_dist")
            mean = (weights * apart).sum(-1) / weights.sum(-1)  # (B, heads, rows)
            total += mean.double().mean(0).sum(-1).cpu()
            uniform += apart.double().mean(-1).sum().item()
        N = len(centres)
        distances.append(AttendedDistance(grid.layer, call.inside[-1], (total / N).float(), uniform / N))

    _visit_encoder(model, images, visit)
    return distances


def _visit_encoder(
    model: SegmentationModel | TimmBackbone, images: Tensor, visit: Callable[[AttentionCall, _Grid], None]
) -> None:
    """Show every attention over all patches of the backbone, with the patches' places."""
    backbone = model.backbone if isinstance(model, SegmentationModel) else model
    sizes: list[tuple[int, int]] = []  # of the images as they enter timm's model, padded or resized
    others: list[AttentionCall] = []
    layers = Counter[str]()

    def look(call: AttentionCall) -> None:
        if call.query.ndim == 3 and len(call.query) % len(images) == 0:  # SAM's: (B * heads, N, d)
            call = call.with_batch(len(images))
        place = _place(backbone, call, images, sizes[0])
        if place is None:
            others.append(call)
            return
        layers["encoder"] += 1
        visit(call, _Grid(layers["encoder"], *place))

    hook = backbone.to_rgb.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
    try:
        with attention_calls(backbone, look):
            backbone(images)
    finally:
        hook.remove()
    if not layers:
        raise ValueError(_why_none(backbone, others))


def _place(
    backbone: TimmBackbone, call: AttentionCall, images: Tensor, covered: tuple[int, int]
) -> tuple[tuple[int, int], int, tuple[float, float]] | None:
    """Grid, tokens before it and size of a patch, or None where not all tokens attend to all."""
    fits = call.query.ndim == 4 and len(call.query) == len(images) and call.query.shape[-2] == call.key.shape[-2]
    if not fits or type(backbone.model).__name__ in SHUFFLED:
        return None
    strides = {int(info["reduction"]) for info in backbone.model.feature_info} | set(backbone.strides)
    size = images.shape[-2:]
    for stride in sorted(strides):
        grid = (-(-covered[0] // stride), -(-covered[1] // stride))
        for prefix in {getattr(backbone.model, "num_prefix_tokens", 0), 0}:  # timm's ViTs know; XCiT's joins later
            if call.query.shape[-2] == grid[0] * grid[1] + prefix:
                if backbone.fixed_size is None:  # padded, so that a patch is as large as the stride
                    return grid, prefix, (float(stride), float(stride))
                return grid, prefix, (stride * size[0] / covered[0], stride * size[1] / covered[1])
    return None


def _why_none(backbone: TimmBackbone, others: list[AttentionCall]) -> str:
    found = "none of its layers calls PyTorch's attention"
    if others:
        tokens, groups = others[0].query.shape[-2], len(others[0].query)
        found = f"{others[0].inside[-1]}, for one, attends among {tokens} queries in each of {groups} groups"
    return (
        f"{backbone.name} has no layer in which every patch attends to all patches: {found}; supported are ViTs and "
        "their kin (vit, deit, beit, eva, dinov2, dinov3, the global blocks of sam, caformer)"
    )


def one_image(image: Tensor, pixel: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The image as a batch of one, and the pixel, both checked."""
    images = image[None] if image.ndim == 3 else image
    if images.ndim != 4 or len(images) != 1:
        raise ValueError(f"image must be one image, (3, H, W) or (1, 3, H, W); got {tuple(image.shape)}")
    H, W = images.shape[-2:]
    if not (0 <= pixel[0] < H and 0 <= pixel[1] < W):
        raise ValueError(f"pixel (y, x) must be inside the image of {H} x {W} pixels; got {tuple(pixel)}")
    return images, (pixel[0], pixel[1])


def cell_size(model: SegmentationModel, size: tuple[int, int], pixels: tuple[int, int]) -> tuple[float, float]:
    """Height and width in pixels of a cell of a map that a head takes, for an image of so many pixels."""
    of_backbone = model.backbone.strides
    for stride in of_backbone if model.pyramid is None else model.pyramid.output_strides(of_backbone):
        if size == tuple(-int(-n // stride) for n in pixels):
            return float(stride), float(stride)
    return pixels[0] / size[0], pixels[1] / size[1]
