"""Mean shift of tokens towards the modes of their density, in fused attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024  # query rows at a time where no fused kernel applies


def mean_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_layers: int = 1) -> Tensor:
    """Shift every token towards a mode of the tokens' density, `num_layers` times.

    One layer projects the tokens to `r = x Wᵀ + b` and replaces each by the average of all, weighted by
    `S = softmax(r rᵀ / sqrt(D))` over the last axis: `x <- S x` (MeanShifter). It is the tokens that are averaged,
    not their projections; nothing is added back and nothing is normalised. `r rᵀ` is symmetric; S after its row
    softmax is not, although the thesis writes S = Sᵀ.

    The product runs in PyTorch's fused attention, for which widths D and C are made equal with zeros (exact). Where
    no fused kernel applies and gradients are off, it runs in tiles of rows; either way no (N, N) matrix is held.

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
    (D, C), scale = (r.shape[-1], tokens.shape[-1]), r.shape[-1] ** -0.5
    width = -(-max(C, D) // 8) * 8  # CUDA's fused kernels want multiples of 8
    tokens = tokens.to(r.dtype)  # under autocast r is narrower than the tokens
    r = F.pad(r, (0, width - D)).unsqueeze(1)  # (B, N, D) -> (B, 1, N, width)
    value = F.pad(tokens, (0, width - C)).unsqueeze(1)
    # One tile of all rows where the kernel is fused, and in training, where autograd would keep the tiles anyway.
    rows = r.split(r.shape[2] if _is_fused(r) or torch.is_grad_enabled() else TILE, dim=2)
    shifted = [F.scaled_dot_product_attention(q, r, value, scale=scale) for q in rows]
    return torch.cat(shifted, dim=2)[:, 0, :, :C]


def _is_fused(x: Tensor) -> bool:
    return x.device.type == "cpu" or (x.is_cuda and x.dtype != torch.float64)
