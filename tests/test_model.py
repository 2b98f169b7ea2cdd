import json

import pytest
import torch
import torch.nn.functional as F
from parity import assert_best_class
from torch import nn

from segheads import LinearHead, MeanShiftHead, SegmentationModel, TimmBackbone, create_model
from segheads.classes import Classes
from segheads.functional import upsample
from segheads.inference import (
    InferenceProtocol,
    predict_labels,
    predict_probabilities,
    predict_with_confidence,
    sliding_window_logits,
)
from segheads.plan import ModelPlan
from segheads.pyramids import Pyramid


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("test_vit", "mean_shift", 5, pretrained=False).eval()


@pytest.mark.parametrize("size", [(64, 96), (50, 75), (16, 16), (1, 1), (7, 129)])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_any_size(backbone, size):
    model = create_model(backbone, "linear", 5, pretrained=False).eval()
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5, *size)
    assert model.predict(images).shape == (2, *size)
    assert model(images, torch.zeros(2, *size, dtype=torch.long)).ndim == 0


def test_padding_is_upsampled_and_cropped_as_in_segmenter(model):
    images = torch.randn(1, 3, 50, 75)
    padded = model(F.pad(images, (0, 5, 0, 14)))
    torch.testing.assert_close(model(images), padded[:, :, :50, :75])


def test_stretched_logits_reach_over_the_image(model):
    images = torch.randn(1, 3, 50, 75)
    model.stretch_logits = True
    expected = F.interpolate(model.logits(images), size=(50, 75), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), expected)
    assert_best_class(model.predict(images), expected)


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("reduction", ["valid", "all"])
def test_loss_is_that_of_the_logits(model, stretch, reduction):
    images, labels = torch.randn(2, 3, 50, 75), torch.randint(0, 5, (2, 50, 75))
    labels[:, :20] = 255
    model.stretch_logits, model.loss_reduction = stretch, reduction
    expected = F.cross_entropy(model(images), labels, ignore_index=255, reduction="sum")
    expected = expected / (labels.numel() if reduction == "all" else (labels != 255).sum())
    torch.testing.assert_close(model(images, labels), expected)


def test_labels_are_the_argmax_of_logits():
    torch.manual_seed(0)
    model = create_model("test_vit", "linear", 5, pretrained=False).eval()
    torch.nn.init.normal_(model.head.classifier.weight)
    images = torch.randn(2, 3, 50, 75)
    assert len(model.predict(images).unique()) == 5
    assert_best_class(model.predict(images), model(images))


def test_predict_is_deterministic_and_restores_the_mode():
    model = create_model("test_vit", "mask_transformer", 5, pretrained=False, head_kwargs={"drop_path_rate": 0.9})
    images = torch.randn(8, 3, 32, 32)
    model.train()
    torch.testing.assert_close(model.predict(images), model.predict(images))
    assert model.training
    assert model.head.training


def test_predict_leaves_frozen_parts_frozen():
    model = create_model("test_resnet", "linear", 5, pretrained=False)
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    model.predict(torch.randn(1, 3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


class TwoPredictions(LinearHead):
    """An ensemble's contract: the final logits and two more."""

    def predictions(self, x):
        return [self(x), 2 * self(x), 3 * self(x)]


def test_further_predictions_are_averaged():
    backbone = TimmBackbone("test_vit", pretrained=False)
    model = SegmentationModel(backbone, TwoPredictions(backbone.channels[-1], 5)).eval()
    images, labels = torch.randn(1, 3, 32, 32), torch.randint(0, 5, (1, 32, 32))
    first, second, third = (F.cross_entropy(factor * model(images), labels) for factor in (1, 2, 3))
    torch.testing.assert_close(model(images, labels), first + (second + third) / 2)


class Doubling(Pyramid):
    """A pyramid of one's own."""

    def output_strides(self, strides):
        return list(strides)

    def forward(self, maps):
        return [2 * x for x in maps]


def test_a_pyramid_hands_over_its_finest_level():
    backbone = TimmBackbone("test_convnext", pretrained=False)
    pyramid = Doubling(backbone.channels, backbone.channels)
    model = SegmentationModel(backbone, LinearHead(24, 5), pyramid).eval()
    images = torch.randn(1, 3, 37, 51)
    assert model.logits(images).shape == (1, 5, 10, 13)
    torch.testing.assert_close(model.logits(images), model.head(2 * backbone(images)[0]))
    assert model(images).shape == (1, 5, 37, 51)


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model(torch.randn(1, 3, 40, 40), torch.randint(0, 5, (1, 40, 40))).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_compiles_without_a_graph_break(model):
    images, labels = torch.randn(1, 3, 50, 75), torch.randint(0, 5, (1, 50, 75))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), model(images, labels))


