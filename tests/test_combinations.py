"""Every head on every pyramid on a backbone of every kind: forward, a training step, saved and loaded."""

import copy

import pytest
import torch
from parity import assert_best_class

from segheads import HEADS, SegmentationModel, create_model
from segheads.pyramids import PYRAMIDS

TINY_SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
TINY_LEVIT = {"embed_dim": (32, 48, 64), "num_heads": (2, 2, 2), "depth": (1, 1, 1), "key_dim": 16}
BACKBONES = {
    "plain ViT": ("test_vit", {}),
    "CNN from stride 2": ("test_resnet", {}),
    "hierarchical transformer": ("swin_tiny_patch4_window7_224", {"img_size": 64, "model_kwargs": TINY_SWIN}),
    "three levels": ("levit_128s", {"img_size": 64, "model_kwargs": TINY_LEVIT}),
}
NAMES = [*HEADS, "smp:unet", "smp:segformer"]
NEEDS_SEVERAL_MAPS = {"uper", "sen_uper"}


def small_model(kind, head, pyramid, **options):
    name, backbone_kwargs = BACKBONES[kind]
    width = {"out_channels": 16} if pyramid in PYRAMIDS else None
    narrow = {"uper": {"channels": 8}, "sen_uper": {"channels": 8}, "fcn": {"channels": 8}}
    narrow["smp:segformer"] = {"decoder_segmentation_channels": 8}
    return create_model(
        name,
        head,
        5,
        pretrained=False,
        pyramid=pyramid,
        backbone_kwargs=copy.deepcopy(backbone_kwargs),
        pyramid_kwargs=width,
        head_kwargs=narrow.get(head),
        **options,
    )


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("pyramid", ["auto", *PYRAMIDS, None])
@pytest.mark.parametrize("head", NAMES)
def test_works(kind, pyramid, head, tmp_path):
    one_map = kind == "plain ViT" and pyramid not in ("auto", "simple")
    if one_map and head in NEEDS_SEVERAL_MAPS:
        with pytest.raises(ValueError, match=r"levels|maps"):
            small_model(kind, head, pyramid)
        return
    torch.manual_seed(0)
    model = small_model(kind, head, pyramid, auxiliary_weight=0.4 if pyramid == "auto" else 0.0)
    images, labels = torch.randn(2, 3, 60, 75), torch.randint(0, 5, (2, 60, 75))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(images, labels)
    loss.backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    optimizer.step()

    model.eval()
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 5, 60, 75)
    assert logits.isfinite().all()
    assert_best_class(model.predict(images), logits)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(SegmentationModel.from_pretrained(tmp_path)(images), logits)


def test_the_pyramid_is_chosen_to_fit():
    chosen = {
        (kind, head): type(small_model(kind, head, "auto").pyramid).__name__
        for kind in BACKBONES
        for head in ("linear", "senformer", "uper", "smp:unet")
    }
    several = {"linear": "FPN", "senformer": "FPNT", "uper": "NoneType", "smp:unet": "NoneType"}
    one = {"linear": "NoneType", "senformer": "SimplePyramid", "uper": "SimplePyramid", "smp:unet": "SimplePyramid"}
    for (kind, head), name in chosen.items():
        assert name == (one if kind == "plain ViT" else several)[head]


def test_the_choice_shows():
    shown = repr(small_model("CNN from stride 2", "senformer", "auto"))
    assert "test_resnet (strides 4, 8, 16, 32) -> FPNT (strides 4, 8, 16, 32) -> SenFormerHead on all maps" in shown
    assert "(logits at stride 4), pyramid chosen by create_model" in shown
    assert "chosen by" not in repr(small_model("CNN from stride 2", "senformer", "fpn"))
    shown = repr(small_model("plain ViT", "senformer", "auto"))
    assert "test_vit (strides 16) -> SimplePyramid (strides 4, 8, 16, 32) -> SenFormerHead" in shown
    assert "test_vit (strides 16) -> LinearHead on the last map" in repr(small_model("plain ViT", "linear", "auto"))
    assert "(strides 4) -> LinearHead on the finest map" in repr(small_model("CNN from stride 2", "linear", "auto"))
    assert "levit_128s (strides 16, 32, 64) -> FPNT" in repr(small_model("three levels", "senformer", "auto"))


def test_levels_that_the_user_names_are_kept():
    model = create_model("test_vit", "senformer", 5, pretrained=False, backbone_kwargs={"levels": 3})
    assert type(model.pyramid).__name__ == "FPNT"  # three blocks of the ViT, all of stride 16
    assert model.predict(torch.randn(1, 3, 40, 50)).shape == (1, 40, 50)
    model = create_model("test_resnet", "senformer", 5, pretrained=False, backbone_kwargs={"levels": 2})
    assert model.backbone.strides == [16, 32]
    assert len(model.head.learners) == 2


def test_parameters_behind_no_learner_are_frozen():
    model = create_model(
        "test_resnet",
        "senformer",
        5,
        pretrained=False,
        pyramid="fpn",
        pyramid_kwargs={"out_channels": 16},
        head_kwargs={"levels": [0, 2]},
    )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if "pyramid" in name} == {
        f"pyramid.outputs.{i}.{kind}" for i in (1, 3) for kind in ("weight", "bias")
    }


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="no pyramid is called 'fpnn'; known: fpn, fpnt, simple"):
        small_model("plain ViT", "linear", "fpnn")
    with pytest.raises(ValueError, match=r"pyramid_kwargs \{'out_channels': 8\} need a pyramid; test_vit with linear"):
        create_model("test_vit", "linear", 5, pretrained=False, pyramid_kwargs={"out_channels": 8})
    with pytest.raises(ValueError, match="auxiliary_weight must be 0 or more; got -1"):
        small_model("plain ViT", "linear", None, auxiliary_weight=-1)
    with pytest.raises(ValueError, match="merge 'product' needs two learners or more; got 1"):
        create_model("test_vit", "senformer", 5, pretrained=False, pyramid=None, head_kwargs={"merge": "product"})
