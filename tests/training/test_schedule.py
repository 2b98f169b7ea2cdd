import pytest
import torch
from torch import nn

from segheads.training import create_optimizer, poly_learning_rate, set_learning_rate


@pytest.mark.parametrize("kind", ["mmseg", "segm", "senformer"])
def test_published_schedules(golden, kind):
    vectors = golden(f"schedule__{kind}")
    for run, config in vectors.config.items():
        rates = [
            poly_learning_rate(
                iteration,
                learning_rate=config["lr"],
                max_iterations=config.get("max_iters") or config["iter_max"],
                power=config["power"],
                min_learning_rate=config["min_lr"],
                warmup_iterations=config.get("warmup_iters") or config.get("iter_warmup") or 0,
                warmup_ratio=config.get("warmup_ratio", 0.0),
                warmup="segmenter" if kind == "segm" else "linear",
            )
            for iteration in vectors[f"input.{run}.iteration"].tolist()
        ]
        expected = vectors[f"output.{run}.lr"]
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-12, atol=1e-18)


def test_bad_iterations_are_named():
    with pytest.raises(ValueError, match="got -1 of 10"):
        poly_learning_rate(-1, learning_rate=1.0, max_iterations=10)


def test_optimizers_by_timms_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "momentum": 0.9}
    momentum, nesterov = (create_optimizer(model, name, **options) for name in ("momentum", "sgd"))
    assert [group["nesterov"] for group in momentum.param_groups] == [False, False]
    assert [group["nesterov"] for group in nesterov.param_groups] == [True, True]
    decayed = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in momentum.param_groups}
    assert decayed == {0.0: 4 + 4 + 4, 0.5: 12}
    adamw = create_optimizer(model, "adamw", **options)
    adamw.param_groups[0]["lr_scale"] = 0.1
    set_learning_rate(adamw, 0.5)
    assert [group["lr"] for group in adamw.param_groups] == [0.05, 0.5]
