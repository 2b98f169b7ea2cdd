"""Upsampled logits at some of the pixels, and one number of each pixel, without the full-resolution tensors."""

import torch
from torch import Tensor

from segheads.functional.bilinear import TileMemory, bilinear_weights, tiles, wide
from segheads.functional.cross_entropy import is_valid


def upsample_sampled(logits: Tensor, size: tuple[int, ...], stride: int) -> Tensor:
    """Every `stride`-th pixel of bilinearly upsampled logits in both directions, from pixel `stride // 2` on.

    Equal to `F.interpolate(logits, size, mode="bilinear")[:, :, stride // 2 :: stride, stride // 2 :: stride]`.

    Args:
        logits: Class scores on the head's grid.
        size: Height and width of the image, pixels.
        stride: Pixels from one to the next.

    Shape:
        `(B, K, h, w)` to `(B, K, y, x)`, fp32 or wider.
    """
    part, x = slice(stride // 2, None, stride), logits.to(wide(logits.dtype))
    rows, columns = (bilinear_weights(n, full, part).to(x) for n, full in zip(logits.shape[2:], size, strict=True))
    return rows @ (x @ columns.mT)


def hardest_pixels(logits: Tensor, labels: Tensor, ignore_index: int, threshold: float, keep: float) -> Tensor:
    """Where the probability of the own class is below a threshold, or among the lowest of the image.

    Args:
        logits: Class scores on the head's grid.
        labels: Class of each pixel, or `ignore_index`.
        ignore_index: The label that is left out.
        threshold: A probability.
        keep: Least share of an image's valid pixels that is taken.

    Shape:
        logits `(B, K, h, w)`, labels `(B, H, W)`; the result `(B, H, W)`, bool, False where ignored.
    """
    valid = is_valid(labels, ignore_index)
    probability = torch.where(valid, _label_probability(logits, torch.where(valid, labels, 0)), 2.0).flatten(1)
    last = (valid.flatten(1).sum(1) * keep).ceil().long()  # the last of the hardest that count whatever they are
    of_last = probability.sort(1).values.gather(1, (last - 1).clamp(min=0)[:, None])
    hard = (probability < threshold) | ((probability <= of_last) & (last > 0)[:, None])
    return hard.view_as(labels) & valid


@torch.library.custom_op("segheads::label_probability", mutates_args=())
def _label_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax, at the label, of upsampled logits, in tiles: `(B, K, h, w)` and `(B, H, W)` to `(B, H, W)`."""
    (K, h, w), (H, W) = logits.shape[1:], labels.shape[1:]
    probability = logits.new_empty(labels.shape, dtype=wide(logits.dtype))
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        plan = list(tiles(h, w, (H, W), K, logits))
        memory = TileMemory()
        for number in range(len(logits)):
            for tile in plan:
                at = (number, tile.rows.pixels, tile.columns.pixels)
                scores = tile.upsample(logits[number], out=memory(tile, K, logits)).softmax(1)
                label = labels[at].long()
                inside = (label >= 0) & (label < K)
                own = scores.gather(1, torch.where(inside, label, 0).unsqueeze(1)).squeeze(1)
                probability[at] = torch.where(inside, own, -1)  # always hard, so that the loss meets it and says so
    return probability


@_label_probability.register_fake
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(labels.shape, dtype=wide(logits.dtype))
