"""Mean shift of tokens towards the modes of their density."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from segheads.functional.affinity import grid_positions, scores, weighted_average
from segheads.functional.kernels import Kernel, find_kernel


def mean_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_layers: int = 1,
    kernel: str = "dot",
    bandwidth: float | Tensor | None = None,
    spatial_bandwidth: float | Tensor | None = None,
    blurring: bool = True,
    step: float | Tensor = 1.0,
) -> Tensor:
    """Shift every token towards a mode of the tokens' density, `num_layers` times.

    One layer projects the tokens to `r = x Wᵀ + b`, weighs all tokens by a softmax over the last axis, and replaces
    each token by the average: `x <- S x`, or with a `step` `x <- x + step (S x - x)`. It is the tokens that are
    averaged, not their projections. The weights S, with the bandwidth h:

    - `"dot"`: `softmax(rᵢ·rⱼ / h²)`, with `h² = sqrt(D)` the MeanShifter's (its thesis writes S = Sᵀ, which holds
      before the softmax of rows, not after). It is the Gaussian kernel without the term of the keys' norms, so that
      tokens of large norm attract all others: repeated shifts collapse.
    - `"gaussian"`: `softmax((rᵢ·rⱼ - |rⱼ|² / 2) / h²)`, which is `exp(-|rᵢ - rⱼ|² / 2h²)` over its row's sum: mean
      shift as Fukunaga and Hostetler (1975) and Cheng (1995) have it. `h² = sqrt(D)` unless it is given.
    - `"cosine"`: `softmax(cos(rᵢ, rⱼ) / h²)`, von Mises-Fisher mean shift with the concentration 1/h²; `h² = 0.1`
      unless it is given.

    With a `spatial_bandwidth` s, tokens of a map are also weighed by their distance in it: each weight is multiplied by
    `exp(-|pᵢ - pⱼ|² / 2s²)` before the sum, p in cells of the map. That is mean shift in the joint domain of features
    and places, as image segmentation has used it (Comaniciu and Meer, "Mean shift: a robust approach toward feature
    space analysis", 2002); it is what lets deep mean shift pay (results page). Places stay where they are.

    With `blurring`, each layer's tokens are the next layer's data (blurring mean shift, Cheng 1995). Without, the
    original tokens stay the data towards whose modes the shifted ones move, as in classical mean shift.

    No (N, N) matrix is held, forward or backward. Where D and C are about equal (the difference is filled with zeros,
    which is exact) the product runs in PyTorch's fused attention, if the device has it for the type and width and can
    keep its threads busy with it; the keys' norms are one more channel. Everywhere else it runs in tiles of rows,
    which the backward pass computes again; that beats filling up unequal widths, too. On the CPU the backward pass is
    tiles in any case, in which weights below 1e-19 are 0: fused attention's computes with subnormal numbers.
    `torch.compile` and `torch.export` get the one fused operation on the CPU. Gradients of gradients exist for neither.

    Args:
        x: The tokens, or a feature map whose positions are the tokens.
        weight: Projection to the space in which distances are measured.
        bias: Bias of the projection.
        num_layers: How often to shift; 0 returns `x` itself.
        kernel: How the weights follow from the projected tokens: a name in `segheads.functional.kernels.KERNELS`.
        bandwidth: The bandwidth h, in units of r; a scalar tensor may carry a gradient. None means the kernel's own.
        spatial_bandwidth: The bandwidth s of places, in cells of the map; None weighs tokens wherever they are.
        blurring: Shift the tokens among themselves, rather than against the original ones.
        step: How far to go towards the average: a number, or a tensor that multiplies channels `(C,)` or all `()`.

    Shape:
        x `(B, N, C)` or `(B, C, h, w)`, weight `(D, C)`, bias `(D,)`; the result has the shape of x.

    Raises:
        ValueError: If x has another number of axes or channels, `num_layers` is negative, the kernel is unknown, a
            bandwidth is a number that is not positive, or tokens without places are given a spatial bandwidth.

    Examples:
        >>> import torch
        >>> tokens = torch.tensor([[[-2.5], [-2.4], [2.5], [2.6]]])  # four tokens of one channel, two clusters
        >>> mean_shift(tokens, torch.eye(1), num_layers=3, kernel="gaussian").squeeze()
        tensor([-2.4499, -2.4499,  2.5499,  2.5499])
    """
    *_, last = mean_shift_steps(
        x,
        weight,
        bias,
        num_layers=num_layers,
        kernel=kernel,
        bandwidth=bandwidth,
        spatial_bandwidth=spatial_bandwidth,
        blurring=blurring,
        step=step,
    )
    return last


def mean_shift_steps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    num_layers: int = 1,
    kernel: str = "dot",
    bandwidth: float | Tensor | None = None,
    spatial_bandwidth: float | Tensor | None = None,
    blurring: bool = True,
    step: float | Tensor = 1.0,
) -> Iterator[Tensor]:
    """Yield the tokens after 0, 1, ..., `num_layers` shifts, each in the shape of x; see `mean_shift`."""
    how = _check(x, weight, num_layers, kernel, bandwidth, spatial_bandwidth)
    yield x
    tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
    h = how.default_bandwidth(len(weight)) if bandwidth is None else bandwidth
    where = None if spatial_bandwidth is None else grid_positions(x)
    data, key = tokens, None
    for _ in range(num_layers):
        r = how.measured(F.linear(tokens, weight, bias))
        if blurring or key is None:
            data, key = tokens, r
        places = () if spatial_bandwidth is None else (where, where, spatial_bandwidth)
        average = weighted_average(data, scores(r, key, how, h, *places))
        is_whole = isinstance(step, (int, float)) and step == 1
        tokens = average if is_whole else tokens + step * (average - tokens)
        yield tokens if x.ndim == 3 else tokens.transpose(1, 2).reshape(x.shape)  # (B, N, C) -> (B, C, h, w)


def _check(
    x: Tensor,
    weight: Tensor,
    num_layers: int,
    kernel: str,
    bandwidth: float | Tensor | None,
    spatial_bandwidth: float | Tensor | None,
) -> Kernel:
    if x.ndim not in (3, 4):
        raise ValueError(f"mean shift takes tokens (B, N, C) or a map (B, C, h, w); got shape {tuple(x.shape)}")
    if num_layers < 0:
        raise ValueError(f"num_layers must be 0 or more; got {num_layers}")
    channels = x.shape[2] if x.ndim == 3 else x.shape[1]
    if channels != weight.shape[1]:
        raise ValueError(f"mean shift was built for {weight.shape[1]} channels; got {channels} in {tuple(x.shape)}")
    how = find_kernel(kernel)
    for name, value in (("bandwidth", bandwidth), ("spatial_bandwidth", spatial_bandwidth)):
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{name} must be above 0; got {value}")
    if spatial_bandwidth is not None and x.ndim != 4:
        raise ValueError(f"spatial_bandwidth needs a map (B, C, h, w), whose tokens have places; got {tuple(x.shape)}")
    return how
