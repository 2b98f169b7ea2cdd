"""Sum of the cross-entropy of upsampled logits and its gradient, in one pass over tiles that fit into the cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from segheads.functional.bands import GRAIN, can_run_in_bands, run_in_bands, run_parts
from segheads.functional.bilinear import rows_of_tiles, tile_memory, tiles, wide
from segheads.functional.paths import kernels_for

_IGNORED = -100  # no class, whatever `ignore_index` is


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
    images = range(len(logits))
    parts = [(number, row) for number in images for row in rows_of_tiles(plan)]
    if gradient is not None and not parts:  # no pixels
        gradient.zero_()

    def compute(index: int) -> tuple[Tensor, Tensor | None]:
        number, row = parts[index]
        of_scores, of_gradient = (tile_memory(row, channels, logits) for _ in range(2))
        loss = logits.new_zeros((), dtype=dtype)
        image = logits[number] if K != 2 else logits[number, 1:].to(dtype) - logits[number, :1]
        source = row[0].rows.source
        own = None if gradient is None else gradient.new_zeros(channels, source.stop - source.start, w)
        for tile in row:
            scores = tile.upsample(image, out=of_scores)
            scores_gradient = of_gradient[: scores.numel()].view(scores.shape)
            label = labels[number, tile.rows.pixels, tile.columns.pixels]
            loss += of_tile(scores, label, label_weights, smoothing_weights, ignore_index, scores_gradient)
            if own is not None:
                tile.add_gradient(scores_gradient, own)
        return loss, own

    def add(index: int, part: tuple[Tensor, Tensor | None]) -> None:
        (loss, own), (number, row) = part, parts[index]
        total.add_(loss)
        if gradient is not None and own is not None:
            if row[0].rows.pixels.start == 0:  # here, and not before: PyTorch would wake all its threads
                gradient[number].zero_()
            gradient[number, :, row[0].rows.source] += own if K != 2 else torch.cat([-own, own])

    run_parts(len(parts), compute, add, (logits, labels))
    return total, gradient


def _loss_of_pair_tile(
    difference: Tensor,
    label: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    gradient: Tensor,
) -> Tensor:
    """What `_loss_of_tile` does, for two classes, of whose scores only the difference counts: `(R, 1, C)`.

    With the weights a₀, a₁ of the classes at a pixel, the loss of d = u₁ - u₀ is
    `(a₀ + a₁) log(1 + exp(-|d|)) + a₀ max(d, 0) + a₁ max(-d, 0)`: terms of one sign, so that no digits are lost where
    the model is sure. Where classes weigh the same it is `log(1 + exp(±d))`, with half the operations.
    """
    label = label.unsqueeze(1).to(difference.dtype)  # (R, C) -> (R, 1, C); half the bytes of int64
    valid = torch.ne(label, ignore_index, out=torch.empty_like(label))
    of_second, error = check_range(valid * label, 2, ignore_index)
    torch.sigmoid(difference, out=gradient)
    if label_weights is None and smoothing_weights is None:
        gradient.sub_(of_second).mul_(valid)
        opposed = of_second.mul_(-2).add_(1).mul_(difference)  # d of the first class, -d of the second
        return F.softplus(opposed, threshold=60).mul_(valid).sum() + error
    of_first = valid - of_second
    if label_weights is not None:
        of_first, of_second = of_first * label_weights[0], of_second * label_weights[1]
    if smoothing_weights is not None:
        of_first, of_second = of_first + valid * smoothing_weights[0], of_second + valid * smoothing_weights[1]
    both = of_first + of_second
    of_wrong = torch.where(difference > 0, of_first, -of_second)
    total = (both * -F.logsigmoid(difference.abs())).sum() + of_wrong.mul_(difference).sum() + error
    gradient.mul_(both).sub_(of_second)
    return total


def _loss_of_tile(
    scores: Tensor,
    label: Tensor,
    label_weights: Tensor | None,
    smoothing_weights: Tensor | None,
    ignore_index: int,
    gradient: Tensor,
) -> Tensor:
    """Sum of the losses of scores `(R, K, C)`, which it uses up; their gradient is left in `gradient`."""
    valid = is_valid(label, ignore_index)
    label = torch.where(valid, label, 0).long().unsqueeze(1)  # (R, C) -> (R, 1, C)
    label, error = check_range(label, scores.shape[1], ignore_index)
    share = valid.unsqueeze(1).to(scores.dtype)
    weight = share if label_weights is None else share * label_weights[label]
    highest = scores.amax(1, keepdim=True)
    at_label = scores.gather(1, label) - highest
    probabilities = torch.softmax(scores, 1, out=gradient)  # which becomes the gradient below
    lse = -probabilities.amax(1, keepdim=True).log()  # over `highest`, whose own probability is 1 / sum
    total = (weight * (lse - at_label)).sum() + error
    of_lse = weight
    if smoothing_weights is not None:
        everywhere = smoothing_weights.sum()
        smoothed = torch.einsum("rkc,k->rc", scores.sub_(highest), smoothing_weights).unsqueeze(1)
        total += (share * (everywhere * lse - smoothed)).sum()
        of_lse = weight + share * everywhere
    is_one = label_weights is None and smoothing_weights is None and valid.device.type == "cpu" and valid.all()
    if not is_one:  # off the CPU looking would cost more than it saves
        gradient *= of_lse
    gradient.scatter_add_(1, label, -weight)
    if smoothing_weights is not None:
        gradient.sub_(smoothing_weights[:, None] * share)
    return total


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
