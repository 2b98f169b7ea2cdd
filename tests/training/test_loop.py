from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segheads import create_model, from_reference
from segheads.data import PhotometricNormalize
from segheads.errors import DivergedError
from segheads.heads import HEADS
from segheads.training import (
    LoopConfig,
    ModelLearner,
    Run,
    RunFolder,
    create_optimizer,
    poly_learning_rate,
    set_learning_rate,
    train,
    train_step,
    training_batches,
)


@pytest.fixture(autouse=True)
def _a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
    """Loss mean(w * x); a label of 1 makes it infinite, a label of 2 its gradient alone, 3 both."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, images, labels):
        extra = {0: 0.0, 1: torch.inf, 2: (0 * self.w).sqrt().sum(), 3: torch.inf * self.w.sum()}[labels.max().item()]
        return (self.w * images).mean() + extra


def run_slope(tmp_path, batches, iterations, evaluate=None, max_grad_norm=None, scaler=None, **options):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    model, optimizer = accelerator.prepare(Slope(), torch.optim.SGD(Slope().parameters(), lr=1.0))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    folder = RunFolder(tmp_path, {})
    folder.start({})
    run = Run(config=None, accelerator=accelerator, folder=folder, training_set=None, validation_set=None)
    learner = ModelLearner(
        accelerator,
        model,
        optimizer,
        schedule=lambda iteration: 0.1 / (1 + iteration),
        max_grad_norm=max_grad_norm,
    )
    loop = LoopConfig(
        iterations=iterations,
        batch_size=4,
        **{"log_every": 2, "checkpoint_every": 4, "evaluate_every": 0, **options},
    )
    train(run, learner, iter(batches), loop, evaluate=evaluate)
    return folder, model


def test_gradient_norm_before_clipping_is_in_the_record(tmp_path):
    folder, _ = run_slope(tmp_path / "a", [batch(3.0), batch(6.0)] * 2, 4, max_grad_norm=0.1)
    expected = (3 + 6) / 2 / 3**0.5  # of mean(w * x) over 3 weights
    assert [record["gradient_norm"] for record in folder.records()] == pytest.approx([expected] * 2)
    folder, _ = run_slope(tmp_path / "b", [batch(3.0)] * 2, 2)
    assert "gradient_norm" not in folder.records()[0]


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


def test_an_evaluation_tells_and_keeps_which_classes_it_leaves_out(tmp_path, caplog):
    caplog.set_level("INFO", "segheads")
    found = {"mIoU": 0.25, "absent_classes": ["sky", "sea"]}
    run, _ = run_slope(tmp_path, [batch(0)] * 2, 2, evaluate_every=1, evaluate=lambda: found)
    assert "iteration 1: mIoU 0.2500; mIoU without sky, sea" in caplog.text
    assert [r["absent_classes"] for r in run.records() if "mIoU" in r] == [["sky", "sea"]]


def test_accumulated_batches_are_one_update(tmp_path):
    images = torch.randn(8, 3)
    labels = torch.zeros(8)
    whole = [(images, labels)]
    halves = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    _, one = run_slope(tmp_path / "one", whole * 3, 3)
    _, two = run_slope(tmp_path / "two", halves * 3, 3, gradient_accumulation=2)
    torch.testing.assert_close(one.w, two.w)


def test_gradients_are_clipped(tmp_path):
    _, model = run_slope(tmp_path, [batch(300)], 1, max_grad_norm=1.0)
    torch.testing.assert_close((model.w - 1).norm(), torch.tensor(0.1))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    batches = [batch(0)] * 6 + [batch(0, label=1)] + [batch(0)] * 20
    with pytest.raises(DivergedError, match="loss was not finite at iteration 7; the run stopped"):
        run_slope(tmp_path, batches, 20, log_every=10)
    assert RunFolder(tmp_path, {}, resume=True).latest() == 4


def test_a_scaler_skips_steps_that_overflow(tmp_path):
    """As in fp16; but not every step for ever."""
    overflow, options = batch(1, label=3), {"log_every": 1, "checkpoint_every": 0}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    folder, model = run_slope(tmp_path / "a", [batch(3), overflow, overflow], 3, scaler=scaler, **options)
    torch.testing.assert_close(model.w.detach(), torch.full((3,), 0.9))  # as after the first step
    assert [record["loss"] for record in folder.records()] == [3.0] * 3
    assert scaler.get_scale() == 1.0
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(DivergedError, match="loss was not finite at iteration 21; the run stopped"):
        run_slope(tmp_path / "b", [overflow] * 30, 30, scaler=scaler, **options)


@pytest.mark.parametrize("scales", [True, False])
def test_an_overflowed_forward_pass_leaves_no_statistics(scales):
    """Of fp16, whose scaler skips the step alone; without a scaler such statistics end the run."""
    accelerator, layers = Accelerator(cpu=True), [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)]
    model = nn.Sequential(*layers)
    model.forward = lambda images, labels: nn.Sequential(*layers)(images).square().mean()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scales else None
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    learner = ModelLearner(accelerator, prepared, optimizer, schedule=lambda _: 0.1)
    images, labels, norm = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4), layers[1]
    learner.step(0, [(images, labels)])
    mean, weights = norm.running_mean.clone(), layers[2].weight.clone()
    learner.step(1, [(images, labels), (images * torch.inf, labels)])
    if not scales:
        assert not norm.running_var.isfinite().all()
        with pytest.raises(DivergedError, match="is not finite after iteration 2"):
            learner.record(2, [0.0], [None])
        return
    assert torch.equal(layers[2].weight, weights)
    assert torch.equal(norm.running_mean, mean)
    assert norm.running_var.isfinite().all()
    learner.step(2, [(images, labels)])
    assert not torch.equal(norm.running_mean, mean)
    learner.record(3, [0.0], [None])


def test_statistics_that_are_not_finite_are_not_saved():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].running_var[2] = torch.inf  # x / inf is 0: no loss tells
    learner = ModelLearner(Accelerator(cpu=True), model, None, schedule=lambda _: 0.1)
    with pytest.raises(DivergedError, match=r"^1\.running_var is not finite after iteration 8; no checkpoint"):
        learner.record(8, [0.5], [None])


def test_why_is_asked_of_the_first_such_iteration():
    learner = ModelLearner(
        Accelerator(cpu=True), nn.Linear(1, 1), None, schedule=None, explain=lambda n: f"whose images were of {n}"
    )
    with pytest.raises(DivergedError, match="not finite at iteration 7, whose images were of 7; the run stopped"):
        learner.record(10, [0.0], [7])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    batches = [batch(0)] * 7 + [batch(0, label=2)]
    with pytest.raises(DivergedError, match="w is not finite after iteration 8; no checkpoint was written"):
        run_slope(tmp_path, batches, 8)
    assert RunFolder(tmp_path, {}, resume=True).latest() == 4


HALF = (0.5, 0.5, 0.5)


def handed_over(number, device="cpu", mixes=False):
    """Batches as `collate_samples` makes them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        yield {
            "image": torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator)
            .permute(0, 3, 1, 2)
            .to(device),
            "labels": torch.randint(5, (2, 64, 64), dtype=torch.uint8, generator=generator).to(device),
            "distortion": torch.tensor([[10.0, 1.2, 1.0, 0.7, 12.0]] * 2, device=device),
            "valid": torch.tensor([[64, 64], [40, 64]], device=device),
            **({"given": torch.ones(2, 64, 64, dtype=torch.bool, device=device)} if mixes else {}),
        }


