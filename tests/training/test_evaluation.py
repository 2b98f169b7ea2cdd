import pytest
import torch
from accelerate import Accelerator

from segheads import SegmentationMetrics, create_model
from segheads.data import Scenes
from segheads.training import EvaluationSamples, evaluate

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
