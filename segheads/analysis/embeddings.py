"""The vectors that stand for classes: how they lie to each other."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segheads.heads import ClassAttentionHead, LinearHead, MaskTransformerHead
from segheads.model import SegmentationModel


class Projection(NamedTuple):
    """Vectors in the plane that shows most of them.

    Attributes:
        points: `(..., 2)`, in the units of the vectors.
        explained: Share of the vectors' sum of squares that lies along each of the two axes, `(2,)`, 0 to 1.
        centred: Whether the mean was subtracted, so that the sum of squares is the variance.
    """

    points: Tensor
    explained: Tensor
    centred: bool


def class_embeddings(model: SegmentationModel) -> dict[str, Tensor]:
    """One vector for each class, of every head inside the model's head that has some.

    These are the learned class embeddings of mask transformers and class attentions, as they enter the first layer, and
    the rows of a linear head's weight. Of an ensemble, each learner has its own; learners that share theirs appear
    once.

    Args:
        model: A model whose head is, or holds, one of the three.

    Returns:
        Name of the head inside the model, such as `"head"` or `"head.learners.0"`, to `(K, D)`, float32 on the CPU.

    Raises:
        ValueError: If there is no such head.

    Examples:
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "mean_shift", 5, pretrained=False)  # shifts, then a linear head
        >>> [(name, tuple(vectors.shape)) for name, vectors in class_embeddings(model).items()]
        [('head.decoder', (5, 64))]
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.head.named_modules(prefix="head"):
        vectors = _vectors(module)
        if vectors is not None and id(vectors) not in seen:
            seen.add(id(vectors))
            found[name] = vectors.detach().reshape(model.num_classes, -1).float().cpu()
    if not found:
        raise ValueError(
            f"class embeddings are those of a LinearHead, MaskTransformerHead or ClassAttentionHead; "
            f"{type(model.head).__name__} holds none of them"
        )
    return found


def _vectors(module: nn.Module) -> Tensor | None:
    if isinstance(module, (MaskTransformerHead, ClassAttentionHead)):
        return module.class_embeddings
    return module.classifier.weight if isinstance(module, LinearHead) else None


def project(vectors: Tensor, *, centre: bool = True) -> Projection:
    """The two directions along which vectors differ most, and the vectors in their plane.

    Principal components, by a singular value decomposition (Segmenter, Fig. 8, whose caption names the decomposition
    and does not say whether embeddings were centred). Signs, which the decomposition leaves open, are such that the
    longest way from the origin along each axis is positive.

    Args:
        vectors: At least one vector; of fewer than 2 dimensions, the missing axes are 0.
        centre: Subtract the mean first.

    Shape:
        `(..., D)`; all leading axes count as vectors and stay.

    Raises:
        ValueError: If there is no vector, or one is not finite.

    Examples:
        >>> points, explained, _ = project(torch.tensor([[3.0, 0, 1], [-3, 0, 1], [0, 1, 1], [0, -1, 1]]))
        >>> points.tolist(), explained
        ([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], tensor([0.9000, 0.1000]))
    """
    if vectors.ndim < 2 or vectors.numel() == 0:
        raise ValueError(f"vectors must be (..., D) with at least one; got {tuple(vectors.shape)}")
    flat = vectors.detach().double().cpu().flatten(0, -2)  # (..., D) -> (M, D)
    if not flat.isfinite().all():
        raise ValueError(f"vectors must be finite; {int((~flat.isfinite()).any(1).sum())} of {len(flat)} are not")
    if centre:
        flat = flat - flat.mean(0)
    flat = F.pad(flat, (0, max(0, 2 - flat.shape[1]), 0, max(0, 2 - flat.shape[0])))  # so that there are two axes
    U, s, _ = torch.linalg.svd(flat, full_matrices=False)
    points = (U[:, :2] * s[:2])[: vectors[..., 0].numel()]
    longest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points = points * torch.where(longest < 0, -1.0, 1.0) + 0.0  # no -0
    explained = s[:2].square() / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
    return Projection(points.reshape(*vectors.shape[:-1], 2).float(), explained.float(), centre)


def cosine_similarity(vectors: Tensor) -> Tensor:
    """Cosine of the angle between every two vectors (SenFormer, Fig. 4, of each learner's class embeddings).

    Args:
        vectors: One vector for each class. A vector of zeros has a similarity of 0 to all, itself included.

    Shape:
        `(K, D)` to `(K, K)`, between -1 and 1, float32.

    Raises:
        ValueError: If vectors are not `(K, D)`.

    Examples:
        >>> cosine_similarity(torch.tensor([[2.0, 0], [0, 3], [-1, 0]]))
        tensor([[ 1.,  0., -1.],
                [ 0.,  1.,  0.],
                [-1.,  0.,  1.]])
    """
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be (K, D); got {tuple(vectors.shape)}")
    unit = F.normalize(vectors.detach().double(), dim=1)
    return (unit @ unit.T).clamp(-1, 1).add(0.0).float()
