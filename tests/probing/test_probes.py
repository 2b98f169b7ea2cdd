"""Many heads on one frozen backbone: the same bits as each of them alone."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed
from torch import nn

from segheads import SegmentationModel, create_model, list_heads
from segheads.classes import Classes
from segheads.data import LabelMap, Scenes
from segheads.data.samples import EvaluationSamples
from segheads.evaluation import evaluate, scores
from segheads.inference.protocol import InferenceProtocol
from segheads.plan import HeadChoice, parse_head
from segheads.probing import (
    ProbeLearner,
    build_probes,
    evaluate_probes,
    join_head,
    plot_probes,
    probe_markdown,
    probe_rows,
    probe_step,
    save_probes,
    write_probe_report,
)
from segheads.probing.learner import step_seed
from segheads.training import (
    LoopConfig,
    Run,
    RunFolder,
    create_optimizer,
    set_learning_rate,
    train,
    train_step,
)

K, SIZE = 5, 64


@pytest.fixture(autouse=True)
def _one_thread_and_a_process_of_its_own():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def create(backbone, choice):
    options = {**choice.create_kwargs(), "backbone_kwargs": {"img_size": SIZE}}
    return create_model(backbone, choice.head, K, pretrained=False, **options)


def optimizer_of(model, rate):
    return create_optimizer(model, "adamw", learning_rate=rate, weight_decay=0.01, momentum=0.9)


def probes_of(backbone, heads, rates=(1e-2,), **options):
    shared, probes = build_probes(partial(create, backbone), [parse_head(h) for h in heads], rates, seed=3, **options)
    for probe in probes:
        probe.prepared, probe.optimizer = probe.model, optimizer_of(probe.model, probe.learning_rate)
        probe.model.train()
    return shared, probes


def batches_of(count, size=SIZE):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 2, 3, size, size, generator=generator)
    labels = torch.randint(0, K, (count, 2, size, size), generator=generator)
    labels[:, :, :3] = 255
    return list(zip(images, labels, strict=True))


def alone(backbone, head, rate, batches, accumulation=1):
    """A plain run of one whole model whose backbone is frozen, and nothing of the probe's code but the step's seed."""
    set_seed(3)
    model = create(backbone, parse_head(head))
    model.backbone.requires_grad_(False)
    if "resnet" in backbone:
        model.to(memory_format=torch.channels_last)
    optimizer = optimizer_of(model, rate)
    losses = []
    for iteration in range(len(batches) // accumulation):
        step = batches[iteration * accumulation : (iteration + 1) * accumulation]
        model.train()
        model.backbone.eval()
        set_learning_rate(optimizer, rate / (iteration + 1))
        torch.manual_seed(step_seed(7, 0, iteration))
        losses.append(train_step(Accelerator(cpu=True), model, optimizer, step, max_grad_norm=0.1))
    return model.eval(), losses


def together(backbone, heads, rates, batches, accumulation=1, **options):
    shared, probes = probes_of(backbone, heads, rates, **options)
    losses = []
    for iteration in range(len(batches) // accumulation):
        step = batches[iteration * accumulation : (iteration + 1) * accumulation]
        for probe in probes:
            set_learning_rate(probe.optimizer, probe.learning_rate / (iteration + 1))
        features = [(shared.compute(images), labels) for images, labels in step]
        seed = step_seed(7, 0, iteration)
        losses.append(probe_step(Accelerator(cpu=True), shared, probes, features, seed=seed, max_grad_norm=0.1))
    return shared, probes, losses


def predictions(shared, probe, images):
    shared.forget()
    probe.model.eval()
    with torch.no_grad():
        return probe.model(images)


def assert_same_bits(shared, probe, model):
    ours = probe.model.state_dict()
    theirs = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    assert ours.keys() == theirs.keys()
    assert ours
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    images = batches_of(1, 50)[0][0]
    if "resnet" in model.backbone.name:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(predictions(shared, probe, images), model(images))


VIT = [
    "linear",
    "mean_shift(num_layers=2, shift_channels=16)",
    "mask_transformer(drop_rate=0.3, drop_path_rate=0.5)",
    "senformer(merge='hierarchical_attention') @ simple(out_channels=16)",
    "smp:dpt(decoder_intermediate_channels=(8, 8, 8, 8), decoder_fusion_channels=8)",
    "smp:unet(decoder_channels=(8, 8, 8, 8, 8)) @ simple(out_channels=8)",
]
RESNET = [
    "uper(channels=8)",
    "linear @ None",
    "senformer @ fpn(out_channels=16)",
    "senformer @ fpnt(out_channels=16, drop_path_rate=0.5)",
    "smp:unet(decoder_channels=(8, 8, 8, 8, 8))",
    "fcn(channels=8) @ fpn(out_channels=8)",
]


@pytest.mark.parametrize(("backbone", "heads"), [("test_vit", VIT), ("test_resnet", RESNET)])
def test_each_head_ends_with_the_bits_of_a_run_of_its_own(backbone, heads):
    batches, rates = batches_of(2), (1e-2, 1e-3)
    if backbone == "test_resnet":
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    shared, probes, losses = together(backbone, heads, rates, batches)
    assert [probe.learning_rate for probe in probes] == [*rates] * len(heads)
    moved = [probe.model.state_dict() for probe in probes[::2]]
    for number, head in enumerate(heads):
        model, expected = alone(backbone, head, 1e-2, batches)
        assert [step[2 * number].item() for step in losses] == [loss.item() for loss in expected]
        assert_same_bits(shared, probes[2 * number], model)
        other = probes[2 * number + 1].model.state_dict()
        assert any(not torch.equal(moved[number][key], other[key]) for key in other)  # the rates tell
    model, _ = alone(backbone, heads[2], 1e-3, batches)
    assert_same_bits(shared, probes[5], model)


def test_gradients_of_several_batches_are_averaged_as_in_a_run_of_its_own():
    batches, head = batches_of(4), "mask_transformer(drop_rate=0.3)"
    shared, probes, _ = together("test_vit", ["linear", head], [1e-2], batches, accumulation=2)
    assert_same_bits(shared, probes[1], alone("test_vit", head, 1e-2, batches, accumulation=2)[0])


def test_neither_order_nor_company_changes_a_head():
    narrow = {name: f"{name} @ fpn(out_channels=16)" for name in ("senformer", "feature_fusion")}
    narrow |= {name: f"{name}(channels=16)" for name in ("uper", "sen_uper")}
    narrow["smp:dpt"] = "smp:dpt(decoder_intermediate_channels=(8, 8, 8, 8), decoder_fusion_channels=8)"
    heads = [narrow.get(head, head) for head in list_heads()]
    batches = batches_of(1, 32)
    shared, probes = probes_of("test_resnet", heads)
    turned, reverse = probes_of("test_resnet", heads[::-1])
    for one, many in ((shared, probes), (turned, reverse)):
        maps = one.compute(batches[0][0])
        before = [x.clone() for x in maps]
        probe_step(Accelerator(cpu=True), one, many, [(maps, batches[0][1])], seed=1)
        assert all(torch.equal(x, y) for x, y in zip(maps, before, strict=True))  # no head wrote to what all share
    for probe, other in zip(probes, reverse[::-1], strict=True):
        assert probe.name == other.name
        ours, theirs = probe.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), probe.name


def test_evaluation_of_all_heads_equals_that_of_each_model(tmp_path):
    heads = [VIT[1], VIT[3], "linear"]
    shared, probes, _ = together("test_vit", heads, [1e-2], batches_of(1))
    samples = EvaluationSamples(Scenes("val", size=(70, 90), length=3), (0.5,) * 3, (0.5,) * 3)
    accelerator = Accelerator(cpu=True)
    save_probes(tmp_path, shared, probes)
    calls, compute = [], shared.compute
    shared.compute = lambda images: (calls.append(tuple(images.shape)), compute(images))[1]
    protocol = InferenceProtocol(window=64, stride=32, scales=(1.0, 0.5), flip=True)
    options = {"batch_size": 3, "limit": 2}
    read = samples.dataset.read  # the scenes have 12 classes
    samples.dataset.read = lambda index: (read(index)[0], read(index)[1].clamp(max=K - 1))
    results = evaluate_probes(accelerator, shared, probes, samples, protocol, **options)
    windows = list(calls)
    calls.clear()
    frozen = probes[0].model.head.train(False)  # which stays as it is
    evaluate_probes(accelerator, shared, probes[:1], samples, protocol, **options)
    assert windows == calls  # as often for three heads as for one
    assert all(probe.model.training for probe in probes)
    assert not frozen.training
    for probe, result in zip(probes, results, strict=True):
        expected = evaluate(accelerator, join_head(tmp_path, probe.slug), samples, protocol, **options)
        assert scores(result) == scores(expected)
        assert torch.equal(result["pixels"], expected["pixels"])
    assert len({result["aAcc"].item() for result in results}) > 1


def test_heads_are_joined_to_the_backbone_again(tmp_path):
    shared, probes, _ = together("test_resnet", RESNET[1:5:3], [1e-2, 1e-3], batches_of(1))
    save_probes(tmp_path / "run", shared, probes)
    images = batches_of(1, 50)[0][0]
    for probe in probes:
        model = join_head(tmp_path / "run", probe.slug)
        model.save_pretrained(tmp_path / probe.slug)
        again = SegmentationModel.from_pretrained(tmp_path / probe.slug)
        expected = predictions(shared, probe, images)
        with torch.no_grad():
            torch.testing.assert_close(model(images), expected)  # it is not channels-last
            torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_joined_heads_know_their_meaning(tmp_path):
    shared, probes, _ = together("test_vit", ["linear"], [1e-2], batches_of(1))
    model, names = probes[0].model, tuple(f"left {index}" for index in range(K))
    model.classes = Classes(names, Classes.numbered(K).palette).with_flip_pairs(names[:2])
    model.protocol, model.label_map = InferenceProtocol(window=64, stride=32), LabelMap({7: 0, 9: 1, 8: None})
    save_probes(tmp_path / "run", shared, probes)
    joined = join_head(tmp_path / "run", probes[0].slug)
    joined.save_pretrained(tmp_path / "model")
    for found in (joined, SegmentationModel.from_pretrained(tmp_path / "model")):
        assert (found.classes, found.protocol, found.label_map) == (model.classes, model.protocol, model.label_map)
        assert found.classes.flip_pairs


def test_a_head_that_is_not_there(tmp_path):
    shared, probes, _ = together("test_vit", ["linear"], [1e-2], batches_of(1))
    save_probes(tmp_path, shared, probes)
    with pytest.raises(FileNotFoundError, match=r"holds no head 'fcn'; it holds linear_at_0\.01"):
        join_head(tmp_path, "fcn")
    other, _ = probes_of("test_vit2", ["linear"])
    save_probes(tmp_path, other, [])
    with pytest.raises(ValueError, match=r"linear_at_0\.01/head\.safetensors and backbone\.safetensors do not fit"):
        join_head(tmp_path, "linear_at_0.01")


def schedule(iteration, rate):
    return rate / (iteration + 1)


def run_of(folder, heads, rates, iterations, start=0, checkpoint_every=2, batches=None):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    shared, probes = probes_of("test_vit", heads, rates)
    for probe in probes:
        probe.prepared, probe.optimizer = accelerator.prepare(probe.model, probe.optimizer)
    folder = RunFolder(folder, {}, resume=start > 0)
    folder.start({})
    if start:
        folder.load(accelerator, start)
    run = Run(config=None, accelerator=accelerator, folder=folder, training_set=None, validation_set=None)
    options = {"schedule": schedule, "seed": 7, "max_grad_norm": 0.1, "records": folder.records()}
    learner = ProbeLearner(accelerator, shared, probes, **options)
    batches = batches or batches_of(iterations)
    features = ((shared.compute(images), labels) for images, labels in batches[start:])
    loop = LoopConfig(
        iterations=iterations, batch_size=2, log_every=1, checkpoint_every=checkpoint_every, evaluate_every=0
    )
    train(run, learner, features, loop, start=start)
    return shared, probes, folder


def test_a_resumed_run_goes_on_with_the_same_bits(tmp_path):
    heads, rates = ["linear", VIT[2]], (1e-2, 1e-3)
    _, expected, run = run_of(tmp_path / "whole", heads, rates, 4)
    run_of(tmp_path / "killed", heads, rates, 2, batches=batches_of(4))
    _, probes, again = run_of(tmp_path / "killed", heads, rates, 4, start=2)
    for probe, other in zip(probes, expected, strict=True):
        for key, value in other.model.state_dict().items():
            assert torch.equal(probe.model.state_dict()[key], value), key
    losses = [[record["loss"] for record in each.records()] for each in (run, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    model, alone_losses = alone("test_vit", VIT[2], 1e-3, batches_of(4))
    shared, probes, _ = run_of(tmp_path / "third", heads, rates, 4)
    assert_same_bits(shared, probes[3], model)
    assert [loss.item() for loss in alone_losses] == [x[f"{parse_head(VIT[2])} at 0.001"] for x in losses[0]]


def test_one_that_diverges_ends_alone(tmp_path):
    batches = batches_of(4)
    _, probes, run = run_of(tmp_path / "run", ["linear", "fcn"], (1e-2, 1e38), 4, batches=batches)
    names = [probe.name for probe in probes]
    ended = {probe.name: probe.diverged_at for probe in probes}
    assert ended["linear at 0.01"] is ended["fcn at 0.01"] is None
    assert all(0 < ended[name] <= 4 for name in names if name.endswith("1e+38"))
    assert {key: v for r in run.records() for key, v in r.get("diverged", {}).items()} == {
        name: ended[name] for name in names if name.endswith("1e+38")
    }
    _, healthy, _ = run_of(tmp_path / "alone", ["linear"], (1e-2,), 4, batches=batches)
    for key, value in healthy[0].model.state_dict().items():
        assert torch.equal(probes[0].model.state_dict()[key], value)
    assert set(run.records()[-1]["loss"]) == {"linear at 0.01", "fcn at 0.01"}
    # a resumed run knows it from the log
    _, again, _ = run_of(tmp_path / "run", ["linear", "fcn"], (1e-2, 1e38), 4, start=4, batches=batches)
    assert {probe.name: probe.diverged_at for probe in again} == ended
    results = [{"mIoU": 0.5, "aAcc": 0.75, "mAcc": 0.5}] * 4
    rows = probe_rows(again, results)
    assert [row["mIoU"] for row in rows] == [50, None, 50, None]
    assert [row["best"] for row in rows] == [True, False, True, False]
    assert f"diverged at iteration {ended['fcn at 1e+38']} | – | –" in probe_markdown(rows, "")


def test_a_head_that_diverged_is_not_evaluated():
    shared, probes = probes_of("test_vit", ["linear", "fcn(channels=4)"], (1e-3,))
    probes[0].diverged_at = 3
    with torch.no_grad():
        probes[0].model.head.classifier.weight.fill_(torch.nan)
    samples = EvaluationSamples(Scenes("val", size=(32, 32), length=1), (0.5,) * 3, (0.5,) * 3)
    samples.dataset.read = lambda i: (Scenes("val", size=(32, 32)).read(i)[0], torch.full((32, 32), K - 1).byte())
    none, found = evaluate_probes(Accelerator(cpu=True), shared, probes, samples)
    assert none == {}
    assert found["pixels"][K - 1] == 32 * 32


def test_table_names_the_classes_that_miou_leaves_out():
    _, probes = probes_of("test_vit", ["linear", "fcn(channels=4)"], (1e-3,))
    score = {"mIoU": 0.5, "aAcc": 0.5, "mAcc": 0.25}
    both = probe_rows(probes, [{**score, "absent_classes": ["sky"]}] * 2)
    assert probe_markdown(both, "").endswith(f"\n\nmIoU over {K - 1} of {K} classes; absent: sky\n")
    rows = probe_rows(probes, [score, {**score, "absent_classes": ["sky"]}])
    assert probe_markdown(rows, "").endswith(
        f"`fcn(channels=4)` at 0.001: mIoU over {K - 1} of {K} classes; absent: sky\n"
    )
    assert "absent" not in probe_markdown(probe_rows(probes, [score] * 2), "")


def test_table_and_curves(tmp_path):
    _, probes = probes_of("test_vit", ["linear", "fcn(channels=4)"], (1e-3, 1e-2))
    results = [{"mIoU": x, "aAcc": 0.5, "mAcc": 0.25} for x in (0.1, 0.2, 0.4, 0.3)]
    rows = probe_rows(probes, results)
    assert [row["best"] for row in rows] == [False, True, True, False]
    assert [row["parameters"] for row in rows[::2]] == [
        sum(p.numel() for p in probe.model.parameters()) for probe in probes[::2]
    ]
    lines = probe_markdown(rows, "A title").splitlines()
    assert lines[0] == "A title"
    parameters = f"{rows[2]['parameters'] / 1e6:.3f}"
    assert lines[6] == f"| `fcn(channels=4)` | 0.001 | 40.00 | 50.00 | 25.00 | {parameters} |"
    assert "| `linear` | 0.01 | **20.00** | **50.00** | **25.00** | " in lines[-3]
    records = [{"iteration": i, "loss": {probe.name: 1.0 / i for probe in probes}} for i in (1, 2)]
    figure = plot_probes(rows, records, "A title")
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1, 0.5]] * 2  # the best rates alone
    assert [list(line.get_ydata()) for line in right.lines] == [[10, 20], [40, 30]]
    assert (right.get_ylabel(), right.get_xlabel()) == ("mIoU (percent)", "learning rate")
    write_probe_report(tmp_path, rows, records, "A title")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["curves.png", "heads.csv", "heads.json", "heads.md"]
    with pytest.raises(ValueError, match="dict contains fields not in fieldnames: 'other'"):
        write_probe_report(tmp_path, [*rows, {**rows[0], "other": 1}], records, "A title")
    assert (tmp_path / "heads.csv").read_bytes() == before["heads.csv"]
    assert {path.name for path in tmp_path.iterdir()} == before.keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("linear", HeadChoice("linear")),
        (" smp:unet @ simple ", HeadChoice("smp:unet", pyramid="simple")),
        ("linear @ None", HeadChoice("linear", pyramid=None)),
        (
            "senformer(learner_kwargs={'num_layers': 2}) @ fpn(out_channels=8)",
            HeadChoice("senformer", {"learner_kwargs": {"num_layers": 2}}, "fpn", {"out_channels": 8}),
        ),
    ],
)
def test_heads_in_words(text, expected):
    assert parse_head(text) == expected
    assert parse_head(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "linear(3)", "linear(a=b)", "linear(**{})", "linear + fpn", "a.b", "linear(x=1", "linear @ fpn @ fpn", "3"],
)
def test_what_is_no_head(text):
    with pytest.raises(ValueError, match=r"a head must be NAME, .*; got '" + text.replace("(", r"\(")[:6]):
        parse_head(text)


def test_unknown_names():
    with pytest.raises(ValueError, match="no head is called 'liner'.*did you mean 'linear'"):
        parse_head("liner")
    with pytest.raises(ValueError, match="no pyramid is called 'fpm'"):
        parse_head("linear @ fpm")


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="needs one head and one learning rate or more; got 0 and 1"):
        probes_of("test_vit", [])
    with pytest.raises(ValueError, match="given once; got linear at 0.1 twice"):
        probes_of("test_vit", ["linear", "linear"], (0.1,))
    with pytest.raises(ValueError, match=r"head fcn\(channels=0\): .*0"):
        probes_of("test_vit", ["linear", "fcn(channels=0)"])

    left_out = []

    def leave_out(choice, error):
        left_out.append((choice.head, str(error)))
        return choice.head == "smp:dpt"

    choices = [HeadChoice("smp:dpt", {"encoder_output_strides": [16] * 4}), HeadChoice("linear")]
    build = partial(build_probes, partial(create, "test_resnet"), learning_rates=[1], seed=0, leave_out=leave_out)
    assert [probe.choice.head for probe in build(choices)[1]] == ["linear"]
    assert [(head, "built for maps of strides" in reason) for head, reason in left_out] == [("smp:dpt", True)]
    with pytest.raises(ValueError, match="none of the 1 heads fits the backbone"):
        build(choices[:1])
    with pytest.raises(ValueError, match=r"head fcn\(channels=0\)"):
        build([HeadChoice("fcn", {"channels": 0})])

    def other_strides(choice):
        model = create("test_resnet", choice)
        if choice.head == "linear":
            model.backbone.strides = [*model.backbone.strides[:-1], 33]
        return model

    choices = [HeadChoice("linear"), dataclasses.replace(HeadChoice("linear"), pyramid=None)]
    with pytest.raises(ValueError, match=r"cannot share test_resnet: it pads .* multiples of \d+ and of \d+"):
        build_probes(lambda c: other_strides(c) if c.pyramid else create("test_resnet", c), choices, [1], seed=0)


def test_the_backbone_stays_as_it_is():
    shared, probes = probes_of("test_resnet", ["linear"])
    before = copy.deepcopy(shared.state_dict())
    shared.train()
    assert not any(module.training for module in shared.modules())
    images, labels = batches_of(1)[0]
    probe_step(Accelerator(cpu=True), shared, probes, [(shared.compute(images), labels)], seed=0)
    assert all(torch.equal(before[key], value) for key, value in shared.state_dict().items())
    assert not any(isinstance(m, nn.Module) and m is shared for m in probes[0].model.modules())
    own = {id(p) for p in probes[0].model.parameters()}
    assert own.isdisjoint({id(p) for p in shared.parameters()})


def test_every_step_drops_something_else():
    seeds = {step_seed(*of) for of in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 0, 0)]}
    assert len(seeds) == 6
    assert step_seed(3, 1, 4) == step_seed(3, 1, 4)


def test_a_learner_leaves_frozen_parts_frozen():
    shared, (probe,) = probes_of("test_resnet", ["fcn(channels=8)"])
    probe.model.head.eval()
    norms = [x.clone() for x in probe.model.head.buffers()]
    learner = ProbeLearner(Accelerator(cpu=True), shared, [probe], schedule=lambda _, rate: rate, seed=0)
    images, labels = batches_of(1)[0]
    learner.step(0, [(shared.compute(images), labels)])
    assert norms
    assert all(torch.equal(x, y) for x, y in zip(norms, probe.model.head.buffers(), strict=True))
    assert probe.model.training
