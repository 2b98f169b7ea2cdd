import re

import pytest
from miniatures import STEMS, draw_labels, voc2012, voc2012_aug

from segheads.data import VOC2012, VOC2012Aug
from segheads.errors import DataMissingError


def test_official_names_and_colours(tmp_path):
    dataset = VOC2012(voc2012(tmp_path))
    assert dataset.num_classes == len(set(dataset.class_names)) == len(set(dataset.palette)) == 21
    spots = {0: "background", 1: "aeroplane", 11: "diningtable", 15: "person", 16: "pottedplant", 20: "tvmonitor"}
    assert {index: dataset.class_names[index] for index in spots} == spots
    colours = {1: (128, 0, 0), 4: (0, 0, 128), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}  # the kit's labels
    assert {index: dataset.palette[index] for index in colours} == colours


@pytest.mark.parametrize("inside", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_roots_and_labels(tmp_path, inside):
    dataset = VOC2012(voc2012(tmp_path, values=(0, 20, 255)) / inside, "val")
    assert [dataset.name(index) for index in range(len(dataset))] == ["c_000000_000001", "d_000000_000001"]
    assert dataset.read(0)[1][0, :3].tolist() == [0, 20, 255]


def test_train_and_val_together(tmp_path):
    lists = voc2012(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    (lists / "trainval.txt").write_text("\n".join(STEMS["train"] + STEMS["val"]))
    assert len(VOC2012(tmp_path, "trainval")) == 4


@pytest.mark.parametrize("missing", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt"])
def test_missing_parts(tmp_path, missing):
    base = voc2012(tmp_path) / "VOCdevkit/VOC2012"
    (base / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(DataMissingError, match=f"^there is no {re.escape(str(base / missing))}; VOC2012 needs "):
        VOC2012(tmp_path)


@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_labels_of_sbd(tmp_path, name):
    base = voc2012_aug(tmp_path) / "VOCdevkit/VOC2012"
    (base / "ImageSets/Segmentation/train_aug.txt").rename(base / f"ImageSets/Segmentation/{name}.txt")
    assert {label.parent.name for _, label in VOC2012Aug(tmp_path).files} == {"SegmentationClassAug"}
    assert {label.parent.name for _, label in VOC2012Aug(tmp_path, "val").files} == {"SegmentationClass"}


def test_labels_of_sbd_on_top_of_vocs(tmp_path):
    """As MMSegmentation's converter leaves them."""
    base = voc2012(tmp_path) / "VOCdevkit/VOC2012"
    more = STEMS["val"][0]
    draw_labels(base / f"SegmentationClassAug/{more}.png", (3,))
    (base / "ImageSets/Segmentation/aug.txt").write_text(more)
    dataset = VOC2012Aug(tmp_path)
    assert [label.parent.name for _, label in dataset.files] == [*["SegmentationClass"] * 2, "SegmentationClassAug"]
    assert dataset.read(2)[1].unique().tolist() == [3]


def test_without_the_labels_of_sbd(tmp_path):
    with pytest.raises(DataMissingError, match=r"VOC2012Aug needs JPEGImages/, SegmentationClassAug/ and .*aug\.txt"):
        VOC2012Aug(voc2012(tmp_path))
    with pytest.raises(ValueError, match="split must be one of train, val, not 'trainval'"):
        VOC2012Aug(tmp_path, "trainval")
