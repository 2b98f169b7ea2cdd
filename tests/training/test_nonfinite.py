"""Losses and gradients that are not finite."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from runs import SMALL_RUN, build
from torch import nn

from segheads import SegmentationModel
from segheads.data import Scenes
from segheads.errors import DivergedError, OptionError
from segheads.training import ModelLearner, TrainingConfig, run_training
from segheads.training.nonfinite import FiniteSteps, first_layer_not_finite

FOUR = {**SMALL_RUN, "backbone": "test_resnet", "iterations": 4, "checkpoint_every": 2, "log_every": 4}


@pytest.fixture(autouse=True)
def _set_up(own_run, monkeypatch):
    monkeypatch.setattr(Scenes, "__len__", lambda self: 4)


def trained(folder, **options):
    run_training(TrainingConfig.from_flat(**{**FOUR, **options}, output=folder), build)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SegmentationModel.from_pretrained(folder / "model").state_dict(), records


def broken_in(monkeypatch, iterations):
    """The second layer's output is infinite in these iterations."""
    step = ModelLearner.step

    def disturbed(self, iteration, batches):
        model = self.accelerator.unwrap_model(self.model)
        layer = model.backbone.model.conv1[1]
        if iteration in iterations:
            handle = layer.register_forward_hook(lambda module, inputs, output: output * torch.inf)
            if self.finite.tolerated == 0:
                return step(self, iteration, batches)  # and ever after
            try:
                return step(self, iteration, batches)
            finally:
                handle.remove()
        return step(self, iteration, batches)

    monkeypatch.setattr(ModelLearner, "step", disturbed)


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_the_first_layer_is_named(tmp_path, monkeypatch, optimizer):
    broken_in(monkeypatch, {2})
    message = r"at iteration 3, first in backbone.model.conv1.1, whose images were .*\(iteration 2 in"
    with pytest.raises(DivergedError, match=message) as stop:
        trained(tmp_path, optimizer=optimizer)
    assert stop.value.iteration == 3


def test_steps_are_left_out_and_counted_through_a_resume(tmp_path, monkeypatch, caplog):
    broken_in(monkeypatch, {1, 2})
    options = {"skip_nonfinite": 2, "log_every": 1, "drop_path_rate": 0.2}
    weights, records = trained(tmp_path, **options)
    assert [record.get("skipped") for record in records if "loss" in record] == [None, 1, 2, 2]
    assert all(value.isfinite().all() for value in weights.values())
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    warned = [message for message in caplog.messages if "left out" in message]
    assert "iteration 2 is left out, its loss or gradient is not finite, first in backbone.model.conv1.1" in warned[0]
    assert warned[1].endswith("2 of 2 that are tolerated")
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    again, records = trained(tmp_path, **options, resume=True)
    assert [record.get("skipped") for record in records if "loss" in record] == [None, 1, 2, 2]
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_more_than_are_tolerated_end_the_run(tmp_path, monkeypatch):
    broken_in(monkeypatch, {1, 3})
    with pytest.raises(DivergedError, match="at iteration 4, whose images were"):  # its layer is whole again by then
        trained(tmp_path, skip_nonfinite=1)


def test_tolerance_changes_nothing_of_finite_steps(tmp_path):
    plain, _ = trained(tmp_path / "plain")
    tolerant, _ = trained(tmp_path / "tolerant", skip_nonfinite=3)
    assert all(torch.equal(plain[key], tolerant[key]) for key in plain)


def test_fp16_leaves_out_by_itself(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = object()
    with pytest.raises(OptionError, match="skip_nonfinite must be 0 with mixed_precision fp16.*; got 2"):
        FiniteSteps(accelerator, None, None, tolerated=2)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.ReLU())

    def forward(self, images, labels):
        return self.second(self.first(images)).mean() / labels.sum()


@pytest.mark.parametrize(("harm", "found"), [("first", "first"), ("second.0", "second.0"), (None, None)])
def test_the_layer_of_a_weight(harm, found):
    model = Parts()
    if harm:
        nn.init.constant_(model.get_submodule(harm).weight, torch.nan)
    assert first_layer_not_finite(model, torch.ones(2, 1), torch.ones(2)) == found


def test_images_and_the_loss_itself():
    model = Parts()
    assert first_layer_not_finite(model, torch.full((2, 1), torch.inf), torch.ones(2)) == "the images"
    nn.init.constant_(model.second[0].bias, 100.0)
    assert first_layer_not_finite(model, torch.ones(2, 1), torch.zeros(2)) == "the loss"


def test_a_gradient_too_many_ends_the_run_though_its_loss_is_finite():
    model = nn.Linear(2, 1)
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    steps, loss = FiniteSteps(accelerator, model, optimizer, tolerated=1), torch.tensor(1.0)
    counted = []
    for iteration, gradient in enumerate([0.0, torch.inf, torch.inf]):
        steps.begin(iteration)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        assert steps.allows(loss) == (gradient == 0)
        counted.append(steps.counted(loss).item())
    assert counted[:2] == [1.0, 1.0]
    assert counted[2] != counted[2]  # NaN, with which the log ends the run
    assert steps.record() == {"skipped": 1}
