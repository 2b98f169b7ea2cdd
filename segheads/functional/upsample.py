"""The one upsampling: low-resolution logits to a loss, or to a label map, at the size of the labels."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from segheads.classes import check_ignore_index
from segheads.functional.bands import GRAIN, can_run_in_bands, run_in_bands, run_parts
from segheads.functional.bilinear import TileMemory, tiles, wide
from segheads.functional.binary import without_background
from segheads.functional.cross_entropy import cross_entropy_sum, is_valid, plain_cross_entropy_sum
from segheads.functional.paths import kernels_for

Reduction = Literal["valid", "all"]


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear upsampling (align_corners False) in fp32 or wider.

    Args:
        logits: Class scores on the head's grid.
        size: Height and width of the result, pixels.

    Shape:
        `(B, K, h, w)` to `(B, K, *size)`.
    """
    logits = logits.to(wide(logits.dtype))
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    reduction: Reduction = "valid",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits, upsampled bilinearly to the labels' size, and labels.

    Equal to `F.cross_entropy(F.interpolate(logits, size, mode="bilinear"), labels)` and its gradient, without the
    full-resolution tensors: what is held is the gradient on the head's grid and a tile for each thread. Where
    logits have the labels' size already, it is `F.cross_entropy`. Works under autocast (scores are fp32), DDP,
    checkpointing and torch.compile, to which it is one operation. There are no gradients of gradients.

    `reduction="valid"` divides by the pixels that are not ignored (Segmenter), or with weights by the sum of theirs, as
    `F.cross_entropy` does; `"all"` by all pixels, as MMSegmentation and with it the MeanShifter's author do. Where
    every pixel is ignored both give 0 with a zero gradient; `F.cross_entropy` gives NaN there, which ends a training
    run of batch size 1.

    Args:
        logits: Class scores on the head's grid.
        labels: Class of each pixel, or `ignore_index`.
        ignore_index: The label that is left out.
        reduction: What the sum over pixels is divided by.
        weight: Weight of each class.
        label_smoothing: Share of the target, between 0 and 1, that is spread over all classes.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)` of an integer type, weight `(K,)`; the result is a scalar of at least
        fp32.

    Raises:
        ValueError: If shapes or types do not match, `ignore_index` is a class, `reduction` is unknown,
            `label_smoothing` is out of range, or a label is neither a class nor `ignore_index`. On a GPU, where looking
            would have to wait, such a label makes the loss NaN instead.

    Examples:
        >>> logits = torch.tensor([[[[9.0]], [[0.0]]]])  # one image, two classes, one patch
        >>> upsample_cross_entropy(logits, torch.tensor([[[0, 0], [0, 255]]]))
        tensor(0.0001)
    """
    _check(logits, labels, reduction, weight, label_smoothing)
    check_ignore_index(ignore_index, logits.shape[1])
    b, s = weight, None
    if weight is not None:
        b = weight = weight.detach().to(logits.device, wide(logits.dtype))
    divisor = pixel_divisor(labels, ignore_index, reduction, weight)
    divisor = torch.where(divisor > 0, divisor, 1)
    if _is_at_size(logits, labels):
        return plain_cross_entropy_sum(logits, labels, weight, label_smoothing, ignore_index) / divisor
    if label_smoothing:
        ones = logits.new_ones(logits.shape[1], dtype=wide(logits.dtype)) if weight is None else weight
        b, s = (1 - label_smoothing) * ones, label_smoothing / logits.shape[1] * ones
    return cross_entropy_sum(logits, labels, b, s, ignore_index) / divisor


def probabilities_of(logits: Tensor) -> Tensor:
    """The probabilities `(..., K, h, w)` whose logarithms an ensemble gives; of a single class, K = 1, its logits."""
    return logits.sigmoid() if logits.shape[-3] == 1 else logits.exp()


def log_of(probabilities: Tensor) -> Tensor:
    """What an ensemble would give for probabilities `(..., K, h, w)`; finite where they are 0."""
    smallest = torch.finfo(probabilities.dtype).tiny
    if probabilities.shape[-3] == 1:
        return probabilities.clamp(min=smallest).log() - (1 - probabilities).clamp(min=smallest).log()
    return probabilities.clamp(min=smallest).log()


@overload
def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype | None = torch.int64,
    return_probability: Literal[False] = False,
) -> Tensor: ...


@overload
def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype | None = torch.int64,
    return_probability: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype | None = torch.int64,
    return_probability: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map of logits upsampled bilinearly to `size`, without the upsampled logits.

    Equal to `F.interpolate(logits, size, mode="bilinear").argmax(1)` but for pixels whose best two scores differ by no
    more than rounding. Nothing is compiled; inside a graph that torch.compile or torch.export makes it is those two
    lines, which a compiler fuses. So it is for one class, and on a GPU where logits have that size already.

    Args:
        logits: Class scores on the head's grid.
        size: Height and width of the label map, pixels.
        dtype: Integer type of the labels; None means the smallest: uint8 up to 256 classes, int16 above.
        return_probability: Return the probability of each pixel's label, too: the softmax's highest.

    Shape:
        `(B, K, h, w)` to `(B, *size)`; the probability has that shape, too, and is fp32 or wider.

    Raises:
        ValueError: If logits are not `(B, K, h, w)` or dtype cannot hold the classes.

    Examples:
        >>> upsample_argmax(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), (1, 4))
        tensor([[[0, 0, 1, 1]]])
    """
    if logits.ndim != 4:
        raise ValueError(f"expected logits (B, K, h, w); got {tuple(logits.shape)}")
    K, (H, W) = logits.shape[1], size
    dtype = smallest_dtype(K) if dtype is None else dtype
    if torch.iinfo(dtype).max < K - 1:
        raise ValueError(f"dtype {dtype} cannot hold {K} classes; None chooses the smallest that can")
    is_compiling = torch.compiler.is_compiling()
    takes_argmax = is_compiling or K == 1 or (logits.shape[2:] == (H, W) and logits.device.type != "cpu")
    kernels = kernels_for(logits) if H * W and not takes_argmax else None
    with torch.autocast(logits.device.type, enabled=False):
        if takes_argmax:
            scores = upsample(logits, size)
            labels, probability = scores.argmax(1).to(dtype), scores.softmax(1).amax(1) if return_probability else None
        elif kernels is not None:
            labels, probability = kernels.label_map(logits, size, dtype, return_probability=return_probability)
        else:
            shape = (len(logits), H, W)
            labels = logits.new_empty(shape, dtype=dtype)
            probability = logits.new_empty(shape, dtype=wide(logits.dtype)) if return_probability else None
            plan = list(tiles(logits.shape[2], logits.shape[3], size, 1 if K == 2 else K, logits))
            parts = [(number, tile) for number in range(len(logits)) for tile in plan]
            memory = TileMemory()

            def compute(index: int) -> None:
                number, tile = parts[index]
                at = (number, tile.rows.pixels, tile.columns.pixels)
                if K == 2:
                    pair = tile.source(logits[number]).to(wide(logits.dtype))
                    lead = tile.interpolate(without_background(pair[None])[0])[:, 0]  # (R, C)
                    torch.gt(lead, 0, out=labels[at])
                    if probability is not None:
                        probability[at] = lead.abs().sigmoid()
                    return
                scores = tile.upsample(logits[number], out=memory(tile, K, logits))
                if probability is not None:
                    probability[at] = scores.softmax(1).amax(1)
                labels[at] = best_class(scores, out=scores)

            run_parts(len(parts), compute, lambda *_: None, (logits,))
    return labels if probability is None else (labels, probability)


def best_class(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """The class of the highest score, the lowest such class where several are equal.

    Several times quicker on the CPU than `scores.argmax(1)`, which is not vectorised along this axis.

    Args:
        scores: Of each pixel.
        out: Memory to work in, such as `scores` where nothing else needs them.

    Shape:
        scores and `out` `(R, K, C)`; the result `(R, C)`, uint8 up to 256 classes, int16 above.
    """
    K = scores.shape[1]
    if K == 2:
        return (scores[:, 1] > scores[:, 0]).to(torch.uint8)
    out = torch.empty_like(scores, dtype=wide(scores.dtype)) if out is None else out
    is_best = torch.eq(scores, scores.amax(1, keepdim=True), out=out)  # as bool it would take three times as long
    from_last = torch.arange(K - 1, -1, -1, dtype=out.dtype, device=out.device)  # the lowest class has the highest
    return (K - 1 - is_best.mul_(from_last[:, None]).amax(1)).to(smallest_dtype(K))


def smallest_dtype(num_classes: int) -> torch.dtype:
    """The smallest integer type that holds every class: uint8 up to 256 of them, int16 above."""
    return torch.uint8 if num_classes <= 256 else torch.int16


def _is_at_size(logits: Tensor, labels: Tensor) -> bool:
    """Whether there is nothing to upsample, and PyTorch's own operation is the quickest."""
    traces_on_cpu = (
        logits.device.type == "cpu" and torch.compiler.is_compiling()
    )  # no graph looks at labels, our op does
    return logits.shape[2:] == labels.shape[1:] and labels.numel() > 0 and not traces_on_cpu


def pixel_divisor(labels: Tensor, ignore_index: int, reduction: Reduction, weight: Tensor | None = None) -> Tensor:
    """What a sum over pixels is divided by, a scalar, 0 where every pixel is ignored: see `upsample_cross_entropy`.

    Args:
        labels: Class of each pixel, or `ignore_index`.
        ignore_index: The label that is left out.
        reduction: `"valid"` or `"all"`.
        weight: Weight of each class, `(K,)`.
    """
    if reduction == "all":
        return torch.full((), labels.numel(), device=labels.device)
    if weight is None:
        return _count_valid(labels, ignore_index)
    valid = is_valid(labels, ignore_index)
    return torch.where(valid, weight[torch.where(valid, labels, 0).long().clamp(0, len(weight) - 1)], 0).sum()


def _count_valid(labels: Tensor, ignore_index: int) -> Tensor:
    if labels.numel() <= GRAIN or not can_run_in_bands(labels):
        return is_valid(labels, ignore_index).sum()
    total = labels.new_zeros((), dtype=torch.int64)

    def add(_: int, count: Tensor) -> None:
        total.add_(count)

    run_in_bands(len(labels), lambda index: is_valid(labels[index], ignore_index).sum(), add)
    return total


def _check(logits: Tensor, labels: Tensor, reduction: str, weight: Tensor | None, label_smoothing: float) -> None:
    if reduction not in ("valid", "all"):
        raise ValueError(f'reduction must be "valid" or "all"; got {reduction!r}')
    if logits.ndim != 4 or labels.ndim != 3 or logits.shape[0] != labels.shape[0]:
        raise ValueError(
            "expected logits (B, K, h, w) and labels (B, H, W) of one batch size; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be of an integer type; got {labels.dtype}")
    if weight is not None and weight.shape != logits.shape[1:2]:
        raise ValueError(f"weight must have one value for each of {logits.shape[1]} classes; got {tuple(weight.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1; got {label_smoothing}")
