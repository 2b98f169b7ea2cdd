"""What the published implementations do, written out: the side that `recipes/benchmark` compares with.

Every function computes what its counterpart in segheads computes, from the same parameters; the tests compare values
and gradients. Left out, in favour of this side: MMSegmentation also computes the pixel accuracy of every training step
from full-resolution logits, and materialises the attention of its backbones.

Sources: https://github.com/open-mmlab/mmsegmentation (0.29: `decode_head.losses`, `encoder_decoder.slide_inference`),
https://github.com/rstrudel/segmenter, https://github.com/WalBouss/SenFormer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.heads import ClassAttentionHead, Head, MaskTransformerHead, MeanShiftHead, SenFormerHead
from segheads.model import SegmentationModel


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, as every published head does it."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, reduction: str = "valid") -> Tensor:
    """Logits at the labels' size, then cross-entropy; `"all"` is MMSegmentation's mean over all pixels."""
    scores = resize(logits, (labels.shape[1], labels.shape[2]))
    if reduction == "all":
        return F.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="none").mean()
    return F.cross_entropy(scores, labels, ignore_index=ignore_index)


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits at the labels' size, then the best class."""
    return resize(logits, size).argmax(1)


def mean_shift(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_layers: int = 1) -> Tensor:
    """The formula of the author's MeanShifter, on tokens `(B, N, C)`, with its (N, N) matrix."""
    for _ in range(num_layers):
        q = F.linear(x, weight, bias)
        x = (q @ q.mT * len(weight) ** -0.5).softmax(-1) @ x
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention of tokens `(B, N, D)` with its matrix of probabilities."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # -> (B, heads, N, D / heads)
    probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def class_attention(head: ClassAttentionHead, x: Tensor) -> Tensor:
    """SenFormer's learner: every block reads keys and values anew, those of a repeated block too."""
    features = head.norm_features(x.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, N, D)
    classes = head.class_embeddings.expand(len(x), -1, -1)
    blocks: Any = head.blocks
    for layer in range(head.num_layers):
        block = blocks[0 if head.shared_block else layer]
        cross, own = block.cross_attention, block.self_attention
        k, v = cross.kv(features).chunk(2, dim=-1)
        classes = classes + cross.proj(attention(cross.q(block.norm1(classes)), k, v, cross.num_heads))
        q, k, v = own.qkv(block.norm2(classes)).chunk(3, dim=-1)
        classes = classes + own.proj(attention(q, k, v, own.num_heads))
        classes = classes + block.mlp(block.norm3(classes))
    return (head.norm(classes) @ features.mT).unflatten(2, x.shape[2:])  # (B, K, N) -> (B, K, h, w)


def predictions(head: Head, x: Any) -> list[Tensor]:
    """A head's predictions, the final one first; of heads without a special case those of the head itself."""
    if isinstance(head, SenFormerHead):
        return _ensemble(head, x)
    if isinstance(head, ClassAttentionHead):
        return [class_attention(head, x)]
    if isinstance(head, MeanShiftHead):
        projection, tokens = head.shift.projection, x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        tokens = mean_shift(tokens, projection.weight, projection.bias, num_layers=head.num_layers)
        return predictions(head.decoder, tokens.transpose(1, 2).reshape(x.shape))
    if isinstance(head, MaskTransformerHead):
        with _materialised_attention(head):
            return [head(x)]
    return head.predictions(x)


def has_plain_forward(head: Head) -> bool:
    """Whether `predictions` does anything else than the head."""
    return isinstance(head, (SenFormerHead, ClassAttentionHead, MeanShiftHead, MaskTransformerHead))


def head_loss(outputs: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of the first prediction plus the mean over the others."""
    first, *others = [compute(output) for output in outputs]
    return first + sum(others) / len(others) if others else first


def model_loss(model: SegmentationModel, images: Tensor, labels: Tensor) -> Tensor:
    """The training loss of a whole model."""
    maps = model.backbone(images)
    outputs = predictions(model.head, for_head(model, maps))

    def compute(logits: Tensor) -> Tensor:
        return loss(logits, labels, model.ignore_index, model.loss_reduction)

    total = head_loss(outputs, compute)
    if model.auxiliary_head is not None:
        total = total + model.auxiliary_weight * compute(model.auxiliary_head(maps[max(len(maps) - 2, 0)]))
    return total


def for_head(model: SegmentationModel, maps: list[Tensor]) -> Any:
    """What a model's head takes of the backbone's maps: all of them, or one."""
    if model.pyramid is not None:
        with _materialised_attention(model.pyramid):
            maps = model.pyramid(maps)
        return maps if model.head.multi_level else maps[0]
    return maps if model.head.multi_level else maps[-1]


@torch.no_grad()
def slide_inference(model: SegmentationModel, image: Tensor, window: int, stride: int) -> Tensor:
    """MMSegmentation's label map of one image (1, 3, H, W): one window after another, all at full resolution."""
    H, W = image.shape[2:]
    rows = max(H - window + stride - 1, 0) // stride + 1
    columns = max(W - window + stride - 1, 0) // stride + 1
    total = image.new_zeros((1, model.num_classes, H, W))
    count = image.new_zeros((1, 1, H, W))
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + window, H), min(column * stride + window, W)
            top, left = max(bottom - window, 0), max(right - window, 0)
            crop = image[:, :, top:bottom, left:right]
            logits = predictions(model.head, for_head(model, model.backbone(crop)))[0]
            logits = resize(logits, (crop.shape[2], crop.shape[3]))
            total += F.pad(logits, (left, W - right, top, H - bottom))
            count[:, :, top:bottom, left:right] += 1
    scores = resize(total / count, (H, W))  # to the size of the original file, here the same
    return scores.softmax(1).argmax(1)[0]


def _ensemble(head: SenFormerHead, maps: Sequence[Tensor]) -> list[Tensor]:
    """Learners' logits at the finest grid, and the logarithm of the sum of their probabilities before them."""
    if head.merge != "average" or head.mean_shift_layers:
        raise ValueError(f"the published ensemble averages and has no shift; got {head.merge}, {head.settings()}")
    size = (maps[0].shape[2], maps[0].shape[3])
    learners: Any = head.learners
    levels = [level for level in head.levels for _ in range(head.learners_per_level)]
    logits = [
        resize(predictions(learner, maps[level])[0], size) for learner, level in zip(learners, levels, strict=True)
    ]
    total = sum((x.softmax(1) for x in logits[1:]), logits[0].softmax(1))
    return [total.clamp(min=1e-15).log(), *logits]


@contextmanager
def _materialised_attention(head: nn.Module) -> Iterator[None]:
    """Write timm's attention out, as in the published Segmenter and in SenFormer's pyramid."""
    modules: list[Any] = [module for module in head.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module, fused in zip(modules, before, strict=True):
            module.fused_attn = fused
