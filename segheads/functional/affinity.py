"""Averages of tokens, weighted by the softmax of scores, in memory that grows with the number of tokens alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from segheads.functional.bands import run_parts
from segheads.functional.kernels import Kernel

Gradients = list[Tensor | None]  # of inputs, where one is wanted; PyTorch 2.9 compiles no function that writes it out
TILE = 256  # rows of the N x N affinity that are held at a time where no fused kernel serves
MOST_FILLING = 8  # channels of zeros with which a fused kernel is still the quicker way
TILE_WEIGHTS = 2**20  # of them the CPU holds so many weights at most, in each thread: 4 MB in fp32
BANDS = 8  # parts of an image that the CPU's backward pass hands to threads, whatever their number
WIDEST_ON_CUDA = 256  # channels: flash attention's limit; tiles beyond it are lean, and slow (docs/performance.md)


class Scores(NamedTuple):
    """The kernel's scores as the products of queries and keys times a scale."""

    query: Tensor
    key: Tensor
    scale: float
    cancels: bool  # large terms do, so that products are to be kept in 32 bits

    def weights(self) -> Tensor:
        """The softmax over the keys, `(B, M, N)`, for a few queries."""
        return _products(self.query * self.scale, self.key, self.cancels).softmax(-1)


def grid_positions(x: Tensor) -> Tensor:
    """Row and column of each token of a map `(B, C, h, w)`: `(h w, 2)`, whole numbers around 0, in 32 bits or more."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (torch.arange(size, device=x.device, dtype=dtype) - size // 2 for size in x.shape[2:])
    return torch.cartesian_prod(rows, columns)


def scores(
    query: Tensor,
    key: Tensor,
    kernel: Kernel,
    bandwidth: float | Tensor,
    query_positions: Tensor | None = None,
    positions: Tensor | None = None,
    spatial_bandwidth: float | Tensor = 1.0,
) -> Scores:
    """What the softmax is taken of.

    `-|q - k|² / 2` differs from `q·k - |k|² / 2` by what is the same for all keys, which softmax does not see; the norm
    is one more channel. Both sides are centred first: that changes no distance, and keeps the products small. Places
    are more channels of the same kind, in units of their own bandwidth.
    """
    if not kernel.by_distance and positions is None:
        if isinstance(bandwidth, Tensor):
            return Scores((query / bandwidth**2).to(key.dtype), key, 1.0, cancels=False)
        return Scores(query, key, bandwidth**-2, cancels=False)
    norm, of_query, of_key = None, [], []
    if kernel.by_distance:
        centre = key.detach().mean(dim=1, keepdim=True)
        query, key = query - centre, key - centre
        norm = _wide(key).square().sum(-1, keepdim=True) / (-2 * bandwidth**2)
    if positions is not None and query_positions is not None:
        of_query = _parts(query_positions / spatial_bandwidth**2, query.dtype)
        of_key = [positions.to(key.dtype)] * len(of_query)
        far = positions.square().sum(-1, keepdim=True) / (-2 * spatial_bandwidth**2)  # (N, 1)
        norm = far if norm is None else norm + far
    if norm is not None:
        parts = _parts(norm, key.dtype)
        of_query, of_key = [*of_query, *(torch.ones_like(part[..., :1, :]) for part in parts)], [*of_key, *parts]
    query = (query / bandwidth**2).to(key.dtype)
    return Scores(_with_channels(query, of_query), _with_channels(key, of_key), 1.0, cancels=True)


def _parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of a type that add up to x; in 16 bits the second holds what the first leaves over."""
    parts = [x.to(dtype)]
    return parts if dtype == x.dtype or dtype.itemsize >= 4 else [*parts, (x - parts[0].to(x.dtype)).to(dtype)]


def _with_channels(x: Tensor, more: list[Tensor]) -> Tensor:
    return torch.cat([x, *(part.expand(*x.shape[:-1], part.shape[-1]) for part in more)], dim=-1) if more else x


