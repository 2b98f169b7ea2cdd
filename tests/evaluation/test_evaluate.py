import contextlib
import importlib
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segheads import SegmentationMetrics, create_model
from segheads.data import Scenes
from segheads.data.samples import EvaluationSamples
from segheads.errors import ScoresError
from segheads.evaluation import evaluate, evaluate_each, scores
from segheads.evaluation.evaluate import predict, predict_uncertainty
from segheads.inference.predict import predict_labels, predict_probabilities
from segheads.inference.protocol import WHOLE, InferenceProtocol
from segheads.metrics import METRICS, SegmentationMetric
from segheads.metrics.boundary import BoundaryIoU
from segheads.metrics.calibration import CalibrationError
from segheads.metrics.images import image_scores
from segheads.metrics.object_size import ObjectSizeIoU
from segheads.training import DEMO_RUN, MAY_DIFFER, TrainingConfig, run_training

HALF = (0.5, 0.5, 0.5)
MODULE = importlib.import_module("segheads.evaluation.evaluate")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("test_vit", "linear", 12, pretrained=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_equals_the_plain_way(model, workers):
    dataset = Scenes("val", size=(32, 48), length=5)
    results = evaluate(Accelerator(cpu=True), model, EvaluationSamples(dataset, HALF, HALF), workers=workers)
    metrics = SegmentationMetrics(12)
    for image, labels in (dataset[i] for i in range(5)):
        metrics.update(model.predict((image[None] - 0.5) / 0.5), labels[None])
    assert model.training  # as it was
    for name, expected in metrics.compute().items():
        torch.testing.assert_close(results[name], expected, equal_nan=True)


def test_labels_keep_their_size_when_images_are_scaled(model):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF, scale=(96, 64))
    assert samples[0][0].shape == (3, 64, 96)
    results = evaluate(
        Accelerator(cpu=True), model, samples, InferenceProtocol(window=32, stride=16, scales=(0.5, 1.0), flip=True)
    )
    assert results["pixels"].sum() == 3 * 32 * 48


@pytest.mark.parametrize("metrics", [("iou",), ("iou", "calibration")])
def test_scores_that_are_nan_are_an_error_that_names_the_image(model, metrics, monkeypatch):
    samples, seen = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x) / (len(seen.append(1) or seen) != 2))  # of the second
    with pytest.raises(ScoresError, match=f"^{samples.dataset.name(1)}: the model's scores are NaN or infinite"):
        evaluate(Accelerator(cpu=True), model, samples, metrics=metrics)
    assert model.training  # as it was


def test_evaluation_leaves_frozen_parts_frozen(model):
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    evaluate(Accelerator(cpu=True), model, EvaluationSamples(Scenes("val", size=(32, 48), length=1), HALF, HALF))
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


