"""Label maps as metrics take them: checked, flattened into classes, counted."""

import torch
from torch import Tensor

NO_LABEL = torch.iinfo(torch.int64).min


def check_maps(preds: Tensor, labels: Tensor) -> None:
    """Refuse predicted and true label maps that cannot be compared.

    Raises:
        ValueError: If one is not of an integer type, or they are not (B, H, W) or (H, W) of one shape.
    """
    for name, x in (("preds", preds), ("labels", labels)):
        if x.is_floating_point() or x.is_complex():
            raise ValueError(
                f"{name} must be an integer label map, got {x.dtype} of shape {tuple(x.shape)}; "
                "take logits.argmax(dim=1) first"
            )
    if preds.shape != labels.shape or preds.ndim not in (2, 3):
        raise ValueError(
            f"preds and labels must have one shape, (B, H, W) or (H, W), got {tuple(preds.shape)} and "
            f"{tuple(labels.shape)}; predict at the labels' size"
        )


def check_labels(wrong_label: int, num_classes: int, ignore_index: int) -> None:
    """Refuse a label that is neither a class nor ignored; `NO_LABEL` stands for none found.

    Raises:
        ValueError: If there is a wrong label.
    """
    if wrong_label != NO_LABEL:
        raise ValueError(
            f"labels must be 0..{num_classes - 1} or the ignore_index {ignore_index}, got {wrong_label}; "
            f"map it to a class or to {ignore_index}"
        )


def class_or_last(values: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Values that name no class become K."""
    names_class = (values >= 0) & (values < num_classes) & (values != ignore_index)
    return torch.where(names_class, values, num_classes)


def class_maps(preds: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of a batch, checked, for metrics that look at a pixel's neighbours.

    Where the label is ignored both maps hold K, as predictions that name no class do.

    Shape:
        (B, H, W) or (H, W) -> two maps (B, H, W) of int64 in 0..K.

    Raises:
        ValueError: See `check_maps` and `check_labels`; looking for a wrong label waits for the device.
    """
    preds, classes, wrong = class_maps_unchecked(preds, labels, num_classes, ignore_index)
    check_labels(int(wrong), num_classes, ignore_index)
    return preds, classes


def class_maps_unchecked(
    preds: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the highest wrong label for `check_labels` to look at later, so that nothing waits for the device.

    Shape:
        (B, H, W) or (H, W) -> two maps (B, H, W) of int64 in 0..K, and a scalar of int64.

    Raises:
        ValueError: See `check_maps`.
    """
    check_maps(preds, labels)
    if labels.ndim == 2:
        preds, labels = preds[None], labels[None]
    labels = labels.long()
    classes = class_or_last(labels, num_classes, ignore_index)
    wrong = torch.where((classes == num_classes) & (labels != ignore_index), labels, NO_LABEL)
    highest = wrong.amax() if wrong.numel() else wrong.new_full((), NO_LABEL)
    preds = class_or_last(preds.long(), num_classes, ignore_index)
    return torch.where(classes == num_classes, num_classes, preds), classes, highest


def count_classes(classes: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Pixels of each class in a map of 0..K, or the sum of their integer weights; what is K is dropped."""
    classes = classes.flatten()
    weights = torch.ones_like(classes) if weights is None else weights.flatten()
    return classes.new_zeros(num_classes + 1).scatter_add_(0, classes, weights)[:-1]
