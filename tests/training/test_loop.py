import pytest
import torch
from accelerate import Accelerator
from torch import nn

from segheads import from_reference
from segheads.training import RunFolder, create_optimizer, poly_learning_rate, set_learning_rate, train, train_step


def test_the_authors_training_run_step_by_step(golden):
    """SGD, poly schedule, loss over all pixels: losses and final weights of the published implementation."""
    vectors = golden("meanshifter_training__sgd_poly")
    config = vectors.config
    sizes = {"num_heads": config["num_heads"], "num_layers": config["meanshift_layers"]}
    model = from_reference(vectors.tensors("state."), "meanshifter", **sizes)
    accelerator = Accelerator(cpu=True)
    options = {"learning_rate": config["lr"], "weight_decay": config["weight_decay"], "momentum": config["momentum"]}
    optimizer = create_optimizer(model, "momentum", **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    losses, rates = [], []
    for iteration in range(config["iterations"]):
        rate = poly_learning_rate(
            iteration,
            learning_rate=config["lr"],
            max_iterations=config["max_iterations"],
            power=config["power"],
            min_learning_rate=config["min_lr"],
        )
        set_learning_rate(optimizer, rate)
        batch = (vectors[f"input.{kind}_{iteration % config['batches']}"] for kind in ("image", "label"))
        losses.append(train_step(accelerator, model, optimizer, [tuple(batch)]))
        rates.append(rate)
    torch.testing.assert_close(torch.stack(losses), vectors["output.loss"], rtol=2e-5, atol=0)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), vectors["output.lr"])
    final = vectors.tensors("output.final.")
    expected = from_reference(vectors.tensors("state.") | final, "meanshifter", **sizes).state_dict()
    untouched = from_reference(vectors.tensors("state."), "meanshifter", **sizes).state_dict()
    stored = [key for key in expected if not torch.equal(expected[key], untouched[key])]
    assert len(stored) == len(final)  # every stored tensor moved, and is compared
    for key in stored:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(model.state_dict()[key], expected[key], rtol=0, atol=5e-5 * scale)


class Slope(nn.Module):
    """Loss mean(w * x); a label of 1 makes it infinite, a label of 2 its gradient alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, images, labels):
        extra = {0: 0.0, 1: torch.inf, 2: (0 * self.w).sqrt().sum()}[labels.max().item()]
        return (self.w * images).mean() + extra


def run_slope(tmp_path, batches, iterations, **options):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(Slope(), torch.optim.SGD(Slope().parameters(), lr=1.0))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    run = RunFolder(tmp_path, {})
    run.start({})
    train(
        accelerator,
        model,
        optimizer,
        iter(batches),
        run,
        schedule=lambda iteration: 0.1 / (1 + iteration),
        start=0,
        iterations=iterations,
        batch_size=4,
        **{"log_every": 2, "checkpoint_every": 4, **options},
    )
    return run, model


def batch(value, label=0):
    return torch.full((4, 3), float(value)), torch.full((4,), label)


def test_log_evaluations_and_checkpoints(tmp_path):
    evaluations = []

    def evaluate():
        evaluations.append(1)
        return {"mIoU": 0.25}

    run, _ = run_slope(tmp_path, [batch(0)] * 10, 10, evaluate_every=5, evaluate=evaluate)
    records = run.records()
    assert [r["iteration"] for r in records if "loss" in r] == [2, 4, 5, 6, 8, 10]
    assert [(r["iteration"], r["mIoU"]) for r in records if "mIoU" in r] == [(5, 0.25)]  # the last is the recipe's
    assert [r["learning_rate"] for r in records if "loss" in r][:2] == [0.1 / 2, 0.1 / 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000008", "00000010"]
    assert len(evaluations) == 1


def test_accumulated_batches_are_one_update(tmp_path):
    images = torch.randn(8, 3)
    labels = torch.zeros(8)
    whole = [(images, labels)]
    halves = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    _, one = run_slope(tmp_path / "one", whole * 3, 3)
    _, two = run_slope(tmp_path / "two", halves * 3, 3, accumulation=2)
    torch.testing.assert_close(one.w, two.w)


def test_gradients_are_clipped(tmp_path):
    _, model = run_slope(tmp_path, [batch(300)], 1, max_grad_norm=1.0)
    torch.testing.assert_close((model.w - 1).norm(), torch.tensor(0.1))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    batches = [batch(0)] * 6 + [batch(0, label=1)] + [batch(0)] * 20
    with pytest.raises(FloatingPointError, match="loss was not finite at iteration 7; the run stopped"):
        run_slope(tmp_path, batches, 20, log_every=10)
    assert RunFolder(tmp_path, {}, resume=True).latest() == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    batches = [batch(0)] * 7 + [batch(0, label=2)]
    with pytest.raises(FloatingPointError, match="w is not finite after iteration 8; no checkpoint was written"):
        run_slope(tmp_path, batches, 8)
    assert RunFolder(tmp_path, {}, resume=True).latest() == 4
