"""A frozen backbone, or its first stages: what moves, what is kept for gradients, what is dropped, what is saved."""

import copy
import json

import pytest
import torch
from runs import SMALL_RUN, build
from test_backbones import SHALLOW

from segheads import SegmentationModel, TimmBackbone, create_model
from segheads.errors import OptionError
from segheads.modules import start_training
from segheads.training import TrainingConfig, run_training
from segheads.training.config import MAY_DIFFER

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(2, 64, 64, dtype=torch.long)
SMALL = {
    **SMALL_RUN,
    "drop_path_rate": 0.5,
    "iterations": 4,
    "checkpoint_every": 2,
    "backbone": "test_resnet",
    "evaluate_images": 1,
}


def model_of(backbone, **options):
    torch.manual_seed(0)
    return create_model(backbone, "linear", 3, pretrained=False, **options)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_frozen_backbone_keeps_its_features_and_nothing_for_gradients(backbone):
    model = model_of(backbone, freeze_backbone=True, backbone_kwargs={"drop_path_rate": 0.5})
    before = copy.deepcopy(model.backbone.state_dict())
    maps = model.eval().backbone(IMAGES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model.predict(IMAGES)
        start_training(model)
        assert model.head.training
        assert not any(module.training for module in model.backbone.modules())
        model(IMAGES, LABELS).backward()
        optimizer.step()
    trained = model.train().backbone(IMAGES)
    assert all(x.grad_fn is None and torch.equal(x, y) for x, y in zip(trained, maps, strict=True))
    torch.testing.assert_close(model.backbone.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("backbone", "learns", "still"),
    [
        ("test_resnet", {"layer3", "layer4"}, {"conv1", "bn1", "layer1", "layer2"}),
        ("test_convnext", {"stages.2", "stages.3"}, {"stem", "stages.0", "stages.1"}),
        ("test_vit", {"blocks.2", "blocks.5", "norm"}, {"patch_embed", "pos_drop", "blocks.0", "blocks.1"}),
    ],
)
def test_the_first_stages_are_frozen_and_the_others_are_not(backbone, learns, still):
    model = model_of(backbone, freeze_stages=2, backbone_kwargs={"drop_path_rate": 0.5, "model_kwargs": {}})
    inner = model.train().backbone.model
    assert not any(p.requires_grad for n, p in inner.named_parameters() if n.startswith((*still, "pos_embed")))
    for part in learns:
        assert all(p.requires_grad for p in inner.get_submodule(part).parameters())
        assert all(x.training for x in inner.get_submodule(part).modules() if list(x.parameters()))
    for part in still:
        assert not any(module.training for module in inner.get_submodule(part).modules()), part
    statistics = {name: x.clone() for name, x in inner.named_buffers() if "running" in name}
    model(IMAGES, LABELS)
    moved = {
        name.split(".")[0]
        for name, x in inner.named_buffers()
        if name in statistics and not torch.equal(x, statistics[name])
    }
    assert moved == ({"layer3", "layer4"} if backbone == "test_resnet" else set())


def test_a_frozen_stem_drops_nothing():
    options = {"model_kwargs": {"pos_drop_rate": 0.5, "proj_drop_rate": 0.5}}
    model = model_of("test_vit", freeze_stages=1, backbone_kwargs=options).train()
    seen = []
    model.backbone.model.blocks[0].register_forward_hook(lambda *x: seen.append(x[2]))
    for _ in range(2):
        model(IMAGES)
    assert torch.equal(*seen)
    assert seen[0].grad_fn is None


@pytest.mark.parametrize("name", ["test_byobnet", "crossvit_tiny_240", "coat_tiny", "deit_tiny_distilled_patch16_224"])
def test_other_families_are_frozen_in_part(name):
    backbone = TimmBackbone(name, pretrained=False, model_kwargs={"depth": 2} if name in SHALLOW else None)
    learning = {n for n, p in backbone.named_parameters() if p.requires_grad}
    backbone.freeze(1)
    backbone.train()
    still = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert set() < still < learning
    for name, module in backbone.named_modules():
        if name != "model" and (
            parameters := [p for n, p in module.named_parameters(recurse=False) if f"{name}.{n}" in learning]
        ):
            assert module.training == any(p.requires_grad for p in parameters), name


@pytest.mark.parametrize("options", [{"freeze_backbone": True}, {"freeze_stages": 1}])
def test_a_saved_model_stays_frozen(tmp_path, options):
    model = model_of("test_resnet", **options)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"].items() >= options.items()
    loaded = SegmentationModel.from_pretrained(tmp_path).train()
    model.train()
    learning = [{n for n, p in x.named_parameters() if p.requires_grad} for x in (model, loaded)]
    training = [{n for n, x in y.named_modules() if x.training} for y in (model, loaded)]
    assert learning[0] == learning[1] != {n for n, _ in model.named_parameters()}
    assert training[0] == training[1] != {n for n, _ in model.named_modules()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_stages": 5}, "^freeze_stages must be at most 4, the number of stages of test_resnet; got 5$"),
        ({"freeze_stages": -1}, "^freeze_stages must be 0 or more.*; got -1$"),
        ({"freeze_stages": 1, "freeze_backbone": True}, "^freeze_stages must be .* got 1 with it$"),
    ],
)
def test_stages_that_cannot_be_frozen(own_run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        model_of("test_resnet", **options)
    with pytest.raises(OptionError, match=message):
        run_training(TrainingConfig.from_flat(**SMALL, output=tmp_path / "run", **options), build)
    assert not (tmp_path / "run").exists()


def test_the_bits_of_what_is_frozen_are_the_same_after_a_run_that_was_resumed(own_run, tmp_path):
    first = {}

    def look(config, num_classes):
        model = build(config, num_classes)
        first.setdefault("state", copy.deepcopy(model.state_dict()))
        return model

    values = {**SMALL, "freeze_stages": 2, "output": tmp_path}
    run_training(TrainingConfig.from_flat(**values), look)
    (tmp_path / "checkpoints" / "00000004").rename(tmp_path / "gone")
    run_training(TrainingConfig.from_flat(**values, resume=True), look)
    last = SegmentationModel.from_pretrained(tmp_path / "model").state_dict()
    same = {key for key, x in last.items() if torch.equal(x, first["state"][key])}
    assert {key for key in last if key.startswith(("backbone.model.conv1", "backbone.model.layer1"))} <= same
    assert "head.classifier.weight" not in same
    assert not {"freeze_backbone", "freeze_stages"} & MAY_DIFFER
    with pytest.raises(OptionError, match="freeze_stages was 2 and is 0"):
        run_training(TrainingConfig.from_flat(**{**SMALL, "output": tmp_path}, resume=True), build)