class Waits(TorchDispatchMode):
    """Counts copies from the host for which all that is queued must end; on a device without values reading fails."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):  # loaders hand over pinned memory
            self.found.append(str(func))
        return result


@pytest.fixture
def meta(monkeypatch):
    """A device that is not the host's, and has no values that could be read."""
    monkeypatch.setattr(Accelerator, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(Accelerator, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # PyTorch's knows no such device
    return Accelerator(cpu=True)


@pytest.mark.parametrize(
    "protocol", [WHOLE, InferenceProtocol(window=24, stride=16), InferenceProtocol(scales=(0.5, 1.0), flip=True)]
)
@pytest.mark.parametrize("metrics", [("iou", "calibration", "boundary", "object_sizes")])
def test_the_host_waits_for_no_image(meta, model, monkeypatch, protocol, metrics):
    shown = []  # to the metric that waits
    monkeypatch.setattr(ObjectSizeIoU, "update", lambda self, preds, labels: shown.append(tuple(labels.shape)))
    samples, looks = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF), []
    monkeypatch.setattr(MODULE, "_first_bad", lambda flags: looks.append(len(flags)))
    monkeypatch.setattr(MODULE._Measured, "compute", lambda self, count: {})
    monkeypatch.setattr(MODULE, "LOOK_EVERY", 2)
    model.to("meta")
    evaluate(meta, model, samples, protocol, metrics=metrics, limit=1)  # keeps the weights of this size
    looks.clear()
    shown.clear()
    loop, waits = MODULE._count_own_images, Waits()

    def watched(*args):
        with waits:  # not the metrics' way to the device, before
            return loop(*args)

    monkeypatch.setattr(MODULE, "_count_own_images", watched)
    evaluate(meta, model, samples, protocol, metrics=metrics)
    assert not waits.found
    assert looks == [2, 1]
    assert shown == [(2, 32, 48), (1, 32, 48)]


@pytest.mark.parametrize(("kept_pixels", "batches"), [(2**23, [5]), (2 * 30 * 50, [2, 1, 1, 1]), (1, [1] * 5)])
def test_images_that_are_counted_later_are_counted_the_same(monkeypatch, kept_pixels, batches):
    generator, maps = torch.Generator().manual_seed(0), []
    for H, W in [(30, 41), (17, 50), (60, 9), (83, 110), (12, 12)]:
        blocks = torch.randint(5, (2, H // 5 + 1, W // 5 + 1), generator=generator)
        preds, labels = blocks.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :H, :W]
        labels[: H // 3, : W // 4] = 255
        maps.append((preds, labels))
    samples, results, seen = SimpleNamespace(dataset=SimpleNamespace(ignore_index=255)), [], []
    monkeypatch.setattr(MODULE, "KEPT_PIXELS", kept_pixels)
    update = ObjectSizeIoU.update

    def watched(self, preds, labels):
        seen.append(len(labels) if labels.ndim == 3 else None)
        update(self, preds, labels)

    monkeypatch.setattr(ObjectSizeIoU, "update", watched)
    for at_once in (True, False):
        monkeypatch.setattr(MODULE, "_looks_at_once", lambda device, at_once=at_once: at_once)
        measured = MODULE._Measured(Accelerator(cpu=True), ["iou", "object_sizes"], 5, samples, per_image=False)
        for preds, labels in maps:
            measured.update(preds, None, labels)
        measured.catch_up()
        results.append(measured.compute(len(maps)))
    assert seen == [None] * 5 + batches
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [0, 3, 4, 5])
def test_a_late_look_names_the_image(model, monkeypatch, bad):
    """As on a GPU."""
    samples, seen = EvaluationSamples(Scenes("val", size=(32, 48), length=6), HALF, HALF), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x) / (len(seen.append(1) or seen) != bad + 1))
    monkeypatch.setattr(MODULE, "LOOK_EVERY", 4)
    monkeypatch.setattr(MODULE, "_looks_at_once", lambda device: False)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ScoresError, match=f"^{samples.dataset.name(bad)}: the model's scores are NaN or infinite"):
        evaluate(accelerator, model, samples)
    assert len(seen) == (4 if bad < 4 else 6)


def test_limit(model):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=9), HALF, HALF)
    assert evaluate(Accelerator(cpu=True), model, samples, limit=2)["pixels"].sum() == 2 * 32 * 48


@pytest.mark.parametrize("protocol", [WHOLE, InferenceProtocol(window=24, stride=16, scales=(0.5, 1.0), flip=True)])
def test_calibration_is_of_the_same_protocol_and_changes_no_score(model, protocol):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF, scale=(72, 48))
    plain = evaluate(Accelerator(cpu=True), model, samples, protocol)
    results = evaluate(Accelerator(cpu=True), model, samples, protocol, metrics=("iou", "calibration"))
    assert "ECE" not in plain
    for name, expected in plain.items():
        torch.testing.assert_close(results[name], expected, rtol=0, atol=0, equal_nan=True)
    error = CalibrationError()
    model.eval()
    for image, labels in (samples[i] for i in range(3)):
        confidence, prediction = predict_probabilities(model.forward, image, protocol, size=labels.shape).max(0)
        error.update(confidence, prediction, labels)
    for name, expected in error.compute().items():
        torch.testing.assert_close(results[name], expected, rtol=0, atol=1e-7, equal_nan=True)
    assert results["bin_pixels"].sum() == results["pixels"].sum() == 3 * 32 * 48
    assert results["ECE"] > 0


def test_calibration_drops_ignored_pixels(model):
    class HalfIgnored(Scenes):
        def read(self, index):
            image, labels = super().read(index)
            labels[:16] = self.ignore_index
            return image, labels

    samples = EvaluationSamples(HalfIgnored("val", size=(32, 48), length=1), HALF, HALF)
    results = evaluate(Accelerator(cpu=True), model, samples, metrics=("iou", "calibration"))
    assert results["bin_pixels"].sum() == results["pixels"].sum() == 16 * 48


