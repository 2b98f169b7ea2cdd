"""Shapes of the learning rate over a run, by name: functions of the iteration alone; resume restores nothing."""

import math
from typing import Literal, get_args

Schedule = Literal["poly", "cosine", "one_cycle", "constant"]

RISING, RISES_FROM = 0.3, 1 / 25  # of one_cycle, as `torch.optim.lr_scheduler.OneCycleLR`


def decayed(
    schedule: str, iteration: int, iterations: int, *, learning_rate: float, min_learning_rate: float, power: float
) -> float:
    """The rate of the update that follows `iteration` updates of a run of `iterations`, before any warm-up.

    Args:
        schedule: `"poly"`: `(lr - min) (1 - t / T)^power + min`. `"cosine"`, timm's `CosineLRScheduler`:
            `(lr - min) (1 + cos(pi t / T)) / 2 + min`. `"one_cycle"`, torch's `OneCycleLR`: along cosines from
            `lr / 25` up to `lr` at `0.3 T - 1` and down to `min` at the last update; runs of 3 updates or fewer begin
            at `lr`. `"constant"`: `lr`.
        iteration: Number t of updates made so far; from `iterations` on the rate stays.
        iterations: Length T of the run.
        learning_rate: The highest rate.
        min_learning_rate: The rate at the end; not for `"constant"`.
        power: Exponent, for `"poly"` alone.

    Raises:
        ValueError: If there is no such schedule, `iteration` is negative or `iterations` below 1.

    Examples:
        >>> decayed("cosine", 50, 100, learning_rate=0.1, min_learning_rate=0.0, power=0.9)
        0.05
    """
    if iteration < 0 or iterations < 1:
        raise ValueError(f"needs an iteration of 0 or more of at least 1; got {iteration} of {iterations}")
    span, part = learning_rate - min_learning_rate, min(iteration, iterations) / iterations
    match schedule:
        case "poly":
            return span * (1 - part) ** power + min_learning_rate
        case "cosine":
            return span * (1 + math.cos(math.pi * part)) / 2 + min_learning_rate
        case "one_cycle":
            peak, last = max(RISING * iterations - 1, 0), iterations - 1
            if iteration < peak:
                return _along_cosine(RISES_FROM * learning_rate, learning_rate, iteration / peak)
            gone = (min(iteration, last) - peak) / (last - peak) if last > peak else 0
            return _along_cosine(learning_rate, min_learning_rate, gone)
        case "constant":
            return learning_rate
    raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}; got {schedule!r}")


def _along_cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2
