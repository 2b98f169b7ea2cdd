"""Learning rate and optimizer of the published training runs."""

from typing import Any, Literal

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

Warmup = Literal["linear", "segmenter"]


def poly_learning_rate(
    iteration: int,
    *,
    learning_rate: float,
    max_iterations: int,
    power: float = 0.9,
    min_learning_rate: float = 0.0,
    warmup_iterations: int = 0,
    warmup_ratio: float = 1e-6,
    warmup: Warmup = "linear",
) -> float:
    """The rate of the update that follows `iteration` updates: `(lr - min) (1 - t / T)^power + min`.

    Segmenter and MMSegmentation share the formula and differ in the warm-up. `"linear"` (MMSegmentation) scales the
    rate up from `warmup_ratio`. `"segmenter"` scales the decaying part up to its value at the end of the warm-up and,
    as published, makes the very first update at the full rate. A function of the iteration alone, so that a resumed
    run has nothing to restore.

    Args:
        iteration: Number t of updates made so far; from `max_iterations` on the rate stays.
        learning_rate: The rate at the start of the decay.
        max_iterations: Length T of the run.
        power: Exponent of the decay.
        min_learning_rate: The rate at the end of the decay.
        warmup_iterations: Length of the warm-up; 0 means none.
        warmup_ratio: Where a linear warm-up starts, as a fraction of the rate.
        warmup: The kind of warm-up.

    Raises:
        ValueError: If `iteration` is negative or `max_iterations` below 1.

    Examples:
        >>> poly_learning_rate(80_000, learning_rate=1e-3, max_iterations=160_000, min_learning_rate=1e-4)
        0.0005822...
    """
    if iteration < 0 or max_iterations < 1:
        raise ValueError(f"needs an iteration of 0 or more of at least 1; got {iteration} of {max_iterations}")
    span, warming = learning_rate - min_learning_rate, iteration < warmup_iterations
    if warmup == "segmenter" and warming:
        if iteration == 0:
            return learning_rate
        full = (1 - warmup_iterations / max_iterations) ** power
        return span * full * iteration / warmup_iterations + min_learning_rate
    decay = (1 - min(iteration, max_iterations) / max_iterations) ** power
    rate = span * decay + min_learning_rate
    return rate * (1 - (1 - iteration / warmup_iterations) * (1 - warmup_ratio)) if warming else rate


def create_optimizer(
    model: nn.Module, name: str, *, learning_rate: float, weight_decay: float, momentum: float
) -> Optimizer:
    """An optimizer by timm's name; norms and biases are not decayed.

    Args:
        model: Its parameters that require a gradient are optimised.
        name: As in `timm.optim.list_optimizers()`; note that timm's `"sgd"` is Nesterov (as Segmenter was trained) and
            `"momentum"` is not (as the MeanShifter was).
        learning_rate: The rate before any schedule.
        weight_decay: Decay of weights other than norms and biases.
        momentum: Momentum, for those that have one.

    Raises:
        ValueError: If timm knows no such optimizer.
    """
    options: dict[str, Any] = {"momentum": momentum} if name in ("sgd", "momentum") else {}
    return create_optimizer_v2(model, opt=name, lr=learning_rate, weight_decay=weight_decay, **options)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the rate of every group, times its `lr_scale` where timm gave it one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
