"""Every schedule against its formula or the library that it is named after, first and last update included."""

import math
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from segheads.training import OptimizationConfig

RATES: dict[str, Any] = {"learning_rate": 0.1, "min_learning_rate": 1e-3, "power": 0.9}


def rates(schedule: Any, iterations: int, **options: Any) -> list[float]:
    config = OptimizationConfig(optimizer="momentum", weight_decay=0.0, schedule=schedule, **RATES, **options)
    return [config.rate_at(iteration, iterations) for iteration in range(iterations)]


def optimizer(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def test_poly_is_the_formula() -> None:
    assert rates("poly", 20) == pytest.approx([0.099 * (1 - t / 20) ** 0.9 + 1e-3 for t in range(20)])


def test_cosine_is_timms() -> None:
    timms = CosineLRScheduler(optimizer(0.1), t_initial=20, lr_min=1e-3)
    assert rates("cosine", 20) == pytest.approx([timms._get_lr(t)[0] for t in range(20)])
    assert rates("cosine", 20)[-1] == pytest.approx(0.099 * (1 + math.cos(math.pi * 19 / 20)) / 2 + 1e-3)


@pytest.mark.parametrize("iterations", [10, 25])
def test_one_cycle_is_torchs(iterations: int) -> None:
    sgd, expected = optimizer(0.1), []
    torchs = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, iterations, final_div_factor=4, cycle_momentum=False)
    for _ in range(iterations):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if len(expected) < iterations:
            torchs.step()
    assert rates("one_cycle", iterations) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_one_cycle_of_few_updates_begins_at_the_full_rate(iterations: int) -> None:
    assert rates("one_cycle", iterations)[0] == pytest.approx(0.1)


def test_constant_is_constant_after_its_warm_up() -> None:
    assert rates("constant", 5) == [0.1] * 5
    assert rates("constant", 5, warmup_iterations=2) == pytest.approx(
        [1e-7, 0.1 * (1 - 0.5 * (1 - 1e-6)), 0.1, 0.1, 0.1]
    )


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule must be one of poly, cosine, one_cycle, constant; got 'cosin'"):
        rates("cosin", 5)
    with pytest.raises(ValueError, match="warmup_iterations must be 0 with the schedule one_cycle"):
        rates("one_cycle", 5, warmup_iterations=2)