@pytest.mark.parametrize("calibration", [False, True])
def test_a_run_measures_calibration_at_its_end_alone(tmp_path, caplog, calibration):
    caplog.set_level("INFO", "segheads")
    small = {"scenes_size": 32, "scale": (32, 32), "crop_size": 32, "iterations": 2, "batch_size": 2}
    seldom = {"tracker": "none", "pictures": 0, "evaluate_every": 1, "evaluate_images": 2, "threads": 1}
    model = {"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0}
    options = {**DEMO_RUN, **model, **small, **seldom, "calibration": calibration}

    def build(config, num_classes):
        return create_model(config.model.backbone, config.model.head, num_classes, **config.model_options())

    results = run_training(TrainingConfig.from_flat(**options, output=tmp_path), build)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "mIoU" in record]
    assert len(evaluations) > 1
    assert ["ECE" in record for record in evaluations] == [False] * (len(evaluations) - 1) + [calibration]
    written = json.loads((tmp_path / "results.json").read_text())
    assert ("ECE" in results) == ("ECE" in written) == ("bins" in written) == calibration
    assert (tmp_path / "reliability.png").is_file() == calibration
    assert ("ECE 0." in caplog.text) == calibration
    assert "calibration" in MAY_DIFFER  # a resumed run may turn it on


def test_uncertainty_of_an_image_comes_at_its_labels_size():
    torch.manual_seed(0)
    model = create_model("test_vit", "senformer", 5, pretrained=False, pyramid_kwargs={"out_channels": 16}).eval()
    image, accelerator = torch.randn(3, 40, 50), Accelerator(cpu=True)
    _, expected = model.predict(image[None], return_uncertainty=True)
    for maps, whole in zip(predict_uncertainty(accelerator, model, image, (40, 50)), expected, strict=True):
        torch.testing.assert_close(maps, whole[0], rtol=1e-4, atol=1e-5)
    assert {maps.shape for maps in predict_uncertainty(accelerator, model, image, (80, 99))} == {(80, 99)}


def test_metrics_are_measured_by_name_and_come_in_the_order_of_the_registry(model):
    samples, accelerator = EvaluationSamples(Scenes("val", size=(32, 48), length=2), HALF, HALF), Accelerator(cpu=True)
    everything = evaluate(accelerator, model, samples, metrics=["calibration", *METRICS])
    assert list(scores(everything)) == [key for kind in METRICS.values() for key in kind.scores]
    assert [key for key in everything if key in scores(everything)] == list(scores(everything))
    for name, kind in METRICS.items():
        alone = evaluate(accelerator, model, samples, metrics=[name])
        assert {*kind.scores, *kind.class_scores} <= alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(value, everything[key], rtol=0, atol=0, equal_nan=True)
    images = evaluate(accelerator, model, samples, metrics=["boundary"], per_image=True)
    assert {"mIoU", "mBIoU", "image_mIoU"} <= images.keys()  # the scores of images come from the confusion matrix


def test_a_metric_of_your_own_is_measured_by_its_name(model, monkeypatch):
    class Wrong(SegmentationMetric):
        scores: ClassVar = {"wrong": "wrong"}

        def __init__(self, num_classes, ignore_index=255, **kwargs):
            super().__init__(num_classes, ignore_index, **kwargs)
            self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

        def update(self, preds, labels):
            labelled = labels != self.ignore_index
            self.counts = self.counts + torch.stack([(labelled & (preds != labels)).sum(), labelled.sum()])

        def compute(self):
            return {"wrong": self.counts[0].double() / self.counts[1]}

    monkeypatch.setitem(METRICS, "wrong", Wrong)
    samples = EvaluationSamples(HalfIgnored("val", size=(32, 48), length=3), HALF, HALF)
    results = evaluate(Accelerator(cpu=True), model, samples, metrics=["wrong", "iou"])
    torch.testing.assert_close(results["wrong"], 1 - results["aAcc"])
    assert list(scores(results)) == ["aAcc", "mAcc", "mIoU", "wrong"]


def test_metrics_that_are_not_there(model):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=1), HALF, HALF)
    known = f"known: {', '.join(METRICS)}"
    with pytest.raises(ValueError, match=f"no metric is called 'sharpness'; {known}"):
        evaluate(Accelerator(cpu=True), model, samples, metrics=["iou", "sharpness"])
    with pytest.raises(ValueError, match=f"metrics must name one metric or more; got none; {known}"):
        evaluate(Accelerator(cpu=True), model, samples, metrics=[])


def test_several_models_take_their_turns_at_every_image(model):
    samples, accelerator = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF), Accelerator(cpu=True)
    models, turns = [model, create_model("test_vit2", "linear", 12, pretrained=False)], []

    def in_turn(given):
        for place, each in enumerate(given):
            turns.append(place)
            yield each

    options = {"metrics": ["iou", "calibration"], "per_image": True}
    results = evaluate_each(accelerator, models, samples, in_turn=in_turn, **options)
    assert turns == [0, 1] * 3
    for each, of_each in zip(models, results, strict=True):
        for key, value in evaluate(accelerator, each, samples, **options).items():
            torch.testing.assert_close(of_each[key], value, rtol=0, atol=0, equal_nan=True)
    assert evaluate_each(accelerator, [], samples) == []


