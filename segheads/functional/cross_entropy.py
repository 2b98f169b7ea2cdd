"""Sum of the cross-entropy of upsampled logits and its gradient, tile by tile."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from segheads.functional.bands import GRAIN, can_run_in_bands, run_in_bands, run_parts
from segheads.functional.bilinear import Tile, TileMemory, tiles, wide
from segheads.functional.binary import exp_, without_background
from segheads.functional.paths import kernels_for

_IGNORED = -100  # no class, whatever `ignore_index` is
_SMALLEST_SUM = 2.0**-64  # of exponentials; what is below fp32's smallest number adds less than rounding to it
_LOWEST = -87.0  # whose exponential is no subnormal number


def cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Sum over pixels of `b_y (lse - u_y) + sum_k s_k (lse - u_k)`, differentiable with respect to the logits.

    `u` are the upsampled scores of a pixel of class y, `lse` the logarithm of the sum of their exponentials. The
    gradient is computed along with the value, while the scores are at hand. To torch.compile this is one operation.

    Args:
        logits: Class scores on the head's grid.
        labels: Class of each pixel, or `ignore_index`.
        label_weights: b; None means ones.
        smoothing_weights: s; None means zeros.
        ignore_index: The label that is left out.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)`, weights `(K,)`; a scalar, fp32 or wider.

    Raises:
        ValueError: On the CPU, if a label is neither a class nor `ignore_index`. Elsewhere the sum is then NaN.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CrossEntropySum.apply(logits, labels, label_weights, smoothing_weights, ignore_index)[0]
    return _value_and_gradient(logits, labels, label_weights, smoothing_weights, ignore_index, False)[0]


def plain_cross_entropy_sum(
    logits: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float, ignore_index: int
) -> Tensor:
    """The same sum of logits that are at the labels' size already, by PyTorch's own operation.

    Args:
        logits: Class scores of each pixel.
        labels: Class of each pixel, or `ignore_index`.
        weight: Weight of each class.
        label_smoothing: Share of the target that is spread over all classes.
        ignore_index: The label that is left out.

    Shape:
        logits `(B, K, H, W)`, labels `(B, H, W)`, weight `(K,)`; a scalar, fp32 or wider.

    Raises:
        ValueError: As `cross_entropy_sum` does; elsewhere the sum is NaN, too.
    """
    valid = is_valid(labels, ignore_index)
    inside, error = check_range(torch.where(valid, labels, 0).long(), logits.shape[1], ignore_index)
    target = torch.where(valid, inside, _IGNORED)
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.to(wide(logits.dtype))
        losses = F.cross_entropy(
            scores, target, weight, ignore_index=_IGNORED, reduction="none", label_smoothing=label_smoothing
        )
    return losses.sum() + error  # PyTorch's own sum on a GPU differs from run to run


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return _value_and_gradient(logits, *others, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, grad).to(ctx.dtype), None, None, None, None


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """The product with a scalar."""
    if gradient.numel() <= GRAIN or not can_run_in_bands(gradient, grad):
        return gradient * grad
    scaled = torch.empty_like(gradient)
    run_in_bands(len(gradient), lambda index: torch.mul(gradient[index], grad, out=scaled[index]), lambda *_: None)
    return scaled


@torch.library.custom_op(
    "segheads::cross_entropy_sum",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor? label_weights, Tensor? smoothing_weights, int ignore_index, "
    "bool needs_gradient) -> (Tensor, Tensor)",
)
def _value_and_gradient(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The sum, and its gradient with respect to the logits, in fp32 or wider; empty if it is not needed."""
    arguments = (logits, labels, label_weights, smoothing_weights, ignore_index)
    kernels = kernels_for(logits) if labels.numel() else None
    compute = _in_tiles if kernels is None else kernels.loss_and_gradient
    with torch.autocast(logits.device.type, enabled=False):
        total, gradient = compute(*arguments, needs_gradient=needs_gradient)
    return total, total.new_empty(0) if gradient is None else gradient


