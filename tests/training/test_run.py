"""The run that recipes share; what it does with real options is tested in tests/recipes."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import miniatures
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import SMALL_RUN, build

from segheads import SegmentationMetrics, SegmentationModel, TimmBackbone
from segheads.classes import Classes
from segheads.data import IterationSampler, open_dataset
from segheads.data.scenes import Scenes
from segheads.errors import (
    DataMissingError,
    DivergedError,
    OptionError,
    PretrainedWeightsError,
    SavedModelError,
    SavedModelMissingError,
)
from segheads.evaluation import scores
from segheads.training import TrainingConfig, changed, flat, run_training
from segheads.training.batches import explain_batch, training_samples
from segheads.training.config import MAY_DIFFER
from segheads.training.machine import is_convolutional
from segheads.training.setup import open_data

SMALL = {**SMALL_RUN, "pictures": 1, "evaluate_images": 2}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    width: int = 3


@pytest.fixture(autouse=True)
def _set_up(own_run):
    pass


def test_results_are_returned_and_runs_follow_each_other(tmp_path):
    """As an ablation uses it: several runs in one process, each told apart by its folder."""
    seen = []

    def build_and_look(config, num_classes):
        seen.append((config.width, num_classes))
        return build(config, num_classes)

    returned = []
    for width in (1, 2):
        config = Config.from_flat(**SMALL, output=tmp_path / str(width), width=width)
        returned.append(run_training(config, build_and_look))
    assert seen == [(1, 12), (2, 12)]
    for name, results in zip("12", returned, strict=True):
        written = json.loads((tmp_path / name / "results.json").read_text())
        assert {key: written[key] for key in ("aAcc", "mAcc", "mIoU")} == scores(results)
        assert results["IoU"].shape == (12,)
        assert results["pixels"].sum() == 100 * 32 * 32  # the last evaluation is on all images
    torch.testing.assert_close(returned[0]["IoU"], returned[1]["IoU"], equal_nan=True, rtol=0, atol=0)  # same seed
    assert isinstance(SegmentationModel.from_pretrained(tmp_path / "1" / "model"), SegmentationModel)


def test_the_backbones_rate_reaches_the_optimizer(tmp_path):
    """With a rate of zero the backbone stays as it was built."""
    models = []

    def keep(config, num_classes):
        models.append(build(config, num_classes))
        return models[-1]

    run_training(Config.from_flat(**SMALL, output=tmp_path, backbone_lr_scale=0.0), keep)
    torch.manual_seed(0)
    fresh = build(Config.from_flat(**SMALL, output=tmp_path), 12)
    for name, parameter in models[0].named_parameters():
        moved = not torch.equal(parameter, fresh.get_parameter(name))
        assert moved == name.startswith("head."), name


def test_numbers_of_the_run_are_told_and_kept(tmp_path, caplog):
    run_training(Config.from_flat(**SMALL, output=tmp_path / "run", backbone_lr_scale=0.25), build)
    printed = caplog.text
    assert "linear on test_vit: " in printed
    assert (
        "adamw: learning rate 0.001 poly (backbone times 0.25), weight decay 0.05, gradients clipped at 1.0" in printed
    )
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["output"] == str(tmp_path / "run")
    assert kept["scale"] == [32, 32]
    assert kept.keys() == flat(Config.from_flat(**SMALL, output=tmp_path)).keys() | {"environment", "contents"}


def test_classes_that_miou_leaves_out_are_told_and_kept(tmp_path, caplog, monkeypatch):
    def evaluate(*_, **options):
        metric = SegmentationMetrics(12)
        metric.update(torch.arange(11)[None], torch.arange(11)[None])
        return metric.compute()

    caplog.set_level("INFO", "segheads")
    monkeypatch.setattr("segheads.training.run.evaluate", evaluate)
    config = Config.from_flat(**SMALL, output=tmp_path)
    run_training(config, build)
    name = open_dataset(config.data, "val").class_names[11]
    assert f"mIoU 1.0000; mIoU over 11 of 12 classes; absent: {name}\n" in caplog.text
    assert f"mIoU over 11 of 12 classes; absent: {name}\n" in (tmp_path / "per_class.md").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[-1]["absent_classes"] == [name]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"optimizer": "nonsense"}, OptionError, "nonsense"),
        ({"head": "nonsense"}, OptionError, "^no head is called 'nonsense'"),
        ({"iterations": 0}, OptionError, "^iterations must be 1 or more; got 0$"),
        ({"scale": None}, OptionError, "^training resizes images about a scale, got scale None"),
        ({"pretrained": True, "backbone_weights": Path("none.pth")}, PretrainedWeightsError, r"none\.pth"),
        ({"batch_size": 0}, OptionError, "^batch_size must be 1 or more; got 0$"),
        ({"batch_size": 3, "gradient_accumulation": 2}, OptionError, "must be a multiple of 2$"),
        ({"dataset": "camvid", "data_root": Path("nothing")}, DataMissingError, "nothing"),
    ],
)
def test_mistakes_leave_no_folder(tmp_path, change, kind, message):
    with pytest.raises(kind, match=message):
        run_training(Config.from_flat(**{**SMALL, **change}, output=tmp_path / "run"), build)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_where_its_last_checkpoint_is(tmp_path):
    options = {**SMALL, "iterations": 6, "checkpoint_every": 1, "optimizer": "momentum", "learning_rate": 1e30}
    with pytest.raises(DivergedError, match=rf"\(iteration \d+ in {tmp_path}/run/checkpoints\)$") as stop:
        run_training(Config.from_flat(**{**options, "max_grad_norm": None}, output=tmp_path / "run"), build)
    assert 1 <= stop.value.iteration <= 6


@pytest.fixture
def saved(tmp_path):
    config = Config.from_flat(**SMALL, output=tmp_path / "first")
    run_training(config, build)
    return tmp_path / "first"


def started_from(place, tmp_path, monkeypatch, **options):
    """The model as its training begins, and what it was built from before."""
    models = []
    monkeypatch.setattr(
        "segheads.training.run._train", lambda run, model, evaluate_now: (models.append(model), 0, 0)[1:]
    )
    monkeypatch.setattr("segheads.training.run.report", lambda *_: None)
    config = Config.from_flat(**{**SMALL, **options}, output=tmp_path / "second", init_from=str(place))
    run_training(config, build)
    return models[0].state_dict()


@pytest.mark.parametrize("part", ["", "model"])
def test_a_run_starts_from_a_model_of_the_same_classes(saved, tmp_path, monkeypatch, caplog, part):
    caplog.set_level("INFO", "segheads")
    found = started_from(saved / part, tmp_path, monkeypatch)
    for key, value in SegmentationModel.from_pretrained(saved / "model").state_dict().items():
        torch.testing.assert_close(found[key], value)
    assert f"weights from {saved / part}, of the same classes" in caplog.text


@pytest.mark.parametrize("names", [[f"other {k}" for k in range(12)], ["a", "b", "c"]])
def test_a_run_starts_from_a_model_of_other_classes(saved, tmp_path, monkeypatch, caplog, names):
    caplog.set_level("INFO", "segheads")
    model = SegmentationModel.from_pretrained(saved / "model", num_classes=len(names))
    model.classes = Classes(tuple(names))
    torch.nn.init.ones_(model.head.classifier.weight)
    model.save_pretrained(tmp_path / "others")
    found = started_from(tmp_path / "others", tmp_path, monkeypatch)
    for key, value in model.backbone.state_dict(prefix="backbone.").items():
        torch.testing.assert_close(found[key], value)
    assert found["head.classifier.weight"].shape[0] == 12
    assert not torch.equal(found["head.classifier.weight"], torch.ones_like(found["head.classifier.weight"]))
    new = "new and random: head.classifier.weight, head.classifier.bias"
    assert f"weights from {tmp_path / 'others'}, of {len(names)} other classes; {new}" in caplog.text


def test_a_run_starts_from_a_model_without_names_by_their_number(saved, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "segheads")
    path = saved / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": None}))
    found = started_from(saved, tmp_path, monkeypatch)
    model = SegmentationModel.from_pretrained(saved / "model")
    torch.testing.assert_close(found["head.classifier.weight"], model.head.classifier.weight.detach())
    assert "of 12 classes without names, taken as the same" in caplog.text


def test_a_model_of_other_parts_is_no_start(saved, tmp_path, monkeypatch):
    message = "it is a linear on test_vit: choose the same backbone, head and sizes"
    with pytest.raises(SavedModelError, match=message):
        started_from(saved, tmp_path, monkeypatch, head="fcn")
    with pytest.raises(SavedModelMissingError, match="holds no config.json"):
        started_from(tmp_path, tmp_path, monkeypatch)


def test_no_weights_of_a_backbone_are_fetched_for_a_start():
    config = Config.from_flat(**{**SMALL, "pretrained": True, "init_from": "x"}, output=Path("run"))
    assert config.model_options()["pretrained"] is False


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({}, True),
        ({"flip_pairs": ("left arm", "right arm")}, False),
        ({"training_flip": False}, False),
        ({"class_names": ("a", "b", "c")}, False),
    ],
)
def test_sides_in_the_names_of_classes_are_warned_of(tmp_path, caplog, options, warns):
    own = {"dataset": "folder", "class_names": ("sky", "left arm", "right arm"), "data_root": tmp_path}
    miniatures.own_folder(tmp_path, (0, 1, 2))
    config = Config.from_flat(**{**SMALL, **own, **options}, output=tmp_path / "run")
    training_set, _ = open_data(Accelerator(cpu=True), config)
    assert ("mirrored crops teach the wrong side of left arm, right arm; --flip-pairs" in caplog.text) == warns
    crop = training_samples(config, training_set).crop
    assert crop.flip_probability == (0.5 if config.training_flip else 0)
    assert crop.flip_pairs == (((1, 2),) if "flip_pairs" in options else ())


def test_evaluations_in_training_know_the_pairs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "segheads.training.run._train", lambda run, model, evaluate_now: (seen.append(model.classes), 0, 0)[1:]
    )
    config = Config.from_flat(**SMALL, output=tmp_path, flip_pairs=("sky", "road"))
    run_training(config, build)
    assert seen[0].flip_pairs == open_dataset(config.data, "val").classes.flip_pairs != ()
    assert SegmentationModel.from_pretrained(tmp_path / "model").classes == seen[0]


def test_options_of_the_model():
    config = Config.from_flat(**{**SMALL, "drop_path_rate": 0.2}, output=Path("run"), depth=3, patch_size=8)
    assert config.model_options() == {
        "pretrained": False,
        "backbone_kwargs": {"img_size": 32, "drop_path_rate": 0.2, "model_kwargs": {"patch_size": 8, "depth": 3}},
        "loss": "ce",
        "loss_kwargs": {},
        "loss_reduction": "valid",
    }
    weights = changed(config, backbone_weights=Path("weights.pth"), depth=None)
    assert weights.model_options()["pretrained"] == Path("weights.pth")
    assert weights.model_options()["backbone_kwargs"]["model_kwargs"] == {"patch_size": 8}


def test_what_may_differ_is_there():
    assert flat(Config.from_flat(**SMALL, output=Path("run"))).keys() | {"environment", "contents"} >= MAY_DIFFER


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", True),
        ("test_convnext", True),
        ("test_efficientnet", True),
        ("test_vit", False),
        ("swin_tiny_patch4_window7_224", False),
    ],
)
def test_convolutional_backbones(name, expected):
    assert is_convolutional(TimmBackbone(name, pretrained=False)) == expected


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([record["loss"] for record in records if "loss" in record])


def test_memory_format_changes_nothing_but_rounding(tmp_path, caplog):
    """In the middle of a run, too: half of the iterations with, half without."""
    models = []

    def keep(config, num_classes):
        models.append(build(config, num_classes))
        return models[-1]

    common = {**SMALL, "backbone": "test_resnet", "iterations": 4, "log_every": 1, "checkpoint_every": 2}
    for name, channels_last in (("chosen", None), ("without", False)):
        run_training(Config.from_flat(**common, output=tmp_path / name, channels_last=channels_last), keep)
        assert (", channels last" in caplog.text) == (name == "chosen")
        caplog.clear()
    for name, model in zip(("chosen", "without"), models, strict=True):
        weight = model.backbone.get_parameter("model.conv1.0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last) == (name == "chosen")
    torch.testing.assert_close(losses(tmp_path / "chosen"), losses(tmp_path / "without"), rtol=1e-4, atol=1e-5)

    shutil.rmtree(tmp_path / "without" / "checkpoints" / "00000004")
    run_training(Config.from_flat(**common, output=tmp_path / "without", resume=True, channels_last=True), keep)
    assert "resuming" in caplog.text
    torch.testing.assert_close(losses(tmp_path / "chosen"), losses(tmp_path / "without"), rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_compiled_but_not_in_another_precision(tmp_path, monkeypatch):
    calls = []

    def quickly(model):
        calls.append(model)
        torch.nn.Module.compile(model, backend="eager", fullgraph=True)

    monkeypatch.setattr(SegmentationModel, "compile", quickly)
    common = {**SMALL, "iterations": 4, "log_every": 1, "checkpoint_every": 2, "output": tmp_path}
    run_training(Config.from_flat(**common), build)
    expected = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision
    with pytest.raises(OptionError, match="mixed_precision was 'no' and is 'bf16'"):
        run_training(Config.from_flat(**common, resume=True, mixed_precision="bf16"), build)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_training(Config.from_flat(**common, resume=True, compile=True), build)
    assert len(calls) == 1
    torch.testing.assert_close(losses(tmp_path), expected, rtol=1e-4, atol=1e-5)


class WrongLabels(Scenes):
    """Sample 3 has labels that are no class."""

    def read(self, index):
        image, labels = super().read(index)
        return image, torch.full_like(labels, 200) if index == 3 else labels


@pytest.mark.parametrize("parts", [1, 2])
def test_labels_that_made_a_loss_nan_are_named(tmp_path, parts):
    dataset = WrongLabels("train", length=8, size=(32, 32))
    options = {**SMALL, "batch_size": 4, "iterations": 4, "gradient_accumulation": parts}
    config = Config.from_flat(**options, output=tmp_path)
    order = [key for batch in IterationSampler(8, 4, seed=config.seed, num_iterations=2) for _, key in batch]
    iteration = 1 + order.index(3) // 4
    words = explain_batch(config, dataset, iteration)
    assert words == f"where labels are none of the 12 classes (0 to 11) nor 255 (ignored): 200 in {dataset.name(3)}"
    other = explain_batch(config, dataset, 3 - iteration)
    at = 4 * (2 - iteration)
    assert other == "whose images were " + ", ".join(dataset.name(index) for index in order[at : at + 4])


def test_a_loss_that_is_not_finite_names_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("segheads.losses.CrossEntropy.compute", lambda self, logits, *_: logits.sum() * torch.nan)
    message = r"at iteration 1, first in the loss, whose images were \S+, \S+; the run stopped"
    with pytest.raises(DivergedError, match=message):
        run_training(Config.from_flat(**SMALL, output=tmp_path), build)


def test_a_model_that_could_not_be_saved_is_refused_before_it_is_trained(tmp_path):
    def build_odd(config, num_classes):
        model = build(config, num_classes)
        model.plan = dataclasses.replace(model.plan, backbone_kwargs={"model_kwargs": {"checkpoint_path": "x"}})
        return model

    with pytest.raises(OptionError, match=r"^model.backbone_kwargs.model_kwargs.checkpoint_path is none of"):
        run_training(Config.from_flat(**SMALL, output=tmp_path), build_odd)
    assert not (tmp_path / "config.json").exists()
