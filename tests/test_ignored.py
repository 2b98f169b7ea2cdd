"""One meaning of "ignored": no class, the same everywhere; and more classes than 8 bit from files to scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segheads import LinearHead, SegmentationModel, TimmBackbone, create_model
from segheads.analysis import compare_labels
from segheads.classes import ignored_label
from segheads.data import (
    FolderDataset,
    IterationSampler,
    LabelMap,
    RandomScaleCrop,
    Scenes,
    SubsetDataset,
    TrainingSamples,
    collate_samples,
)
from segheads.functional import upsample_cross_entropy
from segheads.functional.uncertainty import boundary_ratio
from segheads.losses import LOSSES, create_loss
from segheads.metrics import METRICS
from segheads.plan import ModelPlan
from segheads.saving import read_model

K = 300


def labels(*shape, dtype=torch.int64):
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("num_classes", "ignore_index"), [(300, 255), (847, 255), (5, 3), (5, 0), (5, 4)])
@pytest.mark.parametrize(
    "build",
    [
        lambda k, i: create_model("test_vit", "linear", k, pretrained=False, ignore_index=i),
        lambda k, i: ModelPlan(backbone="test_vit", head="linear", num_classes=k, ignore_index=i),
        lambda k, i: upsample_cross_entropy(torch.zeros(1, k, 2, 2), labels(1, 4, 4), ignore_index=i),
        lambda k, i: compare_labels(*(labels(4, 4) for _ in range(2)), k, labels(4, 4), ignore_index=i),
        *(lambda k, i, name=name: create_loss(name, k, ignore_index=i) for name in LOSSES if name != "bce"),
        *(lambda k, i, kind=kind: kind(k, ignore_index=i) for kind in METRICS.values()),
    ],
)
def test_an_ignored_class_is_refused(build, num_classes, ignore_index):
    message = rf"ignore_index {ignore_index} is one of the {num_classes} classes 0 to {num_classes - 1}, .*=-1, or "
    with pytest.raises(ValueError, match=message + f"{num_classes} or more$"):
        build(num_classes, ignore_index)
    build(num_classes, -1)
    build(num_classes, num_classes)


def test_an_ignored_class_is_refused_later_too():
    model = create_model("test_vit", "linear", 5, pretrained=False)
    model.ignore_index = 5
    with pytest.raises(ValueError, match="ignore_index 4 is one of the 5 classes"):
        model.ignore_index = 4
    assert model.criterion.ignore_index == 5


def test_a_model_of_an_older_version_that_ignored_a_class_loads():
    for num_classes, kept in ((K, -1), (5, 255)):
        plan = read_model({"backbone": "test_vit", "head": "linear", "num_classes": num_classes, "ignore_index": 255})
        assert plan.ignore_index == kept


@pytest.mark.parametrize(
    "build",
    [
        lambda: create_model("test_vit", "linear", 1, pretrained=False),
        lambda: ModelPlan(backbone="test_vit", head="linear", num_classes=1),
        lambda: SegmentationModel(TimmBackbone("test_vit", pretrained=False), LinearHead(64, 1)),
        lambda: create_loss("ce", 1),
    ],
)
def test_one_class_is_refused(build):
    with pytest.raises(ValueError, match="num_classes 1 leaves nothing to learn: .* give two classes"):
        build()


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_padding_is_ignored_whatever_the_type_of_labels(name, dtype):
    """uint8 has no -1, and 255 there is no -1 either."""
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    K = 1 if name == "bce" else 3
    criterion, logits = create_loss(name, K, ignore_index=-1), logits[:, :K]
    by_hand = F.pad(labels(2, 29, 31) % max(K, 2), (0, 1, 0, 3), value=-1)
    expected = criterion(logits, by_hand)
    torch.testing.assert_close(criterion(logits, labels(2, 29, 31, dtype=dtype) % max(K, 2), (32, 32)), expected)


def test_255_in_8_bit_is_not_minus_1():
    logits, wrong = torch.zeros(1, 3, 4, 4), torch.full((1, 16, 16), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"labels must be classes 0 to 2 or -1 \(ignored\); got 255"):
        create_loss("ce", 3, ignore_index=-1)(logits, wrong)
    maps = labels(4, 4, dtype=torch.uint8)
    maps[0] = 255
    with pytest.raises(ValueError, match="truth must hold labels 0 to 2; got 255"):
        compare_labels(labels(4, 4), labels(4, 4), 3, maps, ignore_index=-1)
    for kind in METRICS.values():
        metric = kind(3, ignore_index=-1)
        if not kind.needs_confidence:
            with pytest.raises(ValueError, match="255"):
                metric.update(labels(1, 4, 4), maps[None])


def test_boundary_ratio_of_8_bit_labels_and_minus_1():
    maps = torch.tensor([[0, 0, 0, 255, 255, 255]], dtype=torch.uint8)
    doubt = torch.tensor([[0.1, 0.1, 0.4, 0.4, 0.1, 0.1]])
    assert boundary_ratio(doubt, maps, radius=1, ignore_index=-1) == pytest.approx(4)


# ---------------------------------------------------------------- more than 255 classes


@pytest.fixture
def many(tmp_path):
    """A folder of 300 classes in 16 bit, of which 255 and 299 occur, and 65535 for no class."""
    values = np.full((48, 64), 255, np.uint16)
    values[:, 20:40], values[:10] = 299, 65535
    for kind, picture in (("i", Image.new("RGB", (64, 48))), ("l", Image.fromarray(values))):
        (tmp_path / kind).mkdir()
        picture.save(tmp_path / kind / "a.png")
    return FolderDataset(tmp_path / "i", tmp_path / "l", K, ignore_index=65535)


def test_more_than_255_classes_are_16_bit_and_ignored_is_minus_1(many):
    found = many.read(0)[1]
    assert (many.ignore_index, SubsetDataset(many, 1).ignore_index, ignored_label(K)) == (-1, -1, -1)
    assert (found.dtype, found.unique().tolist(), many[0][1].dtype) == (torch.int16, [-1, 255, 299], torch.int64)
    assert (found[:10] == -1).all()
    assert (found[10:, 20:40] == 299).all()


def test_crops_of_more_than_255_classes_are_padded_with_the_ignored_label(many):
    crop = RandomScaleCrop(96, scale=(64, 48), ratio_range=(1, 1), ignore_index=many.ignore_index)
    batch = collate_samples([TrainingSamples(many, crop, seed=0)[0, 0] for _ in range(2)])
    assert batch["labels"].dtype == torch.int16
    assert batch["labels"].unique().tolist() == [-1, 255, 299]
    assert (batch["labels"][:, 48:] == -1).all()
    assert (batch["labels"][0, 10:48, :64] == 255).sum() == 38 * 44


def test_a_crop_that_pads_with_a_class_is_refused(many):
    with pytest.raises(ValueError, match="pads labels with 255, but FolderDataset of 300 classes ignores -1; give the"):
        TrainingSamples(many, RandomScaleCrop(32), seed=0)
    with pytest.raises(ValueError, match="pads labels with -1, but Scenes of 12 classes ignores 255"):
        TrainingSamples(Scenes(), RandomScaleCrop(32, ignore_index=-1), seed=0)


def test_class_255_of_300_is_learned_and_measured(many):
    model = create_model("test_vit", "linear", K, pretrained=False, ignore_index=ignored_label(K))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    samples = TrainingSamples(many, RandomScaleCrop(32, scale=(64, 48), ignore_index=-1, max_class_ratio=1), seed=0)
    for keys in IterationSampler(len(many), 2, seed=0, num_iterations=10):
        batch = collate_samples([samples[key] for key in keys])
        optimizer.zero_grad()
        loss = model(batch["image"].float() / 255, batch["labels"])
        loss.backward()
        optimizer.step()
    image, truth = many[0]
    assert set(model.predict(image[None]).unique().tolist()) <= {255, 299}
    metric = METRICS["iou"](K, ignore_index=many.ignore_index)
    metric.update(preds=truth.clamp(min=0)[None], labels=many.read(0)[1][None])
    results = metric.compute()
    assert results["pixels"].nonzero().flatten().tolist() == [255, 299]
    assert results["pixels"].sum() == 38 * 64
    assert results["mIoU"] == 1


def test_a_label_map_of_more_than_255_classes(many, tmp_path):
    label_map = LabelMap({255: 299, 299: 0, 65535: None})
    found = FolderDataset(tmp_path / "i", tmp_path / "l", K, label_map=label_map).read(0)[1]
    assert (found.dtype, found.unique().tolist()) == (torch.int16, [-1, 0, 299])