class HalfIgnored(Scenes):
    """The third image of nothing but ignored pixels, the first half of them."""

    def read(self, index):
        image, labels = super().read(index)
        labels[: {0: 16, 2: 32}.get(index, 0)] = self.ignore_index
        return image, labels


def test_more_metrics_are_of_the_same_predictions(model):
    samples = EvaluationSamples(HalfIgnored("val", size=(32, 48), length=4), HALF, HALF)
    protocol = InferenceProtocol(window=24, stride=16, scales=(0.5, 1.0), flip=True)
    accelerator = Accelerator(cpu=True)
    plain = evaluate(accelerator, model, samples, protocol)
    more = evaluate(accelerator, model, samples, protocol, metrics=("boundary", "object_sizes"), per_image=True)
    asked, iou, right = [ObjectSizeIoU(12), BoundaryIoU(12)], torch.full((4, 12), torch.nan, dtype=torch.float64), []
    model.eval()
    for i, (image, labels) in enumerate(samples):
        prediction = predict_labels(model, image, protocol, size=labels.shape)
        torch.testing.assert_close(predict(accelerator, model, image, labels.shape, protocol), prediction)
        for metric in asked:
            metric.update(prediction, labels)
        alone = SegmentationMetrics(12)
        alone.update(prediction, labels)
        right.append(alone.compute()["aAcc"])
        occurs = [k for k in range(12) if (labels == k).any()]
        iou[i, occurs] = alone.compute()["IoU"][occurs]
        if i == 3:
            break
    expected = {**plain, **asked[0].compute(), **asked[1].compute(), "image_IoU": iou, "image_mIoU": iou.nanmean(1)}
    expected |= {"image_aAcc": torch.stack(right), "image_pixels": torch.tensor([768, 1536, 0, 1536])}
    assert more.keys() == expected.keys()
    assert more["image_mIoU"].isnan().tolist() == [False, False, True, False]
    for name, value in expected.items():
        torch.testing.assert_close(more[name], value, rtol=1e-12, atol=0, equal_nan=True)


def test_scores_of_an_image_are_over_the_classes_of_its_truth():
    counts = torch.tensor([[[6, 0, 0], [8, 2, 0], [7, 0, 3]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]])
    scores = image_scores(counts)
    assert scores["image_IoU"][0].nan_to_num(-1).tolist() == [6 / 9, 0, -1]
    assert scores["image_mIoU"][0] == 3 / 9
    assert scores["image_aAcc"][0] == 0.6
    assert scores["image_pixels"].tolist() == [10, 0]
    assert all(scores[name][1].isnan().all() for name in ("image_IoU", "image_mIoU", "image_aAcc"))


def test_scores_of_images_come_in_the_order_of_the_data_set(model, monkeypatch):
    """What `gather` brings together of three processes, of which one has an image less."""
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=5), HALF, HALF)
    expected = evaluate(Accelerator(cpu=True), model, samples, per_image=True)
    sent, gathered = [], None
    for rank in (0, 1, 2, 0):
        accelerator = Accelerator(cpu=True)
        state = {"num_processes": 3, "process_index": rank, "is_main_process": rank == 0}
        for name, value in state.items():
            monkeypatch.setattr(Accelerator, name, value)
        gathered = torch.cat(sent[:3]) if len(sent) == 3 else None

        def gather(self, counts, gathered=gathered):
            sent.append(counts)
            return torch.zeros(3 * len(counts), *counts.shape[1:], dtype=counts.dtype) if gathered is None else gathered

        monkeypatch.setattr(Accelerator, "gather", gather)
        results = evaluate(accelerator, model, samples, per_image=True)
    assert [len(counts) for counts in sent] == [2] * 4
    for name in ("image_IoU", "image_mIoU", "image_aAcc", "image_pixels"):
        torch.testing.assert_close(results[name], expected[name], rtol=0, atol=0, equal_nan=True)


def test_small_images_may_be_enlarged(model):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=2), HALF, HALF)
    shrunk, enlarged = (
        evaluate(Accelerator(cpu=True), model, samples, InferenceProtocol(window=64, stride=64, small_images=way))
        for way in ("shrink_window", "enlarge")
    )
    model.eval()
    metrics = SegmentationMetrics(12)
    for image, labels in (samples[i] for i in range(2)):
        metrics.update(
            predict_labels(model, image, InferenceProtocol(window=64, small_images="enlarge"), size=(32, 48)), labels
        )
    torch.testing.assert_close(enlarged["IoU"], metrics.compute()["IoU"], equal_nan=True)
    assert not torch.equal(enlarged["IoU"].nan_to_num(), shrunk["IoU"].nan_to_num())
