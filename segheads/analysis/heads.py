"""Where patches and classes look inside transformer heads."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

from segheads.analysis.attention import AttentionMap, cell_size, one_image
from segheads.analysis.calls import AttentionCall, attention_calls
from segheads.heads import ClassAttentionHead, MaskTransformerHead
from segheads.model import SegmentationModel


def head_attention(model: SegmentationModel, image: Tensor, pixel: tuple[int, int]) -> list[AttentionMap]:
    """Where the patch at a pixel looks, in every layer of every mask transformer of the head.

    Args:
        model: A model whose head is, or holds, a mask transformer; in any mode.
        image: A normalised image.
        pixel: Row and column (y, x) of the pixel whose patch asks.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`; `tokens` of a map are the shares of the K class embeddings.

    Raises:
        ValueError: If the pixel is outside the image, the image has another shape, or there is no mask transformer.

    Examples:
        >>> import torch
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "mask_transformer", 5, pretrained=False)
        >>> [(m.layer, m.patches.shape, m.tokens.shape) for m in head_attention(model, torch.randn(3, 32, 48), (0, 0))]
        [(1, torch.Size([1, 2, 3]), torch.Size([1, 5])), (2, torch.Size([1, 2, 3]), torch.Size([1, 5]))]
    """
    images, (y, x) = one_image(image, pixel)

    def row(_: AttentionCall, size: tuple[int, int], cell: tuple[float, float]) -> int | None:
        return min(int(y / cell[0]), size[0] - 1) * size[1] + min(int(x / cell[1]), size[1] - 1)

    return _visit_heads(model, images, (MaskTransformerHead,), row)


def class_attention(model: SegmentationModel, image: Tensor, label: int) -> list[AttentionMap]:
    """Where the embedding of a class looks, in every layer of every mask transformer and class attention of the head.

    A repeated block (`shared_block` of a class attention) has one map for each repetition.

    Args:
        model: A model whose head is, or holds, one of the two; in any mode.
        image: A normalised image.
        label: The class, from 0.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`; `tokens` of a map are the shares of the K class embeddings in a mask
        transformer, and empty in a class attention, whose classes look at patches alone.

    Raises:
        ValueError: If there is no such class, the image has another shape, or the head holds neither.

    Examples:
        >>> import torch
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "class_attention", 5, pretrained=False, head_kwargs={"num_layers": 3})
        >>> [tuple(layer.patches.shape) for layer in class_attention(model, torch.randn(3, 32, 48), label=2)]
        [(8, 2, 3), (8, 2, 3), (8, 2, 3)]
    """
    images, _ = one_image(image, (0, 0))
    if not 0 <= label < model.num_classes:
        raise ValueError(f"label must be 0 to {model.num_classes - 1}, the model's classes; got {label}")

    def row(call: AttentionCall, size: tuple[int, int], _: tuple[float, float]) -> int | None:
        N, K = size[0] * size[1], model.num_classes
        queries, keys = call.query.shape[-2], call.key.shape[-2]
        if queries == keys == N + K:  # of a mask transformer: patches, then classes
            return N + label
        cross_attends = call.inside[-1].endswith("cross_attention")
        return label if cross_attends else None  # the rest is attention among classes

    return _visit_heads(model, images, (MaskTransformerHead, ClassAttentionHead), row)


def _visit_heads(
    model: SegmentationModel,
    images: Tensor,
    kinds: tuple[type[nn.Module], ...],
    row: Callable[[AttentionCall, tuple[int, int], tuple[float, float]], int | None],
) -> list[AttentionMap]:
    """Maps of the heads of some kinds inside the model's head; `row` tells which query is asked for, or None."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, kinds) and _is_part(name)}
    if not heads:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"attention of the head needs a {wanted} in it; got {type(model.head).__name__}")
    sizes: dict[str, tuple[int, int]] = {}
    maps: list[AttentionMap] = []
    layers = Counter[str]()

    def look(call: AttentionCall) -> None:
        part = next((name for name in reversed(call.inside) if name in heads), None)
        if part is None:
            return
        size = sizes[part]
        cell = cell_size(model, size, (images.shape[-2], images.shape[-1]))
        index = row(call, size, cell)
        if index is None:
            return
        layers[part] += 1
        weights, N = call.weights(slice(index, index + 1))[0, :, 0].cpu(), size[0] * size[1]
        patches, tokens = weights[:, :N].unflatten(1, size), weights[:, N:]
        maps.append(AttentionMap(part, layers[part], call.inside[-1], patches, tokens, cell))

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: sizes.update({name: tuple(args[0].shape[-2:])}))
        for name, module in heads.items()
    ]
    try:
        with attention_calls(model, look):
            model.logits(images)
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(maps, key=lambda found: list(heads).index(found.part))


def _is_part(name: str) -> bool:
    return name == "head" or name.startswith("head.")