def test_saved_and_loaded_with_what_was_changed(model, tmp_path):
    model.head.num_layers = 3
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    again = SegmentationModel.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 50, 75)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    assert isinstance(again.head, MeanShiftHead)
    assert again.head.num_layers == 3
    assert not again.training
    assert again.data_config == model.data_config


def test_models_saved_before_there_were_pyramids_are_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("pyramid", "pyramid_kwargs", "auxiliary_weight", "auxiliary_kwargs"):
        del config["model"][name]
    config["settings"] = {"num_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SegmentationModel.from_pretrained(tmp_path).head.num_layers == 2


def test_weights_of_another_head_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["head"], config["settings"] = "linear", {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model.safetensors does not fit the model: head.classifier.weight is missing"
    ):
        SegmentationModel.from_pretrained(tmp_path)
    config["model"] |= {"head": "mean_shift", "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"head.decoder.classifier.weight is \(5, 64\) instead of \(7, 64\)"):
        SegmentationModel.from_pretrained(tmp_path)


def test_folders_without_a_model_are_named(model, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; expected a folder that save_pretrained wrote"):
        SegmentationModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all' is no local folder"):
        SegmentationModel.from_pretrained(tmp_path / "nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="'somebody/model' is no local folder, and could not be had"):
        SegmentationModel.from_pretrained("somebody/model", local_files_only=True)


def test_models_that_cannot_be_rebuilt_are_not_saved(tmp_path):
    backbone = TimmBackbone("test_vit", pretrained=False)
    with pytest.raises(ValueError, match="save_pretrained needs a model from create_model"):
        SegmentationModel(backbone, LinearHead(64, 5)).save_pretrained(tmp_path)
    model = create_model("test_vit", "mean_shift", 5, pretrained=False, head_kwargs={"decoder": LinearHead})
    with pytest.raises(ValueError, match="must be JSON values to be saved"):
        model.save_pretrained(tmp_path)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"floating-point and normalised \(data_config\); got torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*\(1, 4, 32, 32\)"):
        model(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"labels of images \(1, 3, 32, 32\) must be \(B, H, W\); got \(1, 16, 16\)"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="LinearHead was built for 100 channels.*TimmBackbone hands to it has 64"):
        SegmentationModel(TimmBackbone("test_vit", pretrained=False), LinearHead(100, 5))
    with pytest.raises(ValueError, match="num_classes must be 1 or more; got 0"):
        create_model("test_vit", "linear", 0, pretrained=False)
    with pytest.raises(ValueError, match="no head is called 'lienar'"):
        create_model("test_vit", "lienar", 5)


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    model = create_model("test_resnet", "senformer", 5, pretrained=False, pyramid_kwargs={"out_channels": 16}).eval()
    for learner in model.head.learners:
        torch.nn.init.normal_(learner.class_embeddings)
    return model


def test_an_ensembles_loss_is_the_merged_plus_the_mean_of_the_learners(ensemble):
    images, labels = torch.randn(1, 3, 50, 75), torch.randint(0, 5, (1, 50, 75))
    merged, *learners = ensemble.head.predictions(ensemble.pyramid(ensemble.backbone(images)))
    losses = []
    for logits in (merged, *learners):
        scores = F.interpolate(logits, size=(13 * 4, 19 * 4), mode="bilinear", align_corners=False)[:, :, :50, :75]
        losses.append(F.cross_entropy(scores, labels))
    torch.testing.assert_close(ensemble(images, labels), losses[0] + sum(losses[1:]) / 4)


@pytest.mark.parametrize("stretch", [False, True])
def test_the_auxiliary_head_reads_the_third_stage(stretch):
    model = create_model("test_resnet", "uper", 5, pretrained=False, auxiliary_weight=0.3, stretch_logits=stretch)
    model.eval()
    images, labels = torch.randn(2, 3, 50, 75), torch.randint(0, 5, (2, 50, 75))
    features = model.backbone(images)
    assert features[-2].shape[2:] == (4, 5)
    logits = model.auxiliary_head(features[-2])
    size = (50, 75) if stretch else (64, 80)
    scores = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[:, :, :50, :75]
    expected = F.cross_entropy(model(images), labels) + 0.3 * F.cross_entropy(scores, labels)
    torch.testing.assert_close(model(images, labels), expected)


class Wrapped(nn.Module):
    """As DDP does, whose logits are upsampled."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def test_the_auxiliary_loss_may_be_over_all_pixels(tmp_path):
    options = {"auxiliary_weight": 0.5, "auxiliary_kwargs": {"drop_rate": 0.0, "channels": 8}}
    model = create_model("test_resnet", "linear", 3, pretrained=False, auxiliary_reduction="all", **options).eval()
    images, labels = torch.randn(1, 3, 32, 32), torch.randint(3, (1, 32, 32))
    labels[:, :8] = 255
    scores = model.auxiliary_head(model.backbone(images)[-2])
    own = F.cross_entropy(F.interpolate(scores, (32, 32), mode="bilinear"), labels, ignore_index=255)
    expected = F.cross_entropy(model(images), labels, ignore_index=255) + 0.5 * 0.75 * own
    torch.testing.assert_close(model(images, labels), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(SegmentationModel.from_pretrained(tmp_path)(images, labels), expected)
    model.ignore_index = 254
    assert model.auxiliary_criterion.ignore_index == 254


@pytest.mark.parametrize("merge", ["average", "product", "majority_vote", "explicit_attention"])
def test_an_ensembles_probabilities_are_what_is_upsampled(merge):
    """As the published code does in its tests; a learned merge blends logits, of which the same is true."""
    torch.manual_seed(0)
    kwargs = {"head_kwargs": {"merge": merge}, "pyramid_kwargs": {"out_channels": 16}, "backbone_kwargs": {}}
    model = create_model("test_resnet", "senformer", 5, pretrained=False, **kwargs).eval()
    for parameter in model.parameters():  # logits that differ from cell to cell
        parameter.data += 0.3 * torch.randn_like(parameter)
    for learner in model.head.learners:
        learner.norm.weight.data *= 8
    images, size = torch.randn(1, 3, 64, 96), (64, 96)
    with torch.no_grad():
        grid, found = model.logits(images), model(images)
        options = {"mode": "bilinear", "align_corners": False}
        if merge == "explicit_attention":
            expected, other = F.interpolate(grid, size, **options), F.interpolate(grid.exp(), size, **options)
        else:
            expected, other = F.interpolate(grid.exp(), size, **options), F.interpolate(grid, size, **options)
    assert_best_class(model.predict(images), expected)
    assert_best_class(found.argmax(1), expected)
    if merge != "explicit_attention":
        assert (expected.argmax(1) != other.argmax(1)).any()  # else it would show nothing
    probabilities = expected.softmax(1) if merge == "explicit_attention" else expected
    torch.testing.assert_close(found.softmax(1), probabilities)
    torch.testing.assert_close(predict_probabilities(model, images), probabilities[0])
    labels, confidence = predict_with_confidence(model, images)
    assert torch.equal(labels, model.predict(images)[0])
    torch.testing.assert_close(confidence, probabilities[0].amax(0))
    for protocol in (InferenceProtocol(window=32, stride=16), InferenceProtocol(scales=(0.5, 1.0), flip=True)):
        views = predict_probabilities(model, images, protocol)
        torch.testing.assert_close(views.sum(0), torch.ones(size))
        torch.testing.assert_close(predict_probabilities(Wrapped(model), images, protocol), views)
        assert_best_class(predict_labels(model, images, protocol)[None], views[None])
    windows = sliding_window_logits(model, images, window=32, stride=16)
    expected = predict_probabilities(model, images, InferenceProtocol(window=32, stride=16))
    torch.testing.assert_close(windows.softmax(1)[0], expected)


def test_uncertainty_comes_with_the_labels(ensemble):
    images = torch.randn(2, 3, 50, 75)
    labels, uncertainty = ensemble.predict(images, return_uncertainty=True)
    torch.testing.assert_close(labels, ensemble.predict(images))
    merged = ensemble.head(ensemble.pyramid(ensemble.backbone(images)))
    expected = -(merged.exp() * merged).sum(1, keepdim=True)
    expected = F.interpolate(expected, size=(13 * 4, 19 * 4), mode="bilinear", align_corners=False)[:, 0, :50, :75]
    torch.testing.assert_close(uncertainty.entropy, expected)
    assert uncertainty.mutual_information.shape == uncertainty.disagreement.shape == (2, 50, 75)
    assert (uncertainty.mutual_information >= 0).all()
    assert uncertainty.disagreement.max() > 0
    assert not uncertainty.entropy.requires_grad


def test_predictions_are_the_heads_on_its_grid(ensemble):
    images = torch.randn(2, 3, 50, 75)
    expected, covered = ensemble.head.predictions(ensemble.pyramid(ensemble.backbone(images))), (52, 76)
    predictions, size = ensemble.predictions(images)
    assert size == ensemble.low_resolution(images)[1] == covered
    assert len(predictions) == len(expected) > 1
    torch.testing.assert_close(predictions, expected)
    torch.testing.assert_close(predictions[0], ensemble.logits(images))
    ensemble.stretch_logits = True
    assert ensemble.predictions(images)[1] == (50, 75)


def test_uncertainty_needs_an_ensemble(model):
    with pytest.raises(ValueError, match="needs a head with learners, such as senformer; got MeanShiftHead"):
        model.predict(torch.randn(1, 3, 32, 32), return_uncertainty=True)


def test_an_ensemble_is_saved_with_what_was_changed_on_it_and_its_learners(tmp_path):
    model = create_model(
        "test_vit",
        "senformer",
        5,
        pretrained=False,
        pyramid_kwargs={"out_channels": 16},
        head_kwargs={"learner": "mean_shift", "shift": {"num_layers": 1}, "share": "decoder"},
    ).eval()
    model.head.merge, model.head.levels, model.head.mean_shift_layers = "product", [0, 2], 2
    model.head.learners[0].num_layers = 3
    images = torch.randn(1, 3, 40, 50)
    model.save_pretrained(tmp_path)
    again = SegmentationModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    assert (again.head.merge, again.head.levels, again.head.mean_shift_layers) == ("product", [0, 2], 2)
    assert again.head.learners[0].num_layers == 3


@pytest.mark.parametrize("stretch_logits", [False, True])
def test_low_resolution_logits_are_those_that_forward_upsamples(stretch_logits):
    model = create_model("test_vit", "linear", 5, pretrained=False, stretch_logits=stretch_logits).eval()
    images = torch.randn(2, 3, 40, 61)
    logits, size = model.low_resolution(images)
    assert size == ((40, 61) if stretch_logits else (48, 64))
    torch.testing.assert_close(upsample(logits, size)[:, :, :40, :61], model(images))


@pytest.mark.parametrize("head", ["linear", "mask_transformer", "senformer"])
def test_a_saved_body_takes_a_new_classifier(tmp_path, caplog, head):
    options = {"loss_kwargs": {"weight": [1.0, 2.0, 1.0, 1.0, 1.0]}, "auxiliary_weight": 0.4}
    model = create_model("test_resnet", head, 5, pretrained=False, **options).eval()
    model.classes = Classes.numbered(5)
    model.save_pretrained(tmp_path)
    other = SegmentationModel.from_pretrained(tmp_path, num_classes=3)
    new, before, after = other.weights_of_classes(), model.state_dict(), other.state_dict()
    assert other(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert other.classes is None
    assert other.plan.num_classes == 3
    assert before.keys() == after.keys()
    assert {key for key in before if before[key].shape != after[key].shape} == set(new)
    assert all(torch.equal(before[key], after[key]) for key in before if key not in new)
    assert f"{tmp_path} has 5 classes; new and random for 3: {', '.join(new)}" in caplog.text
    same = SegmentationModel.from_pretrained(tmp_path, num_classes=5)
    assert same.classes == model.classes
    assert all(torch.equal(value, before[key]) for key, value in same.state_dict().items())
    with pytest.raises(ValueError, match="num_classes must be 1 or more; got 0"):
        SegmentationModel.from_pretrained(tmp_path, num_classes=0)
    with pytest.raises(TypeError, match="num_clases"):
        SegmentationModel.from_pretrained(tmp_path, num_clases=3)


def test_a_stride_that_no_float_holds_covers_the_image():
    model = create_model("test_convnext", "smp:fpn", 3, pretrained=False, pyramid=None, head_kwargs={"upsampling": 3})
    assert model.pixels_per_cell == pytest.approx(4 / 3)
    images = torch.randn(1, 3, 64, 96)
    assert model(images).shape[2:] == model.predict(images).shape[1:] == (64, 96)


def test_a_plan_keeps_its_values_when_the_caller_changes_their_dictionary():
    options = {"model_kwargs": {"depth": 1}}
    plan = ModelPlan(backbone="test_vit", head="linear", num_classes=3, backbone_kwargs=options)
    options["model_kwargs"]["depth"] = 2
    assert plan.backbone_kwargs == {"model_kwargs": {"depth": 1}}
