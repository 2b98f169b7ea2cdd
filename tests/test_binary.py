"""One class against its background: one logit for each pixel, labels 0 and 1."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from segheads import SegmentationModel, create_model
from segheads.classes import Classes
from segheads.data import DataConfig, open_dataset
from segheads.errors import OptionError
from segheads.functional.binary import probabilities, probabilities_
from segheads.functional.uncertainty import ensemble_uncertainty
from segheads.heads import find_head
from segheads.inference import (
    InferenceProtocol,
    predict_labels,
    predict_probabilities,
    predict_uncertainty,
    predict_with_confidence,
)
from segheads.losses import create_loss
from segheads.merges import MERGES
from segheads.plan import ModelPlan
from segheads.predictor import Prediction, Predictor
from segheads.training.setup import check_one_class


def binary_model(head="linear", **options):
    torch.manual_seed(0)
    model = create_model("test_vit", head, 1, pretrained=False, loss="bce", **options).eval()
    for name, parameter in model.named_parameters():
        if "classifier" in name or "embeddings" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("weight", [None, [0.5, 3.0]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_is_pytorchs_of_the_upsampled_logits(reduction, weight, label_smoothing):
    torch.manual_seed(0)
    ours = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    labels = torch.tensor([0, 1, 255])[torch.randint(0, 3, (2, 13, 17))]
    options = {"weight": weight, "label_smoothing": label_smoothing}
    loss = create_loss("bce", 1, reduction=reduction, **options)(ours, labels)

    valid, target = labels != 255, (labels == 1).double()
    target = target * (1 - label_smoothing) + label_smoothing / 2
    own = torch.tensor(weight or [1.0, 1.0], dtype=torch.float64)
    scores = F.interpolate(plain, (13, 17), mode="bilinear")[:, 0]
    if label_smoothing and weight:  # each share of the target has its own class' weight
        pixels = -(own[1] * target * F.logsigmoid(scores) + own[0] * (1 - target) * F.logsigmoid(-scores))
        pixels = torch.where(labels == 1, (own[1] * (1 - label_smoothing)) * -F.logsigmoid(scores), 0) + torch.where(
            labels == 0, (own[0] * (1 - label_smoothing)) * -F.logsigmoid(-scores), 0
        )
        pixels = pixels - label_smoothing / 2 * (own[1] * F.logsigmoid(scores) + own[0] * F.logsigmoid(-scores))
    else:
        of_labels = own[(labels == 1).long()]
        pixels = F.binary_cross_entropy_with_logits(scores, target, weight=of_labels, reduction="none")
    divisor = labels.numel() if reduction == "all" else (own[(labels == 1).long()] * valid).sum()
    expected = (pixels * valid).sum() / divisor
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_losses_refuse_the_other_number_of_classes():
    with pytest.raises(ValueError, match="num_classes 1 leaves nothing to learn.* or loss 'bce'"):
        create_loss("ce", 1)
    with pytest.raises(ValueError, match="num_classes must be 1; got 5: take loss 'ce'"):
        create_loss("bce", 5)
    with pytest.raises(ValueError, match="ignore_index 1 is one of the 2 classes"):
        create_loss("bce", 1, ignore_index=1)
    with pytest.raises(ValueError, match="one value for each of 2 classes; got \\[1.0\\]"):
        create_loss("bce", 1, weight=[1.0])
    with pytest.raises(ValueError, match=r"logits \(B, 1, h, w\) of one class; got \(1, 2, 2, 2\)"):
        create_loss("bce", 1)(torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9])
@pytest.mark.parametrize(
    "views",
    [{}, {"window": 24, "stride": 16}, {"scales": (0.75, 1.0), "flip": True}],
    ids=["whole", "windows", "views"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["model", "callable"])
def test_labels_are_probabilities_above_the_threshold(threshold, views, plain):
    torch.manual_seed(1)
    model, image = binary_model(), torch.randn(1, 3, 40, 50)
    protocol = InferenceProtocol(threshold=threshold, **views)
    called = (lambda x: model(x)) if plain else model
    with torch.no_grad():
        probabilities = predict_probabilities(called, image, protocol)
        assert probabilities.shape == (1, 40, 50)
        if not views:
            torch.testing.assert_close(probabilities, model(image).sigmoid()[0])
        labels, confidence = predict_with_confidence(called, image, protocol)
    expected = (probabilities[0] > threshold).long()
    clear = (probabilities[0] - threshold).abs() > 1e-5
    assert torch.equal(labels[clear], expected[clear])
    assert torch.equal(predict_labels(called, image, protocol), labels)
    torch.testing.assert_close(confidence, torch.where(labels == 1, probabilities[0], 1 - probabilities[0]))
    if not views:
        model.protocol = protocol
        assert torch.equal(model.predict(image)[0][clear], expected[clear])
        assert 0 < expected.float().mean() < 1 or threshold != 0.5


def test_the_pair_of_a_mirror_turns_one_logit_round():
    image = torch.randn(1, 3, 8, 8)
    one = predict_probabilities(lambda x: x[:, :1], image, InferenceProtocol(flip=True), flip_pairs=((0, 1),))
    torch.testing.assert_close(one, (image[0, :1].sigmoid() + (-image[0, :1]).sigmoid()) / 2)


def test_threshold_of_several_classes_is_refused():
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 1"):
        InferenceProtocol(threshold=1.0)
    with pytest.raises(ValueError, match=r"this one has 3, .* got threshold 0.7"):
        predict_labels(lambda x: x, torch.rand(3, 4, 4), InferenceProtocol(threshold=0.7))


@pytest.mark.parametrize("merge", list(MERGES))
def test_merges_of_senformer_are_those_of_background_and_class(merge):
    torch.manual_seed(0)
    head = find_head("senformer")([8, 8], 1, learner="linear", merge=merge).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    merged, *learners = head.predictions([torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)])
    function = head.learned_merge or MERGES[merge]
    two = function([torch.cat([torch.zeros_like(x), x], 1) for x in learners])
    torch.testing.assert_close(merged.sigmoid(), two.exp()[:, 1:])
    if merge == "average":
        torch.testing.assert_close(merged.sigmoid(), sum(x.sigmoid() for x in learners) / 2)
    uncertainty = ensemble_uncertainty(merged, learners)
    p = two.exp()
    torch.testing.assert_close(uncertainty.entropy, -(p * p.log()).sum(1))
    assert uncertainty.mutual_information.max() > 0


def test_uncertainty_of_a_model():
    torch.manual_seed(0)
    model = binary_model("senformer", pyramid_kwargs={"out_channels": 16}, head_kwargs={"learner": "linear"})
    image = torch.randn(1, 3, 32, 32)
    labels, maps = model.predict(image, return_uncertainty=True)
    assert set(labels.unique().tolist()) <= {0, 1}
    assert 0 < maps.entropy.max() <= math.log(2) + 1e-6
    torch.testing.assert_close(predict_uncertainty(model, image).entropy, maps.entropy[0])


def test_saved_model_keeps_classes_and_threshold(tmp_path):
    model = binary_model()
    model.classes, model.protocol = Classes.binary("building"), InferenceProtocol(threshold=0.2)
    model.save_pretrained(tmp_path)
    loaded = SegmentationModel.from_pretrained(tmp_path)
    assert (loaded.num_classes, loaded.num_labels, loaded.classes) == (1, 2, model.classes)
    assert loaded.protocol.threshold == 0.2
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    prediction = Predictor.from_pretrained(tmp_path)(image)
    assert torch.equal(prediction.labels, Predictor(model)(image).labels)
    assert set(prediction.names) <= {"background", "building"}
    five = SegmentationModel.from_pretrained(tmp_path, num_classes=5)
    assert (five.num_classes, five.plan.loss) == (5, "ce")
    five.save_pretrained(tmp_path / "five")
    assert SegmentationModel.from_pretrained(tmp_path / "five", num_classes=1).plan.loss == "bce"


def test_config_json_of_one_class_says_the_loss(tmp_path):
    binary_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model"]["num_classes"], saved["model"]["loss"]) == (1, "bce")
    with pytest.raises(ValueError, match="ignore_index 1 is one of the 2 classes"):
        ModelPlan(backbone="test_vit", head="linear", num_classes=1, loss="bce", ignore_index=1)


def test_overlay_leaves_the_background_unpainted():
    image = Image.fromarray(np.full((2, 2, 3), 100, np.uint8))
    overlay = Prediction(image, torch.tensor([[0, 1], [0, 0]]), Classes.binary("building", (200, 0, 0))).overlay()
    assert (overlay.getpixel((0, 0)), overlay.getpixel((1, 0))) == ((100, 100, 100), (150, 50, 50))


@pytest.mark.parametrize(("stored", "options"), [(1, {}), (255, {"label_values": (0, 255)})])
def test_folder_of_one_class(tmp_path, stored, options):
    for part, value in (("images", 3), ("labels", stored)):
        (tmp_path / part / "val").mkdir(parents=True)
        Image.fromarray(np.array([[0, value]], np.uint8)).save(tmp_path / part / "val" / "a.png")
    config = DataConfig(dataset="folder", data_root=tmp_path, class_names=("building",), **options)
    dataset = open_dataset(config, "val")
    assert dataset.class_names == ("background", "building")
    assert dataset.classes.has_background
    assert dataset.read(0)[1].tolist() == [[0, 1]]
    with pytest.raises(OptionError, match="reduce_zero_label ignores 0, which is the background"):
        open_dataset(DataConfig(dataset="folder", data_root=tmp_path, num_classes=1, reduce_zero_label=True), "val")


def test_one_class_needs_the_sigmoid():
    data = DataConfig(dataset="folder", class_names=("building",))
    of = {loss: SimpleNamespace(data=data, model=SimpleNamespace(loss=loss)) for loss in ("ce", "bce", "typo")}
    with pytest.raises(
        OptionError, match="class_names building is one class.*--loss bce.*--class-names background buil"
    ):
        check_one_class(of["ce"])
    with pytest.raises(OptionError, match="no loss is called 'typo'"):
        check_one_class(of["typo"])
    check_one_class(of["bce"])


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_probabilities_in_the_memory_of_scores(num_classes):
    scores = torch.tensor([1.0, 50, 1000]).view(3, 1, 1) * torch.randn(3, num_classes, 4)
    expected, found = probabilities(scores), probabilities_(scores)
    assert found.data_ptr() == scores.data_ptr()
    torch.testing.assert_close(found, expected)
