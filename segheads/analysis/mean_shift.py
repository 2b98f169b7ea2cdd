"""What mean shift does to an image's tokens: their ways, whom they follow, and the labels that come of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from segheads.analysis.attention import cell_size, one_image
from segheads.analysis.embeddings import project
from segheads.mean_shift import MeanShift
from segheads.model import SegmentationModel
from segheads.modules import evaluating


class Trajectory(NamedTuple):
    """The ways of all tokens of one image through one mean shift.

    Attributes:
        name: The mean shift inside the model, such as `"head.shift"`.
        points: Tokens after 0, 1, ..., L shifts in one plane for all steps, `(L + 1, h, w, 2)`, in units of features.
        explained: Share of the variance of all tokens at all steps along each axis of the plane, `(2,)`, 0 to 1.
        spread: Root mean square distance of the tokens from their mean after each shift, `(L + 1,)`, in units of
            features and in all their dimensions; it goes to 0 as tokens collapse into one.
        cell: Height and width of a token in pixels of the image.
    """

    name: str
    points: Tensor
    explained: Tensor
    spread: Tensor
    cell: tuple[float, float]


class Affinity(NamedTuple):
    """How much each token weighs in the first shift of one token.

    Attributes:
        name: The mean shift inside the model, such as `"head.shift"`.
        weights: One row of the affinity S, `(h, w)`; sums to 1.
        cell: Height and width of a token in pixels of the image.
    """

    name: str
    weights: Tensor
    cell: tuple[float, float]


class LabelsByShift(NamedTuple):
    """Label maps of one image and model with other numbers of shifts.

    Attributes:
        num_layers: How often tokens were shifted (L'_ms) for each map.
        labels: `(len(num_layers), H, W)`, int64.
        trained: The model's own number, with which it was trained unless it was changed since.
    """

    num_layers: tuple[int, ...]
    labels: Tensor
    trained: int


def shift_trajectories(model: SegmentationModel, image: Tensor, num_layers: int | None = None) -> list[Trajectory]:
    """The ways of all tokens under mean shift, in the plane that shows most of them.

    The plane is that of the first two principal components of all tokens at all steps together, so that steps can be
    compared: a projection of each step's own would hide that tokens draw together.

    Args:
        model: A model with mean shift in its head, in any mode.
        image: A normalised image.
        num_layers: How often to shift; None means as often as the model does.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`, any H and W.

    Returns:
        One for each mean shift in the head: one for a `MeanShiftHead`, one for each level of a `SenFormerHead`.

    Raises:
        ValueError: If the head has no mean shift, or the image has another shape.

    Examples:
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "mean_shift", 5, pretrained=False)
        >>> (way,) = shift_trajectories(model, torch.randn(3, 40, 64), num_layers=3)
        >>> way.name, way.points.shape, bool(way.spread[3] < way.spread[0])
        ('head.shift', torch.Size([4, 3, 4, 2]), True)
    """
    ways = []
    for name, shift, x, cell in _inputs(model, image, num_layers):
        steps = torch.stack(shift.trajectory(x))[:, 0].float().cpu()  # (L + 1, C, h, w)
        points, explained, _ = project(steps.movedim(1, -1))
        spread = (steps - steps.mean((2, 3), keepdim=True)).square().sum(1).mean((1, 2)).sqrt()
        ways.append(Trajectory(name, points, explained, spread, cell))
    return ways


def shift_affinity(model: SegmentationModel, image: Tensor, pixel: tuple[int, int]) -> list[Affinity]:
    """How much each token weighs in the first shift of the token at a pixel: one row of S over the image.

    Args:
        model: A model with mean shift in its head, in any mode.
        image: A normalised image.
        pixel: Row and column (y, x) of the pixel whose token is shifted.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`, any H and W.

    Returns:
        One for each mean shift in the head.

    Raises:
        ValueError: If the head has no mean shift, the pixel is outside the image, or the image has another shape.

    Examples:
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "mean_shift", 5, pretrained=False)
        >>> (row,) = shift_affinity(model, torch.randn(3, 40, 64), (20, 30))
        >>> row.weights.shape, round(row.weights.sum().item(), 4)
        (torch.Size([3, 4]), 1.0)
    """
    _, (y, x) = one_image(image, pixel)
    rows = []
    for name, shift, features, cell in _inputs(model, image, None):
        h, w = features.shape[2:]
        index = min(int(y / cell[0]), h - 1) * w + min(int(x / cell[1]), w - 1)
        with torch.no_grad():
            weights = shift.affinity(features, index)[0].float().cpu()
        rows.append(Affinity(name, weights.reshape(h, w), cell))
    return rows


def labels_by_shift(
    model: SegmentationModel, image: Tensor, num_layers: Sequence[int] = (0, 1, 2, 3, 4)
) -> LabelsByShift:
    """Label maps of one image with other numbers of shifts than the model has (L'_ms; thesis, Table 2 and Fig. 4).

    Args:
        model: A model with mean shift in its head, in any mode; its own number of shifts is restored.
        image: A normalised image.
        num_layers: How often to shift, for each map.

    Shape:
        image `(3, H, W)` or `(1, 3, H, W)`, any H and W.

    Raises:
        ValueError: If the head has no mean shift, a number is negative or none is given, or the image has another
            shape.

    Examples:
        >>> from segheads import create_model
        >>> model = create_model("test_vit", "mean_shift", 5, pretrained=False)
        >>> maps = labels_by_shift(model, torch.randn(3, 40, 64), num_layers=(0, 1, 8))
        >>> maps.labels.shape, maps.trained
        (torch.Size([3, 40, 64]), 1)
    """
    images, _ = one_image(image, (0, 0))
    if not num_layers:
        raise ValueError("num_layers must name one number of shifts or more; got none")
    trained = next(iter(_shifts(model).values())).num_layers
    labels = []
    with evaluating(model):
        for count in num_layers:
            with _shifting(model, count):
                labels.append(model.predict(images)[0].cpu())
    return LabelsByShift(tuple(num_layers), torch.stack(labels), trained)


def _inputs(
    model: SegmentationModel, image: Tensor, num_layers: int | None
) -> Iterator[tuple[str, MeanShift, Tensor, tuple[float, float]]]:
    """Each mean shift with its input for the image, and a token's size; set to `num_layers` while it is looked at."""
    images, _ = one_image(image, (0, 0))
    shifts, inputs = _shifts(model), dict[str, Tensor]()
    count = max(shift.num_layers for shift in shifts.values()) if num_layers is None else num_layers
    hooks = [
        shift.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, shift in shifts.items()
    ]
    with evaluating(model), torch.compiler.set_stance("force_eager"), _shifting(model, count or 1):
        try:
            model.logits(images)
        finally:
            for hook in hooks:
                hook.remove()
    with evaluating(model), _shifting(model, count):
        for name, x in inputs.items():
            size = (x.shape[2], x.shape[3])
            yield name, shifts[name], x, cell_size(model, size, (images.shape[-2], images.shape[-1]))


def _shifts(model: SegmentationModel) -> dict[str, MeanShift]:
    found = {name: part for name, part in model.head.named_modules(prefix="head") if isinstance(part, MeanShift)}
    if not found:
        raise ValueError(
            "shifts can be looked at in a head with mean shift, such as mean_shift, or senformer with "
            f"mean_shift_layers=1; got {type(model.head).__name__} without one"
        )
    return found


@contextmanager
def _shifting(model: SegmentationModel, num_layers: int) -> Iterator[None]:
    """All mean shifts of the head with another number of layers."""
    before = [(shift, shift.num_layers) for shift in _shifts(model).values()]
    try:
        for shift, _ in before:
            shift.num_layers = num_layers
        yield
    finally:
        for shift, own in before:
            shift.num_layers = own
