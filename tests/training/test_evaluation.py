import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from segheads import SegmentationMetrics, create_model
from segheads.calibration import CalibrationError
from segheads.data import Scenes
from segheads.inference import predict_probabilities
from segheads.training import DEMO_RUN, MAY_DIFFER, EvaluationSamples, TrainingConfig, evaluate, run_training
from segheads.training.evaluation import predict_uncertainty

HALF = (0.5, 0.5, 0.5)


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
    results = evaluate(Accelerator(cpu=True), model, samples, window=32, stride=16, scales=(0.5, 1.0), flip=True)
    assert results["pixels"].sum() == 3 * 32 * 48


def test_limit(model):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=9), HALF, HALF)
    assert evaluate(Accelerator(cpu=True), model, samples, limit=2)["pixels"].sum() == 2 * 32 * 48


@pytest.mark.parametrize("protocol", [{}, {"window": 24, "stride": 16, "scales": (0.5, 1.0), "flip": True}])
def test_calibration_is_of_the_same_protocol_and_changes_no_score(model, protocol):
    samples = EvaluationSamples(Scenes("val", size=(32, 48), length=3), HALF, HALF, scale=(72, 48))
    plain = evaluate(Accelerator(cpu=True), model, samples, **protocol)
    results = evaluate(Accelerator(cpu=True), model, samples, **protocol, calibration=True)
    assert "ECE" not in plain
    for name, expected in plain.items():
        torch.testing.assert_close(results[name], expected, rtol=0, atol=0, equal_nan=True)
    error = CalibrationError()
    model.eval()
    for image, labels in (samples[i] for i in range(3)):
        confidence, prediction = predict_probabilities(model.forward, image, size=labels.shape, **protocol).max(0)
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
    results = evaluate(Accelerator(cpu=True), model, samples, calibration=True)
    assert results["bin_pixels"].sum() == results["pixels"].sum() == 16 * 48


@pytest.mark.parametrize("calibration", [False, True])
def test_a_run_measures_calibration_at_its_end_alone(tmp_path, capsys, calibration):
    small = {"scenes_size": 32, "scale": (32, 32), "crop_size": 32, "iterations": 2, "batch_size": 2}
    seldom = {"tracker": "none", "pictures": 0, "evaluate_every": 1, "evaluate_images": 2, "threads": 1}
    model = {"backbone": "test_vit", "head": "linear", "loss_reduction": "valid", "power": 1.0}
    options = {**DEMO_RUN, **model, **small, **seldom, "calibration": calibration}

    def build(config, num_classes):
        return create_model(config.backbone, config.head, num_classes, **config.model_options())

    results = run_training(TrainingConfig(**options, output=tmp_path), build)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "mIoU" in record]
    assert len(evaluations) > 1
    assert ["ECE" in record for record in evaluations] == [False] * (len(evaluations) - 1) + [calibration]
    written = json.loads((tmp_path / "results.json").read_text())
    assert ("ECE" in results) == ("ECE" in written) == ("bins" in written) == calibration
    assert (tmp_path / "reliability.png").is_file() == calibration
    assert ("ECE 0." in capsys.readouterr().out) == calibration
    assert "calibration" in MAY_DIFFER  # a resumed run may turn it on


def test_uncertainty_of_an_image_comes_at_its_labels_size():
    torch.manual_seed(0)
    model = create_model("test_vit", "senformer", 5, pretrained=False, pyramid_kwargs={"out_channels": 16}).eval()
    image, accelerator = torch.randn(3, 40, 50), Accelerator(cpu=True)
    _, expected = model.predict(image[None], return_uncertainty=True)
    for maps, whole in zip(predict_uncertainty(accelerator, model, image, (40, 50)), expected, strict=True):
        torch.testing.assert_close(maps, whole[0])
    assert {maps.shape for maps in predict_uncertainty(accelerator, model, image, (80, 99))} == {(80, 99)}