@_value_and_gradient.register_fake
def _(
    logits: Tensor, _labels: Any, _label_weights: Any, _smoothing_weights: Any, _ignore_index: int, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = wide(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty(logits.shape if needs_gradient else (0,), dtype=dtype)


def is_valid(labels: Tensor, ignore_index: int) -> Tensor:
    """Where labels are not `ignore_index`, which their type need not be able to hold."""
    if not _can_hold(labels, ignore_index):
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != ignore_index


def holding(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of a type that has room for `ignore_index`: their own, or int64."""
    return labels if _can_hold(labels, ignore_index) else labels.long()


def _can_hold(labels: Tensor, value: int) -> bool:
    limits = torch.iinfo(labels.dtype)
    return limits.min <= value <= limits.max


def _in_tiles(
    logits: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    (K, h, w), (H, W), dtype = logits.shape[1:], labels.shape[1:], wide(logits.dtype)
    total = logits.new_zeros((), dtype=dtype)
    gradient = logits.new_empty(logits.shape, dtype=dtype) if needs_gradient else None
    channels, of_tile = (1, _loss_of_pair_tile) if K == 2 else (K, _loss_of_tile)
    plan = list(tiles(h, w, (H, W), channels, logits))
    parts = [(number, tile) for number in range(len(logits)) for tile in plan]
    memory = TileMemory()
    if gradient is not None and not parts:  # no pixels
        gradient.zero_()

    def compute(index: int) -> tuple[Tensor, Tensor | None]:
        number, tile = parts[index]
        source = tile.source(logits[number]).to(dtype)
        source = source if K != 2 else without_background(source[None])[0]
        label = labels[number, tile.rows.pixels, tile.columns.pixels]
        room = memory(tile, channels, logits)
        loss, of_scores = of_tile(tile, source, label, label_weights, smoothing_weights, ignore_index, room)
        return loss, None if gradient is None else tile.gradient(of_scores)

    def add(index: int, part: tuple[Tensor, Tensor | None]) -> None:
        (loss, own), (number, tile) = part, parts[index]
        total.add_(loss)
        if gradient is not None and own is not None:
            if index % len(plan) == 0:  # here, and not before: PyTorch would wake all its threads
                gradient[number].zero_()
            tile.source(gradient[number]).add_(own if K != 2 else torch.cat([-own, own]))

    run_parts(len(parts), compute, add, (logits, labels))
    return total, gradient


def _loss_of_pair_tile(
    tile: Tile,
    source: Tensor,
    label: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `_loss_of_tile` does, for two classes, of whose scores only the difference counts, (1, h', w').

    With the weights a₀, a₁ of the classes at a pixel, the loss of d = u₁ - u₀ is
    `(a₀ + a₁) log(1 + exp(-|d|)) + a₀ max(d, 0) + a₁ max(-d, 0)`: terms of one sign, so that no digits are lost where
    the model is sure. Where classes weigh the same it is `log(1 + exp(±d))`, with half the operations.
    """
    difference = tile.interpolate(source, out=memory)  # (R, 1, C)
    label = label.unsqueeze(1).to(difference.dtype)  # (R, C) -> (R, 1, C); half the bytes of int64
    valid = torch.ne(label, ignore_index, out=torch.empty_like(label))
    of_second, error = check_range(valid * label, 2, ignore_index)
    gradient = torch.sigmoid(difference)
    if label_weights is None and smoothing_weights is None:
        gradient.sub_(of_second).mul_(valid)
        opposed = of_second.mul_(-2).add_(1).mul_(difference)  # d of the first class, -d of the second
        return F.softplus(opposed, threshold=60).mul_(valid).sum() + error, gradient
    of_first = valid - of_second
    if label_weights is not None:
        of_first, of_second = of_first * label_weights[0], of_second * label_weights[1]
    if smoothing_weights is not None:
        of_first, of_second = of_first + valid * smoothing_weights[0], of_second + valid * smoothing_weights[1]
    both = of_first + of_second
    of_wrong = torch.where(difference > 0, of_first, -of_second)
    total = (both * -F.logsigmoid(difference.abs())).sum() + of_wrong.mul_(difference).sum() + error
    return total, gradient.mul_(both).sub_(of_second)


def _loss_of_tile(
    tile: Tile,
    source: Tensor,
    label: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    memory: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a tile's pixels, and the gradient of their scores `(R, K, C)`, in `memory`.

    `source` has the logits that they are made of, `(K, h', w')`.
    """
    valid = is_valid(label, ignore_index)
    label = torch.where(valid, label, 0).long().unsqueeze(1)  # (R, C) -> (R, 1, C)
    label, error = check_range(label, len(source), ignore_index)
    share = valid.unsqueeze(1).to(memory.dtype)
    weight = share if label_weights is None else share * label_weights[label]
    terms = _exponentials(tile, source, label, smoothing_weights, memory)
    lse = terms.sums.log()
    total = (weight * (lse - terms.at_label).clamp_(min=0)).sum() + error  # below 0 by rounding alone
    of_lse = weight
    if smoothing_weights is not None:
        everywhere = smoothing_weights.sum()
        total += (share * (everywhere * lse - terms.smoothed)).sum()
        of_lse = weight + share * everywhere
    gradient = terms.exponentials.mul_(of_lse / terms.sums)
    gradient.scatter_add_(1, label, -weight)
    if smoothing_weights is not None:
        gradient.sub_(smoothing_weights[:, None] * share)
    return total, gradient


class _Exponentials(NamedTuple):
    """Of a tile's scores, each less a number of its pixel, which the softmax does not depend on."""

    exponentials: Tensor  # (R, K, C)
    sums: Tensor  # (R, 1, C), over the classes
    at_label: Tensor  # (R, 1, C), the label's score, less that number
    smoothed: Tensor | float  # (R, 1, C), the scores' sum by weights, less that number of each


def _exponentials(
    tile: Tile, source: Tensor, label: Tensor, weights: Tensor | None, memory: Tensor, *, by_pixel: bool = False
) -> _Exponentials:
    """Exponentials of a tile's scores, in `memory`.

    The softmax takes from each pixel's scores the highest, which reads them twice more. The upsampled highest of the
    grid, which is no lower, is as good but between cells that are sure of different classes; the sums show it there.
    """
    by_pixel = by_pixel or source.device.type != "cpu"  # looking at the sums would wait for a GPU
    source = source if by_pixel else source - source.amax(0)
    scores = tile.interpolate(source, out=memory)
    if by_pixel:
        scores.sub_(scores.amax(1, keepdim=True))
    at_label = scores.gather(1, label)
    smoothed = 0.0 if weights is None else torch.einsum("rkc,k->rc", scores, weights).unsqueeze(1)
    none_vanishes = not by_pixel and bool(source.amin() > _LOWEST)
    sums = (scores.exp_() if none_vanishes else exp_(scores)).sum(1, keepdim=True)
    if not by_pixel and not sums.amin() >= _SMALLEST_SUM:  # NaN is not
        return _exponentials(tile, source, label, weights, memory, by_pixel=True)
    return _Exponentials(scores, sums, at_label, smoothed)


def check_range(label: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor | float]:
    """Labels that name a class, and what to add to the loss: nothing on the CPU, where looking costs little.

    Elsewhere, and in a compiled graph, it is NaN if one did not.

    Args:
        label: Class of each pixel; what is ignored has a class, too.
        num_classes: Number of classes.
        ignore_index: For the message.

    Raises:
        ValueError: On the CPU, if one is out of range.
    """
    lowest, highest = label.aminmax()
    if label.device.type != "cpu" or torch.compiler.is_compiling():
        inside = (lowest >= 0) & (highest < num_classes)
        return label.clamp(0, num_classes - 1), torch.where(inside, 0.0, torch.nan)
    for value in (int(lowest), int(highest)):
        if not 0 <= value < num_classes:
            raise ValueError(f"labels must be classes 0 to {num_classes - 1} or {ignore_index} (ignored); got {value}")
    return label, 0.0
