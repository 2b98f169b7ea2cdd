import re

import numpy as np
import pytest
from miniatures import cityscapes, draw_image, draw_labels

from segheads.data import Cityscapes
from segheads.errors import DataError

# In the order of the train ids, as in the authors' helpers/labels.py
OFFICIAL = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
# id: train id, from there, too; all other ids, 0 to 33, are 255
TRAIN_IDS = {
    **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13},
    **{27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
}


def test_official_names_and_colours(tmp_path):
    dataset = Cityscapes(cityscapes(tmp_path))
    assert list(zip(dataset.class_names, dataset.palette, strict=True)) == list(OFFICIAL.items())
    assert dataset.num_classes == 19


def test_every_label_id_becomes_its_train_id(tmp_path):
    labels = Cityscapes(cityscapes(tmp_path, values=range(34))).read(0)[1]
    assert labels[0, :34].tolist() == [TRAIN_IDS.get(value, 255) for value in range(34)]


def test_train_ids_are_read_as_they_are(tmp_path):
    dataset = Cityscapes(cityscapes(tmp_path, kind="labelTrainIds", values=(0, 18, 255)))
    assert dataset.read(0)[1][0, :3].tolist() == [0, 18, 255]


def test_label_ids_win_over_train_ids(tmp_path):
    cityscapes(tmp_path, kind="labelTrainIds", values=(5,))
    cityscapes(tmp_path, kind="labelIds", values=(33,))
    assert Cityscapes(tmp_path)[0][1].unique().tolist() == [18]


def test_splits_and_order(tmp_path):
    """By city, then by name; what else the archives hold is passed over."""
    cityscapes(tmp_path)
    for city, frame in (("a", "a_000000_000002"), ("bad honnef.2", "bad honnef.2_000000_000019")):
        draw_image(tmp_path / "leftImg8bit/train" / city / f"{frame}_leftImg8bit.png")
        draw_labels(tmp_path / "gtFine/train" / city / f"{frame}_gtFine_labelIds.png", (7,))
        draw_labels(tmp_path / "gtFine/train" / city / f"{frame}_gtFine_instanceIds.png", (26001,), dtype=np.uint16)
        draw_image(tmp_path / "gtFine/train" / city / f"{frame}_gtFine_color.png")
        draw_image(tmp_path / "leftImg8bit/train" / city / "overview.png")
        (tmp_path / "gtFine/train" / city / f"{frame}_gtFine_polygons.json").write_text("{}")
        (tmp_path / "leftImg8bit/train" / city / f"._{frame}_leftImg8bit.png").write_bytes(b"of a Mac")
    (tmp_path / "leftImg8bit/train/.cache").mkdir()
    (tmp_path / "leftImg8bit/train/license.txt").write_text("no city")
    names = ["a_000000_000002", "a_000000_000019", "b_000001_000019", "bad honnef.2_000000_000019"]
    train = Cityscapes(tmp_path, "train")
    assert [train.name(index) for index in range(len(train))] == names
    assert train.read(3)[1].unique().tolist() == [0]
    val = Cityscapes(str(tmp_path), "val")
    assert [val.name(index) for index in range(len(val))] == ["c_000000_000001", "d_000000_000001"]


def test_test_split_has_no_labels(tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val, not 'test'"):
        Cityscapes(cityscapes(tmp_path), "test")


def test_missing_folders(tmp_path):
    for kind in ("leftImg8bit", "gtFine"):
        missing = re.escape(str(tmp_path / kind / "val"))
        with pytest.raises(
            FileNotFoundError, match=rf"no folder {missing}; .*leftImg8bit/val/CITY/ .*gtFine/val/CITY/"
        ):
            Cityscapes(tmp_path, "val")
        (tmp_path / kind / "val").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"leftImg8bit/val holds no folders; .* one for each city"):
        Cityscapes(tmp_path, "val")
    (tmp_path / "leftImg8bit/val/lindau").mkdir()
    with pytest.raises(ValueError, match=r"lindau holds no image files; .* such as NAME_leftImg8bit\.png"):
        Cityscapes(tmp_path, "val")
    draw_image(tmp_path / "leftImg8bit/val/lindau/x_leftImg8bit.png")
    with pytest.raises(FileNotFoundError, match=r"no folder .*gtFine/val/lindau; .* such as NAME_gtFine_labelIds\.png"):
        Cityscapes(tmp_path, "val")


def test_image_without_label(tmp_path):
    (cityscapes(tmp_path) / "gtFine/train/b/b_000001_000019_gtFine_labelIds.png").unlink()
    draw_labels(tmp_path / "gtFine/train/b/other_gtFine_labelIds.png", (7,))
    message = (
        r"1 of 1 images in .*/b have no label: b_000001_000019_leftImg8bit\.png needs .*/b_000001_000019_gtFine_label"
    )
    with pytest.raises(FileNotFoundError, match=message + r"Ids\.png"):
        Cityscapes(tmp_path)


@pytest.mark.parametrize(
    ("kind", "value", "dtype", "message"),
    [
        (
            "labelIds",
            34,
            np.uint8,
            r"the value 34 \(960 pixels out of range\), but label ids of Cityscapes are 0 to 33",
        ),
        ("labelIds", 255, np.uint8, r"the value 255 \(960 pixels"),
        ("labelIds", 263, np.uint16, r"the value 263 \(960 pixels"),
        ("labelTrainIds", 19, np.uint8, r"the value 19 \(960 pixels .*19 classes allow 0 to 18, and 255 for ignored"),
    ],
)
def test_values_that_are_no_class(tmp_path, kind, value, dtype, message):
    cityscapes(tmp_path, kind=kind)
    draw_labels(tmp_path / f"gtFine/train/a/a_000000_000019_gtFine_{kind}.png", (7, value), dtype=dtype)
    with pytest.raises(DataError, match=rf"a_000000_000019_gtFine_{kind}\.png holds {message}"):
        Cityscapes(tmp_path).read(0)


def test_sixteen_bit_label_ids(tmp_path):
    cityscapes(tmp_path)
    draw_labels(tmp_path / "gtFine/train/a/a_000000_000019_gtFine_labelIds.png", (7, 33, 0), dtype=np.uint16)
    assert Cityscapes(tmp_path).read(0)[1][0, :3].tolist() == [0, 18, 255]


def test_label_of_another_size(tmp_path):
    cityscapes(tmp_path)
    draw_labels(tmp_path / "gtFine/train/a/a_000000_000019_gtFine_labelIds.png", (7,), size=(5, 4))
    with pytest.raises(DataError, match=r"labelIds\.png is 5x4 but its image .*leftImg8bit\.png is 48x40"):
        Cityscapes(tmp_path).read(0)
