"""Where two models call pixels by different names, and which of them is right."""

from typing import NamedTuple

import torch
from torch import Tensor

from segheads.classes import check_ignore_index
from segheads.functional.cross_entropy import holding

OUTCOMES = (
    "both right",
    "only the first right",
    "only the second right",
    "both wrong, alike",
    "both wrong, differently",
)
"""What can become of a pixel, in the order of `Disagreement.outcome`."""
IGNORED = 255


class Disagreement(NamedTuple):
    """What two label maps of one image have in common and what not.

    Attributes:
        first: Labels of the first model, `(H, W)`.
        second: Labels of the second model, `(H, W)`.
        differs: Where they are not the same, `(H, W)`, bool.
        outcome: Index into `OUTCOMES` of each pixel, 255 where the truth is to be ignored, `(H, W)`, uint8; None
            without a truth.
        shares: Share of the pixels with each outcome, of those that are not ignored, `(5,)`, 0 to 1; None without a
            truth.
        pairs: Share of all pixels that the first calls i and the second j, `(K, K)`, sums to 1.
    """

    first: Tensor
    second: Tensor
    differs: Tensor
    outcome: Tensor | None
    shares: Tensor | None
    pairs: Tensor


def compare_labels(
    first: Tensor, second: Tensor, num_classes: int, truth: Tensor | None = None, *, ignore_index: int = 255
) -> Disagreement:
    """Where two label maps of an image differ, between which classes, and which one is right (thesis, Fig. 2 and 3).

    Takes labels rather than models, since two models may want their images normalised differently.

    Args:
        first: Labels that the first model gives.
        second: Labels that the second model gives.
        num_classes: Number of classes K.
        truth: The true labels.
        ignore_index: The label of the truth that counts as none.

    Shape:
        All maps `(H, W)`, integer.

    Raises:
        ValueError: If the maps are not of one size, `ignore_index` is a class, or a label is none of the K classes.

    Examples:
        >>> first, second = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 2, 1]])
        >>> found = compare_labels(first, second, 3, truth=torch.tensor([[0, 0, 1, 255]]))
        >>> [OUTCOMES[k] for k in found.outcome[0, :3]], found.differs.sum().item()
        (['both right', 'both wrong, alike', 'only the first right'], 2)
    """
    check_ignore_index(ignore_index, num_classes)
    if truth is not None:
        truth = holding(truth, ignore_index)
    maps = {"first": first, "second": second} | ({} if truth is None else {"truth": truth})
    for name, labels in maps.items():
        if labels.ndim != 2 or labels.shape != first.shape:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in maps.items())
            raise ValueError(f"labels must be maps (H, W) of one size; got {shapes}")
        known = (labels >= 0) & (labels < num_classes)
        if name == "truth":
            known |= labels == ignore_index
        if not known.all():
            raise ValueError(f"{name} must hold labels 0 to {num_classes - 1}; got {labels[~known][0].item()}")
    first, second = first.long().cpu(), second.long().cpu()
    counts = torch.bincount((first * num_classes + second).flatten(), minlength=num_classes**2)
    pairs = counts.reshape(num_classes, num_classes) / max(first.numel(), 1)
    if truth is None:
        return Disagreement(first, second, first != second, None, None, pairs)
    truth = truth.long().cpu()
    outcome = torch.where(first == second, 3, 4)  # wrong, until they turn out to be right
    outcome[second == truth] = 2
    outcome[first == truth] = 1
    outcome[(first == truth) & (second == truth)] = 0
    outcome[truth == ignore_index] = IGNORED
    valid = outcome[outcome != IGNORED]
    shares = torch.bincount(valid, minlength=len(OUTCOMES)) / max(len(valid), 1)
    return Disagreement(first, second, first != second, outcome.to(torch.uint8), shares, pairs)
