"""Mean shift of tokens towards the modes of their density, in memory that grows with the number of tokens alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

TILE = 256  # rows of the N x N affinity that are held at a time where no fused kernel serves
WIDEST_ON_CUDA = 256  # channels: flash attention's limit; tiles beyond it are a choice not yet measured


def mean_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_layers: int = 1) -> Tensor:
    """Shift every token towards a mode of the tokens' density, `num_layers` times.

    One layer projects the tokens to `r = x Wᵀ + b` and replaces each by the average of all, weighted by
    `S = softmax(r rᵀ / sqrt(D))` over the last axis: `x <- S x` (MeanShifter). It is the tokens that are averaged,
    not their projections; nothing is added back and nothing is normalised. `r rᵀ` is symmetric; S after its row
    softmax is not, although the thesis writes S = Sᵀ.

    No (N, N) matrix is held, forward or backward. Where D and C are equal (up to a multiple of 8, filled with zeros,
    which is exact) the product runs in PyTorch's fused attention, if the device has it for the type and width and
    can keep its threads busy with it. Everywhere else it runs in tiles of rows, which the backward pass computes
    again; that beats filling up unequal widths, too. `torch.compile` and `torch.export` get the one fused operation
    on the CPU. Gradients of gradients exist for neither.

    Args:
        x: The tokens, or a feature map whose positions are the tokens.
        weight: Projection to the space in which distances are measured.
        bias: Bias of the projection.
        num_layers: How often to shift; 0 returns `x` itself.

    Shape:
        x `(B, N, C)` or `(B, C, h, w)`, weight `(D, C)`, bias `(D,)`; the result has the shape of x.

    Raises:
        ValueError: If x has another number of axes or channels, or `num_layers` is negative.

    Examples:
        >>> tokens = torch.tensor([[[-2.5], [-2.4], [2.5], [2.6]]])  # four tokens of one channel, two clusters
        >>> mean_shift(tokens, torch.eye(1)).squeeze()
        tensor([-2.4562, -2.4559,  2.5562,  2.5565])
    """
    if x.ndim not in (3, 4):
        raise ValueError(f"mean shift takes tokens (B, N, C) or a map (B, C, h, w); got shape {tuple(x.shape)}")
    if num_layers < 0:
        raise ValueError(f"num_layers must be 0 or more; got {num_layers}")
    channels = x.shape[2] if x.ndim == 3 else x.shape[1]
    if channels != weight.shape[1]:
        raise ValueError(f"mean shift was built for {weight.shape[1]} channels; got {channels} in {tuple(x.shape)}")
    if num_layers == 0:
        return x
    tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
    for _ in range(num_layers):
        tokens = _average(tokens, F.linear(tokens, weight, bias))
    return tokens if x.ndim == 3 else tokens.transpose(1, 2).reshape(x.shape)  # (B, N, C) -> (B, C, h, w)


def _average(tokens: Tensor, r: Tensor) -> Tensor:
    """`softmax(r rᵀ / sqrt(D)) tokens`."""
    tokens = tokens.to(r.dtype)  # under autocast r is narrower than the tokens
    (D, C), scale = (r.shape[-1], tokens.shape[-1]), r.shape[-1] ** -0.5
    width = -(-max(C, D) // 8) * 8  # CUDA's fused kernels want multiples of 8
    if _is_fused(tokens, r, width):
        q = F.pad(r, (0, width - D)).unsqueeze(1)  # (B, N, D) -> (B, 1, N, width)
        value = F.pad(tokens, (0, width - C)).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, value, scale=scale)[:, 0, :, :C]
    return _Tiles.apply(tokens, r, scale)


def _is_fused(tokens: Tensor, r: Tensor, width: int) -> bool:
    """Whether a fused kernel serves forward and backward, and tiles would not be quicker."""
    if r.is_meta or (r.device.type == "cpu" and torch.compiler.is_compiling()):
        return True  # a graph with one operation, for any N
    if width - min(tokens.shape[-1], r.shape[-1]) >= 8:
        return False
    if r.is_cuda:
        probe = r.new_empty(1, 1, 8, width)  # its dtype and width decide, with the device and the user's settings
        params = SDPAParams(probe, probe, probe, None, 0.0, False, False)
        return width <= WIDEST_ON_CUDA and (can_use_flash_attention(params) or can_use_efficient_attention(params))
    # The CPU's kernel takes every width and type, but its backward shares out whole images among the threads.
    trains = torch.is_grad_enabled() and (tokens.requires_grad or r.requires_grad)
    return r.device.type == "cpu" and not (trains and len(r) < torch.get_num_threads())


class _Tiles(torch.autograd.Function):
    """The average in tiles of rows, with a backward pass that computes each tile again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, r: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(tokens, r)
        ctx.scale = scale
        with torch.autocast(r.device.type, enabled=False):
            averages = [_weights(rows, r).to(r.dtype) @ tokens for rows in (r * scale).split(TILE, dim=1)]
        return torch.cat(averages, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, r = ctx.saved_tensors
        scaled = r * ctx.scale
        first, second, _ = ctx.needs_input_grad
        of_tokens, of_r = (_wide(torch.zeros_like(x)) for x in (tokens, r))
        with torch.autocast(r.device.type, enabled=False):
            for start in range(0, r.shape[1], TILE):
                at = slice(start, start + TILE)
                weights = _weights(scaled[:, at], r)  # (B, TILE, N)
                if first:
                    _add_product(of_tokens, weights.to(r.dtype).mT, grad[:, at])
                if second:
                    of_weights = _wide(grad[:, at] @ tokens.mT)
                    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).to(r.dtype)
                    _add_product(of_r[:, at], of_scores, scaled)  # r as query
                    _add_product(of_r, of_scores.mT, scaled[:, at])  # r as key
        return of_tokens.to(tokens.dtype) if first else None, of_r.to(r.dtype) if second else None, None


def _weights(scaled: Tensor, r: Tensor) -> Tensor:
    return _wide(scaled @ r.mT).softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, without another tensor where the types agree."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)