def weighted_average(values: Tensor, scores: Scores) -> Tensor:
    """`softmax(scores) values`.

    Shape:
        values `(B, N, C)`, queries `(B, M, D)`, keys `(B, N, D)`; the result `(B, M, C)`, in the type of the queries.
    """
    query, key, scale, cancels = scores
    values = values.to(query.dtype)  # under autocast scores are narrower than the tokens
    inputs = _fused_inputs(values, query, key)
    if inputs is not None and not _has_own_backward(values, query, key):
        return F.scaled_dot_product_attention(*inputs, scale=scale)[:, 0, :, : values.shape[-1]]
    if key is query and torch.compiler.is_compiling():
        key = key.view_as(key)  # a traced autograd.Function may not take one tensor twice
    return _Tiles.apply(values, query, key, scale, cancels, inputs is not None)


def takes_fused(values: Tensor, scores: Scores) -> bool:
    """Whether `weighted_average` of the same is PyTorch's fused attention, and not tiles.

    Shape:
        As in `weighted_average`.
    """
    return _fused_inputs(values.to(scores.query.dtype), scores.query, scores.key) is not None


def _fused_inputs(values: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Query, key and value as fused attention takes them, `(B, 1, N, width)`, or None where tiles are to serve."""
    width = max(values.shape[-1], query.shape[-1])
    if query.device.type != "cpu":
        width = -(-width // 8) * 8  # CUDA's fused kernels want multiples of 8
    if not _is_fused(values, query, width):
        return None
    q, k, v = (_row_by_row(F.pad(x, (0, width - x.shape[-1]))).unsqueeze(1) for x in (query, key, values))
    if q.is_cuda and not q.is_meta:
        if torch.is_autocast_enabled("cuda") and q.dtype != torch.float64:  # as attention would do, but it decides here
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        params = SDPAParams(q, k, v, None, 0.0, False, False)
        if not (can_use_flash_attention(params) or can_use_efficient_attention(params)):
            return None
    return q, k, v


def _row_by_row(x: Tensor) -> Tensor:
    """The same with each token's channels side by side in memory, as the tokens of a map do not have them.

    Else PyTorch's fused kernels refuse in silence, and its fallback holds the whole N x N matrix.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_fused(values: Tensor, query: Tensor, width: int) -> bool:
    """Whether fused attention is to serve, if it can, and tiles would not be quicker."""
    if query.is_meta or (query.device.type == "cpu" and torch.compiler.is_compiling()):
        return True  # a graph with one operation, for any N
    if width - min(values.shape[-1], query.shape[-1]) > MOST_FILLING:
        return False
    return width <= WIDEST_ON_CUDA if query.is_cuda else query.device.type == "cpu"  # whose kernel takes every width


def _has_own_backward(*inputs: Tensor) -> bool:
    """Whether tiles are to serve the backward pass of fused attention.

    The CPU's computes with subnormal weights, on which many processors are some ten times slower, and shares out
    nothing but whole images among the threads.
    """
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    is_traced = torch.compiler.is_compiling() or any(x.is_meta for x in inputs)
    return trains and not is_traced and inputs[0].device.type == "cpu"


class _Tiles(torch.autograd.Function):
    """The average in tiles of rows, with a backward pass that computes each tile again instead of keeping it.

    On the CPU no tile holds subnormal numbers: weights below the square root of the type's smallest normal number
    (1e-19 in fp32) are 0, and gradients of scores below its power 3/4 (4e-29). With `is_fused` the forward pass is
    fused attention.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, query: Tensor, key: Tensor, scale: float, cancels: bool, is_fused: bool
    ) -> Tensor:
        ctx.save_for_backward(values, query, key)
        ctx.scale, ctx.cancels = scale, cancels
        inputs = _fused_inputs(values, query, key) if is_fused else None
        if inputs is not None:
            return F.scaled_dot_product_attention(*inputs, scale=scale)[:, 0, :, : values.shape[-1]]
        with torch.autocast(query.device.type, enabled=False):
            return _averages(values, query, key, scale, cancels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = values, query, key = ctx.saved_tensors
        totals = [
            _wide(torch.zeros_like(x)) if need else None
            for x, need in zip(inputs, ctx.needs_input_grad[: len(inputs)], strict=True)
        ]
        with torch.autocast(grad.device.type, enabled=False):
            add = _add_gradients_in_bands if grad.device.type == "cpu" else _add_gradients
            add(totals, values, query, key, grad.to(values.dtype), ctx.scale, ctx.cancels)
        return *(None if x is None else x.to(of.dtype) for x, of in zip(totals, inputs, strict=True)), None, None, None


def _averages(values: Tensor, query: Tensor, key: Tensor, scale: float, cancels: bool) -> Tensor:
    def average(images: slice, rows: slice) -> Tensor:
        weights = _weights(query[images, rows] * scale, key[images], cancels)
        return weights.to(query.dtype) @ values[images]

    tiles = _split(query.shape[1], _tile(key))
    if query.device.type != "cpu":
        return torch.cat([average(slice(None), rows) for rows in tiles], dim=1)
    averages = values.new_empty(*query.shape[:2], values.shape[2])
    parts = [(images, rows) for images in _split(len(query), 1) for rows in tiles]

    def compute(index: int) -> None:
        averages[parts[index]] = average(*parts[index])

    run_parts(len(parts), compute, lambda *_: None, (values, query, key))
    return averages


def _add_gradients_in_bands(
    totals: Sequence[Tensor | None],
    values: Tensor,
    query: Tensor,
    key: Tensor,
    grad: Tensor,
    scale: float,
    cancels: bool,
) -> None:
    """What `_add_gradients` does, for parts of an image in threads; sums over parts are made in their order."""
    of_values, of_query, of_key = totals
    tile = _tile(key)
    step = tile * max(1, -(-query.shape[1] // (tile * BANDS)))  # whole tiles
    parts = [(images, rows) for images in _split(len(query), 1) for rows in _split(query.shape[1], step)]

    def compute(index: int) -> Gradients:
        images, rows = parts[index]
        own = [None if x is None else torch.zeros_like(x[images]) for x in (of_values, of_key)]
        some = own[0], None if of_query is None else of_query[images, rows], own[1]
        _add_gradients(some, values[images], query[images, rows], key[images], grad[images, rows], scale, cancels)
        return own

    def add(index: int, own: Gradients) -> None:
        for total, more in zip((of_values, of_key), own, strict=True):
            if total is not None and more is not None:
                total[parts[index][0]] += more

    run_parts(len(parts), compute, add, (values, query, key, grad))


def _add_gradients(
    totals: Sequence[Tensor | None],
    values: Tensor,
    query: Tensor,
    key: Tensor,
    grad: Tensor,
    scale: float,
    cancels: bool,
) -> None:
    """Add to the gradients of values, query and key, where they are not None, what some queries give."""
    of_values, of_query, of_key = totals
    scaled = query * scale
    for at in _split(query.shape[1], _tile(key)):
        weights = _weights(scaled[:, at], key, cancels)  # (B, TILE, N)
        if of_values is not None:
            _add_product(of_values, weights.to(query.dtype).mT, grad[:, at])
        if of_query is None and of_key is None:
            continue
        of_weights = _wide(grad[:, at] @ values.mT)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        if of_scores.device.type == "cpu":
            of_scores = F.hardshrink(of_scores, torch.finfo(of_scores.dtype).tiny ** 0.75)
        of_scores = of_scores.to(query.dtype)
        if of_query is not None:
            _add_product(of_query[:, at], of_scores, key)
        if of_key is not None:
            _add_product(of_key, of_scores.mT, scaled[:, at])
    if of_query is not None:
        of_query.mul_(scale)


def _tile(key: Tensor) -> int:
    """Rows of the affinity that are held at a time."""
    return TILE if key.device.type != "cpu" else max(1, min(TILE, TILE_WEIGHTS // max(key.shape[1], 1)))


def _split(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _weights(scaled: Tensor, key: Tensor, cancels: bool) -> Tensor:
    """The softmax, of which the CPU computes no weight that could become a subnormal number."""
    products = _products(scaled, key, cancels)
    if products.device.type != "cpu" or not products.numel():
        return products.softmax(-1)
    lowest = 0.5 * math.log(torch.finfo(products.dtype).tiny)
    products.sub_(products.amax(-1, keepdim=True))
    return torch.threshold_(products, lowest, -math.inf).softmax(-1)


def _products(scaled: Tensor, key: Tensor, cancels: bool) -> Tensor:
    return _wide(scaled) @ _wide(key).mT if cancels else _wide(scaled @ key.mT)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, without another tensor where the types agree."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)
