"""Ways to clip a gradient, each against its formula, with the scale of fp16 in it or not."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from segheads.training import OptimizationConfig, train_step
from segheads.training.clipping import clip_gradients

GRADIENTS = [torch.tensor([[3.0, 0.0], [0.0, 0.1]]), torch.tensor([4.0, 0.0])]


def clipped(mode, limit):
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.zeros_(layer.bias)
    for parameter, gradient in zip(layer.parameters(), GRADIENTS, strict=True):
        parameter.grad = gradient.clone()
    clip_gradients(Accelerator(cpu=True), layer.parameters(), limit, mode)
    return [parameter.grad for parameter in layer.parameters()]


def test_each_way_is_its_formula():
    norm = (9 + 0.01 + 16) ** 0.5
    expected = {
        "norm": [x / norm for x in GRADIENTS],
        "value": [x.clamp(-1, 1) for x in GRADIENTS],
        # rows of weights have the norm sqrt(2); a bias of zeros counts as 1e-3
        "agc": [torch.tensor([[2**0.5, 0.0], [0.0, 0.1]]), torch.tensor([1e-3, 0.0])],
    }
    for mode, gradients in expected.items():
        torch.testing.assert_close(clipped(mode, 1.0), gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_the_scale_of_fp16_is_divided_out_first(mode, monkeypatch):
    """SGD's step is what was clipped, whatever the scaler multiplied it with."""
    moved = []
    for scale in (None, 2.0**10):
        accelerator = Accelerator(cpu=True)
        model = Lossy()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = accelerator.prepare(sgd)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            accelerator.native_amp, accelerator._optimizers = (
                True,
                [AcceleratedOptimizer(sgd, scaler=accelerator.scaler)],
            )
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
            optimizer = accelerator._optimizers[0]
        before = model.weight.detach().clone()
        train_step(accelerator, model, optimizer, [(torch.ones(1), torch.ones(1))], max_grad_norm=0.25, clip_mode=mode)
        moved.append(before - model.weight.detach())
    assert moved[0].norm() < 1.5
    torch.testing.assert_close(*moved)


class Lossy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, images, labels):
        return (self.weight * torch.tensor([[3.0, 1.0], [0.5, 0.1]])).sum() * images.sum() * labels.sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_mode": "agk", "max_grad_norm": 1.0}, "^clip_mode must be one of norm, value, agc; got 'agk'$"),
        ({"clip_mode": "agc"}, "^clip_mode agc needs max_grad_norm.* got None$"),
        ({"max_grad_norm": -1.0}, "^max_grad_norm must be above 0, or None, .* got -1.0$"),
    ],
)
def test_wrong_clipping_is_refused(options, message):
    rates = {"learning_rate": 0.1, "min_learning_rate": 0.0, "power": 1.0, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=message):
        OptimizationConfig(optimizer="momentum", **rates, **options).create(nn.Linear(2, 2))