class NothingCrosses(TorchDispatchMode):
    """Fails where an operation reads the host's memory for the device's: such a copy waits for all that is queued."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in tensors}) <= 1, f"{func} has tensors on the host and on the device"
        return result


@pytest.mark.parametrize("head", sorted(HEADS))
def test_nothing_waits_for_the_device(tmp_path, monkeypatch, head):
    """Between records, from the hand-over to the update; on a device without values all that asks for one fails."""
    meta, make_tensor = torch.device("meta"), torch.tensor

    def tensor(*args, **kwargs):
        made = make_tensor(*args, **kwargs)
        assert made.device != meta, "torch.tensor copies from the host to the device"
        return made

    monkeypatch.setattr(Accelerator, "device", property(lambda self: meta))
    accelerator = Accelerator(cpu=True)
    auxiliary = {"auxiliary_weight": 0.4} if head == "senformer" else {}
    model = create_model("test_convnext", head, 5, pretrained=False, **auxiliary).to(meta)
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "momentum": 0.9}
    model, optimizer = accelerator.prepare(model, create_optimizer(model, "adamw", **options))
    prepare = PhotometricNormalize(HALF, HALF).to(meta)
    batches = training_batches(list(handed_over(4, meta, mixes=True)), prepare)
    folder = RunFolder(tmp_path, {})
    run = Run(config=None, accelerator=accelerator, folder=folder, training_set=None, validation_set=None)
    learner = ModelLearner(accelerator, model, optimizer, schedule=lambda iteration: 1e-3, max_grad_norm=1.0)
    monkeypatch.setattr(torch, "tensor", tensor)
    with NothingCrosses(), pytest.raises(StopIteration):  # the batches ended before the first record
        train(run, learner, batches, LoopConfig(iterations=10, batch_size=2, gradient_accumulation=2))


@pytest.mark.parametrize("head", sorted(HEADS))
def test_the_compiled_step_is_one_graph(head):
    """Forward pass and loss under autocast, as `run_training` prepares them."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    auxiliary = {"auxiliary_weight": 0.4} if head == "senformer" else {}
    model = create_model("test_convnext", head, 5, pretrained=False, **auxiliary)
    model.eval()  # nothing is dropped
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    with accelerator.autocast():
        expected = model(images, labels)
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=True)
    loss = accelerator.prepare(model)(images, labels)
    torch.testing.assert_close(loss, expected)
    accelerator.backward(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_in_either_memory_format(channels_last):
    prepare = PhotometricNormalize(HALF, HALF)
    batches = list(training_batches(handed_over(3), prepare, channels_last=channels_last))
    for (images, labels), raw in zip(batches, handed_over(3), strict=True):
        expected = prepare(raw["image"], raw["distortion"], raw["valid"])
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(labels, raw["labels"].long())


class Streams:
    """Stands in for torch.cuda: what is done on which stream, in the order in which the host asks for it."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], "step"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, self.current))
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.do(f"keep for {stream.name}"))

    def do(self, what):
        self.log.append(f"{self.current}: {what}")

    @contextmanager
    def stream(self, stream):
        self.current, before = stream.name, self.current
        yield
        self.current = before


class Stream:
    def __init__(self, streams, name):
        self.streams, self.name = streams, name

    def wait_stream(self, other):
        self.streams.log.append(f"{self.name}: wait for {other.name}")


def test_a_gpu_makes_batches_beside_the_step(monkeypatch):
    streams = Streams(monkeypatch)

    def loader():
        for number in range(2):
            streams.do(f"copy {number}")
            yield {"image": torch.tensor(number), "distortion": None, "valid": None, "labels": torch.tensor(number)}

    def prepare(image, distortion, valid):
        streams.do(f"prepare {image}")
        return image[None, None, None, None]

    prepare.scale = type("Scale", (), {"device": torch.device("cuda")})
    for images, _ in training_batches(loader(), prepare):
        streams.do(f"train on {images.item()}")
    expected = ["side: wait for step"]
    for number in range(2):
        expected += [f"side: copy {number}", f"side: prepare {number}", "step: wait for side"]
        expected += ["step: keep for step"] * 2 + [f"step: train on {number}"]  # images and labels
    assert streams.log == expected
    assert streams.current == "step"


def test_a_learner_leaves_frozen_parts_frozen():
    """A model in evaluation mode is put into training mode; in one that trains, frozen batch norms stay as they are."""
    model = create_model("test_resnet", "linear", 3, pretrained=False)
    model.backbone.eval()
    norms = {name: x.clone() for name, x in model.backbone.named_buffers() if x.is_floating_point()}
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    learner = ModelLearner(accelerator, prepared, optimizer, schedule=lambda _: 0.1)
    learner.step(0, [(torch.randn(2, 3, 32, 32), torch.randint(3, (2, 32, 32)))])
    assert norms
    assert all(torch.equal(dict(model.backbone.named_buffers())[name], x) for name, x in norms.items())
    assert model.training
    assert model.head.training
    ModelLearner(accelerator, prepared.eval(), optimizer, schedule=lambda _: 0.1)
    assert model.backbone.training
